// SPDX-License-Identifier: Apache-2.0
// Which pictures a user means.
#pragma once

#include <string>
#include <vector>

namespace vim_infer {

// Files as given; folders walked like Python's os.walk, names in order, for JPEG, PNG, PPM and PGM files; @FILE: the
// lines of a file, each a picture or a folder. A folder that cannot be read stays in the list, to be reported.
std::vector<std::string> find_images(const std::vector<std::string>& arguments);

// The lines of a list, without empty ones; "-" is standard input.
std::vector<std::string> read_list(const std::string& path);

}  // namespace vim_infer
