// SPDX-License-Identifier: Apache-2.0
// What Python holds between a forward and its backward.
#pragma once

#include "convert.h"

namespace vimcore::python {

inline Memory to_memory(const std::string& name)
{
    for (const Memory memory : {Memory::least, Memory::lean, Memory::fast})
        if (name == name_of(memory)) return memory;
    throw std::invalid_argument("[VisionMamba] memory: expected \"least\", \"lean\" or \"fast\", got \"" + name + "\"");
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
    const char* memory() const { return name_of(saved_->memory); }

private:
    std::shared_ptr<SavedPool> pool_;
    bool capturing_;
    std::unique_ptr<Saved> saved_;
};

// What a forward on tensors like x kept, from its bytes: those of `SavedHandle`, or a copy that a saved-tensor hook
// made of them.
inline Saved to_saved(const In& array, const std::string& memory, const Config& config, const Tensor& x, const char* op)
{
    const Tensor bytes = to_tensor(array, op, "saved");
    if (bytes.dtype != DType::u8 || bytes.shape.rank() != 1 || bytes.device != x.device)
        throw std::invalid_argument(std::string("[") + op + "] saved: expected (bytes) u8 " + to_string(x.device) +
                                    ", got " + describe(bytes));
    Saved saved;
    saved.memory = to_memory(memory);
    saved.attach(config, x.size(0), x.dtype, x.device, bytes.data, bytes.bytes());
    return saved;
}

}  // namespace vimcore::python
