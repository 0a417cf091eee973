// SPDX-License-Identifier: Apache-2.0
#include "find_images.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "text.h"

namespace vim_infer {
namespace {

namespace fs = std::filesystem;

std::string in_small_letters(std::string name)
{
    for (char& c : name)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return name;
}

// Those that only Python reads are among them: a picture is never passed over, but an error that says so.
constexpr const char* picture_suffixes[] = {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg",
                                            ".pbm",  ".pgm", ".png", ".pnm", ".ppm",  ".tif", ".tiff", ".webp"};

bool is_picture(const std::string& name)
{
    const std::string lower = in_small_letters(name);
    return std::any_of(std::begin(picture_suffixes), std::end(picture_suffixes),
                       [&](const char* suffix) { return lower.ends_with(suffix); });
}

// Files of the system's own, which nobody misses.
bool is_hidden(const std::string& name)
{
    const std::string lower = in_small_letters(name);
    return name.starts_with('.') || lower == "thumbs.db" || lower == "desktop.ini";
}

std::string kind_of(const std::string& name)
{
    const std::string suffix = suffix_of(name);
    return suffix.empty() ? "no suffix" : suffix;
}

// The files of a folder before its subfolders; links to folders are not followed, so that there are no circles.
void walk(const std::string& folder, bool hidden, Found& found)
{
    std::error_code error;
    std::vector<std::string> files, folders;
    fs::directory_iterator entries(folder, error);
    for (const fs::directory_iterator end; !error && entries != end; entries.increment(error)) {
        std::error_code ignored;  // a link to nowhere counts as a file: reading it says what is wrong
        const std::string name = entries->path().filename().string();
        const bool is_folder = entries->is_directory(ignored);
        if (is_folder && !entries->is_symlink(ignored))
            folders.push_back(name);
        else if (!is_folder && is_picture(name))
            files.push_back(name);
        else if (!hidden && !is_hidden(name))
            found.passed_over[is_folder ? "linked folder" : kind_of(name)]++;
    }
    if (error) found.paths.push_back(folder);
    std::sort(files.begin(), files.end());
    std::sort(folders.begin(), folders.end());
    const std::string prefix = folder.ends_with('/') ? folder : folder + '/';
    for (const std::string& name : files) found.paths.push_back(prefix + name);
    for (const std::string& name : folders) walk(prefix + name, hidden || is_hidden(name), found);
}

void add(const std::string& path, Found& found)
{
    std::error_code error;
    if (fs::is_directory(path, error))
        walk(path, false, found);
    else
        found.paths.push_back(path);
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

Found find_images(const std::vector<std::string>& arguments)
{
    Found found;
    for (const std::string& argument : arguments) {
        if (argument.starts_with('@')) {
            for (const std::string& line : read_list(argument.substr(1))) add(line, found);
        } else {
            add(argument, found);
        }
    }
    return found;
}

std::string suffix_of(const std::string& path) { return in_small_letters(fs::path(path).extension().string()); }

std::string passed_over_json(const Kinds& passed_over)
{
    std::string text;
    for (const auto& [kind, count] : passed_over)
        text += (text.empty() ? "" : ", ") + json_text(kind) + ": " + std::to_string(count);
    return text.empty() ? text : ", \"passed_over\": {" + text + "}";
}

void complain_passed_over(const Kinds& passed_over)
{
    constexpr std::size_t shown = 12;
    if (passed_over.empty()) return;
    std::vector<std::pair<std::string, std::size_t>> order(passed_over.begin(), passed_over.end());
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
    std::string text;
    std::size_t more = 0;
    for (std::size_t i = 0; i < order.size(); i++) {
        if (i < shown)
            text += (i ? ", " : "") + std::to_string(order[i].second) + " " + order[i].first;
        else
            more += order[i].second;
    }
    complain("passed over: " + text + (more ? ", " + std::to_string(more) + " of other kinds" : ""));
}

}  // namespace vim_infer
