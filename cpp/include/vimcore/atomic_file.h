// SPDX-License-Identifier: Apache-2.0
// Crash-safe writing: temporary file beside the target, fsync, rename over it, fsync of the folder.
#pragma once

#include <cstddef>
#include <string>

namespace [[gnu::visibility("default")]] vimcore {

// The temporary file: closed and removed by the destructor unless commit() has renamed it. Errors begin with "[who]".
class AtomicFile {
public:
    AtomicFile(std::string who, const std::string& path);
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile();

    void write(const void* bytes, std::size_t size);
    void commit();

private:
    [[noreturn]] void fail(const std::string& what) const;

    std::string who_, path_, folder_, temporary_;
    int descriptor_ = -1;
    bool renamed_ = false;
};

}  // namespace vimcore
