// SPDX-License-Identifier: Apache-2.0
#include "find_images.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>

namespace vim_infer {
namespace {

namespace fs = std::filesystem;

bool is_picture(const std::string& name)
{
    std::string lower = name;
    for (char& c : lower)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    for (const char* suffix : {".jpeg", ".jpg", ".pgm", ".png", ".ppm"})
        if (lower.ends_with(suffix)) return true;
    return false;
}

// The files of a folder before its subfolders; links to folders are not followed, so that there are no circles.
void walk(const std::string& folder, std::vector<std::string>& found)
{
    std::error_code error;
    std::vector<std::string> files, folders;
    fs::directory_iterator entries(folder, error);
    for (const fs::directory_iterator end; !error && entries != end; entries.increment(error)) {
        std::error_code ignored;  // a link to nowhere counts as a file: reading it says what is wrong
        const std::string name = entries->path().filename().string();
        if (!entries->is_directory(ignored)) {
            if (is_picture(name)) files.push_back(name);
        } else if (!entries->is_symlink(ignored)) {
            folders.push_back(name);
        }
    }
    if (error) found.push_back(folder);
    std::sort(files.begin(), files.end());
    std::sort(folders.begin(), folders.end());
    const std::string prefix = folder.ends_with('/') ? folder : folder + '/';
    for (const std::string& name : files) found.push_back(prefix + name);
    for (const std::string& name : folders) walk(prefix + name, found);
}

void add(const std::string& path, std::vector<std::string>& found)
{
    std::error_code error;
    if (fs::is_directory(path, error))
        walk(path, found);
    else
        found.push_back(path);
}

}  // namespace

std::vector<std::string> read_list(const std::string& path)
{
    std::ifstream file;
    if (path != "-") {
        file.open(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + ": cannot read the list: " + std::strerror(errno));
    }
    std::istream& in = path == "-" ? std::cin : file;
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) {
        if (line.ends_with('\r')) line.pop_back();
        if (!line.empty()) lines.push_back(line);
    }
    if (in.bad()) throw std::runtime_error(path + ": cannot read the list");
    return lines;
}

std::vector<std::string> find_images(const std::vector<std::string>& arguments)
{
    std::vector<std::string> found;
    for (const std::string& argument : arguments) {
        if (argument.starts_with('@')) {
            for (const std::string& line : read_list(argument.substr(1))) add(line, found);
        } else {
            add(argument, found);
        }
    }
    return found;
}

}  // namespace vim_infer
