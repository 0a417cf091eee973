// SPDX-License-Identifier: Apache-2.0
// For tests of files: a folder that goes away again, and what an exception says.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <system_error>

struct Folder {
    std::filesystem::path path;
    Folder()
    {
        std::string name = (std::filesystem::temp_directory_path() / "vimcore-test-XXXXXX").string();
        if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
        path = name;
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder()
    {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    std::string file(const char* name) const { return (path / name).string(); }
    std::size_t entries() const
    {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path), {}));
    }
};

// The message of the exception of type T that `run` throws; anything else fails the check.
template <class T>
std::string message_of(const std::function<void()>& run)
{
    try {
        run();
    } catch (const T& error) {
        return error.what();
    } catch (const std::exception& error) {
        return std::string("WRONG TYPE: ") + error.what();
    }
    return "NOTHING THROWN";
}

inline bool contains(const std::string& text, const std::string& part)
{
    if (text.find(part) != std::string::npos) return true;
    std::printf("'%s' is not in '%s'\n", part.c_str(), text.c_str());
    return false;
}
