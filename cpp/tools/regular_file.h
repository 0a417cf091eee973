// SPDX-License-Identifier: Apache-2.0
// Files that are opened only where they are regular ones: a pipe or a device might never end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vim_infer {

class RegularFile {
public:
    explicit RegularFile(const std::string& path);  // std::system_error, or vimcore::Error where it is no such file
    ~RegularFile();
    RegularFile(const RegularFile&) = delete;
    RegularFile& operator=(const RegularFile&) = delete;

    std::int64_t size() const { return size_; }
    std::size_t read(void* to, std::size_t count, std::int64_t at) const;  // less where the file ends

private:
    int descriptor_;
    std::int64_t size_ = 0;
};

std::vector<unsigned char> read_file(const std::string& path);  // also an error where it is larger than 2 GiB

// Within a catch: what went wrong with a file whose path is said by whoever prints this.
std::string what_is_wrong();

}  // namespace vim_infer
