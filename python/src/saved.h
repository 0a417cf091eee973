// SPDX-License-Identifier: Apache-2.0
// What Python holds between a forward and its backward.
#pragma once

#include "convert.h"

namespace vimcore::python {

inline Memory to_memory(const std::string& name)
{
    if (name == "lean") return Memory::lean;
    if (name == "fast") return Memory::fast;
    throw std::invalid_argument("[VisionMamba] memory: expected \"lean\" or \"fast\", got \"" + name + "\"");
}

using SavedPool = Pool<Saved>;

// What captured graphs have written down the addresses of: kept until release_memory().
inline SavedPool& captured_saved()
{
    static auto* all = new SavedPool;  // never destroyed, as contexts()
    return *all;
}

// What one forward keeps for its backward; the memory returns to the network's pool with the last reference. A pool
// serves one stream: there, what a backward still reads comes before what the next forward writes.
class SavedHandle {
public:
    SavedHandle(Memory memory, std::shared_ptr<SavedPool> pool, bool capturing)
        : pool_(capturing ? nullptr : std::move(pool)), capturing_(capturing)
    {
        saved_ = pool_ ? pool_->take([] { return std::make_unique<Saved>(); }) : std::make_unique<Saved>();
        saved_->memory = memory;
    }
    SavedHandle(const SavedHandle&) = delete;
    SavedHandle& operator=(const SavedHandle&) = delete;
    ~SavedHandle()
    {
        if (capturing_) captured_saved().give(std::move(saved_));
        if (pool_) pool_->give(std::move(saved_));
    }

    Saved& operator*() { return *saved_; }
    std::size_t bytes() const { return saved_->storage.bytes(); }
    const char* memory() const { return saved_->memory == Memory::lean ? "lean" : "fast"; }

    struct Mark {
        std::int64_t self;  // its own address: a copy of it is recognised
        SavedHandle* owner;
    } mark{reinterpret_cast<std::intptr_t>(&mark), this};

private:
    std::shared_ptr<SavedPool> pool_;
    bool capturing_;
    std::unique_ptr<Saved> saved_;
};

}  // namespace vimcore::python
