// SPDX-License-Identifier: Apache-2.0
// Which pictures a user means.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace vim_infer {

inline constexpr const char* standard_input = "-";

using Kinds = std::map<std::string, std::size_t>;  // files by suffix in small letters

struct Found {
    std::vector<std::string> paths;
    Kinds passed_over;  // in folders, beside the pictures; also linked folders, but no hidden files
};

// Files as given; folders walked, files before subfolders and names in order, for pictures by suffix; @FILE: the
// lines of a file, each a picture or a folder. A folder that cannot be read stays in the list, to be reported.
// A pattern such as photos/*.jpg that is not itself a file stands for what matches it; "-" is a picture on standard
// input. The same as vimcore/data/named_files.py and picture_files.py.
Found find_images(const std::vector<std::string>& arguments);

// Clips in their places: folders that hold pictures, and .npy files. The same as vimcore/clip_files.py.
Found find_clips(const std::vector<std::string>& arguments);

bool is_picture(const std::string& name);        // by its suffix
std::string suffix_of(const std::string& path);  // in small letters

// What follows the last field of a JSON object; nothing where nothing was passed over.
std::string passed_over_json(const Kinds& passed_over);
void complain_passed_over(const Kinds& passed_over);  // one line on standard error, or none

// The lines of a list, without empty ones; "-" is standard input.
std::vector<std::string> read_list(const std::string& path);

}  // namespace vim_infer
