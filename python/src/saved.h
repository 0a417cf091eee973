// SPDX-License-Identifier: Apache-2.0
// What Python holds between a forward and its backward.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <utility>

#include "convert.h"
#include "reusable.h"

namespace vimcore::python {

inline Memory to_memory(const std::string& name)
{
    for (const Memory memory : {Memory::least, Memory::lean, Memory::fast})
        if (name == name_of(memory)) return memory;
    throw std::invalid_argument("[VisionMamba] memory: expected \"least\", \"lean\" or \"fast\", got \"" + name + "\"");
}

using ReusableSaved = Reusable<Saved>;

// What captured graphs have written down the addresses of: kept until release_memory().
inline ReusableSaved& captured_saved()
{
    static auto* all = new ReusableSaved;  // never destroyed, as contexts()
    return *all;
}

// Likewise the weights, in their own memory and as packed. Under the GIL.
inline std::set<std::shared_ptr<const void>>& captured_weights()
{
    static auto* all = new std::set<std::shared_ptr<const void>>;
    return *all;
}

// What one forward keeps for its backward; the memory returns to the network with the last reference. What a network
// reuses serves one stream: there, what a backward still reads comes before what the next forward writes.
class SavedHandle {
public:
    SavedHandle(Memory memory, std::shared_ptr<ReusableSaved> origin, bool capturing)
        : origin_(capturing ? nullptr : std::move(origin)), capturing_(capturing)
    {
        saved_ = origin_ ? origin_->take([] { return std::make_unique<Saved>(); }) : std::make_unique<Saved>();
        saved_->memory = memory;
    }
    // Into memory of the caller's, (bytes) u8.
    SavedHandle(Memory memory, Out lent, bool capturing)
        : capturing_(capturing), saved_(std::make_unique<Saved>()), lent_(std::move(lent))
    {
        saved_->memory = memory;
        saved_->lent = to_tensor(*lent_, "Saved", "memory");
        if (saved_->lent.dtype != DType::u8 || saved_->lent.shape.rank() != 1 ||
            reinterpret_cast<std::uintptr_t>(saved_->lent.data) % 64 != 0)
            throw std::invalid_argument("[Saved] memory: expected (bytes) u8 at an address that 64 divides, got " +
                                        describe(saved_->lent));
    }
    SavedHandle(const SavedHandle&) = delete;
    SavedHandle& operator=(const SavedHandle&) = delete;
    ~SavedHandle()
    {
        if (lent_) return;
        if (capturing_) captured_saved().give(std::move(saved_));
        if (origin_) origin_->give(std::move(saved_));
    }

    Saved& operator*() { return *saved_; }
    std::size_t bytes() const { return saved_->storage.bytes(); }
    const char* memory() const { return name_of(saved_->memory); }

private:
    std::shared_ptr<ReusableSaved> origin_;
    bool capturing_;
    std::unique_ptr<Saved> saved_;
    MaybeOut lent_;
};

// The bytes that a forward kept, those of its SavedHandle or a copy that a saved-tensor hook made of them, and what
// they are.
struct Kept {
    In bytes;
    Memory memory;

    // Laid out by attach(saved, data, bytes) for tensors on the device of x.
    template <class Attach>
    Saved saved(const Tensor& x, const char* op, Attach&& attach) const
    {
        const Tensor found = to_tensor(bytes, op, "saved");
        if (found.dtype != DType::u8 || found.shape.rank() != 1 || found.device != x.device)
            throw std::invalid_argument(std::string("[") + op + "] saved: expected (bytes) u8 " + to_string(x.device) +
                                        ", got " + describe(found));
        Saved saved;
        saved.memory = memory;
        attach(saved, found.data, found.bytes());
        return saved;
    }
};

}  // namespace vimcore::python
