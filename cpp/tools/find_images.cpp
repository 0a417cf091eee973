// SPDX-License-Identifier: Apache-2.0
#include "find_images.h"

#include <glob.h>

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
void walk(const std::string& folder, bool (*wanted)(const std::string& name), bool hidden, Found& found)
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
        else if (!is_folder && wanted(name))
            files.push_back(name);
        else if (!hidden && !is_hidden(name))
            found.passed_over[is_folder ? "linked folder" : kind_of(name)]++;
    }
    if (error) found.paths.push_back(folder);
    std::sort(files.begin(), files.end());
    std::sort(folders.begin(), folders.end());
    const std::string prefix = folder.ends_with('/') ? folder : folder + '/';
    for (const std::string& name : files) found.paths.push_back(prefix + name);
    for (const std::string& name : folders) walk(prefix + name, wanted, hidden || is_hidden(name), found);
}

bool is_folder(const std::string& path)
{
    std::error_code error;
    return fs::is_directory(path, error);
}

// Names by a pattern, in the order of their bytes; none where nothing matches.
std::vector<std::string> matching(const std::string& pattern)
{
    std::vector<std::string> names;
    ::glob_t matches{};
    if (::glob(pattern.c_str(), GLOB_NOESCAPE | GLOB_NOSORT, nullptr, &matches) == 0)
        names.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
    ::globfree(&matches);
    std::sort(names.begin(), names.end());
    return names;
}

void add_named(const std::string& name, std::vector<std::string>& found)
{
    std::error_code error;
    std::vector<std::string> names;
    if (name.find_first_of("*?[") != std::string::npos && !fs::exists(fs::symlink_status(name, error)))
        names = matching(name);
    if (names.empty()) names.push_back(name);
    found.insert(found.end(), names.begin(), names.end());
}

// What the arguments name: lists as their lines, patterns as what matches them.
std::vector<std::string> named(const std::vector<std::string>& arguments)
{
    std::vector<std::string> found;
    int readers = 0;
    for (const std::string& argument : arguments) {
        readers += argument == standard_input || argument == "@-";
        if (readers > 1) throw std::runtime_error("-: standard input can be read once");
        if (argument == standard_input) {
            found.push_back(argument);
        } else if (argument.starts_with('@')) {
            for (const std::string& line : read_list(argument.substr(1)))
                add_named(line == standard_input ? "./" + line : line, found);
        } else {
            add_named(argument, found);
        }
    }
    return found;
}

bool is_array(const std::string& name) { return in_small_letters(name).ends_with(".npy"); }

bool is_of_clip(const std::string& name) { return is_array(name) || is_picture(name); }

std::string folder_of(const std::string& path)
{
    const std::size_t slash = path.rfind('/'), last = path.find_last_not_of('/', slash);
    return last == std::string::npos ? path.substr(0, slash + 1) : path.substr(0, last + 1);
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

bool is_picture(const std::string& name)
{
    const std::string lower = in_small_letters(name);
    return std::any_of(std::begin(picture_suffixes), std::end(picture_suffixes),
                       [&](const char* suffix) { return lower.ends_with(suffix); });
}

Found find_images(const std::vector<std::string>& arguments)
{
    Found found;
    for (const std::string& path : named(arguments)) {
        if (path != standard_input && is_folder(path))
            walk(path, is_picture, false, found);
        else
            found.paths.push_back(path);
    }
    return found;
}

Found find_clips(const std::vector<std::string>& arguments)
{
    Found clips;
    for (const std::string& path : named(arguments)) {
        if (!is_folder(path)) {
            clips.paths.push_back(path);
            continue;
        }
        Found files;
        walk(path, is_of_clip, false, files);
        for (const auto& [kind, count] : files.passed_over) clips.passed_over[kind] += count;
        std::string last;
        for (const std::string& name : files.paths) {
            if (is_array(name) || is_folder(name)) {  // a folder here is one that cannot be read
                clips.paths.push_back(name);
            } else if (const std::string folder = folder_of(name); folder != last) {
                clips.paths.push_back(folder);
                last = folder;
            }
        }
    }
    return clips;
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
