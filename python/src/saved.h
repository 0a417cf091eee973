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

// What one forward keeps for its backward; the memory returns to the network's pool with the last reference.
class SavedHandle {
public:
    SavedHandle(Memory memory, std::shared_ptr<SavedPool> pool) : pool_(std::move(pool))
    {
        saved_ = pool_ ? pool_->take([] { return std::make_unique<Saved>(); }) : std::make_unique<Saved>();
        saved_->memory = memory;
    }
    SavedHandle(const SavedHandle&) = delete;
    SavedHandle& operator=(const SavedHandle&) = delete;
    ~SavedHandle()
    {
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
    std::unique_ptr<Saved> saved_;
};

}  // namespace vimcore::python
