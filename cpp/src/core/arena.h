// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one call: a stack of tensors. Grows while a shape is new, then never allocates again: it is as much
// as was in use at a time. An arena that counts does the same without memory, for plans (vimcore/plan.h).
#pragma once

#include <cstdint>
#include <vector>

#include "vimcore/tensor.h"

namespace vimcore {

class Arena {
public:
    enum class Mode : std::uint8_t { memory, counting };
    explicit Arena(Device device, Mode mode = Mode::memory) : device_(device), mode_(mode) {}

    Tensor take(const Shape& shape, DType dtype);
    void reserve(std::size_t bytes);  // one block of at least that size; while nothing is taken

    // Gives back at the end of a block what was taken inside it.
    class Scope {
    public:
        explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_), live_(arena.live_)
        {
            ++arena.depth_;
        }
        ~Scope();
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

    private:
        Arena& arena_;
        std::size_t block_, used_, live_;
    };

    void hold(bool hold) { held_ = hold; }  // while held, no block is given back or joined with others

    bool counts() const { return mode_ == Mode::counting; }   // addresses are not to be followed
    std::size_t bytes() const { return bytes_; }              // reserved now
    std::size_t most_bytes() const { return most_bytes_; }    // and at most so far
    std::size_t allocations() const { return allocations_; }  // since construction; constant after warm-up

private:
    struct Block {
        Buffer memory;  // none where the arena counts
        char* data;
        std::size_t bytes;
    };
    void add_block(std::size_t bytes);
    void drop_blocks(std::size_t first);  // and those behind it

    Device device_;
    Mode mode_;
    std::vector<Block> blocks_;
    std::size_t bytes_ = 0, most_bytes_ = 0;
    std::size_t block_ = 0, used_ = 0;  // where the next tensor goes
    std::size_t live_ = 0, peak_ = 0;   // bytes taken now, and at most so far
    std::size_t allocations_ = 0;
    int depth_ = 0;
    bool held_ = false;
};

// Somewhere for tensors that are never read: no two calls give the same memory.
void* placeholder_memory(std::size_t bytes);

}  // namespace vimcore
