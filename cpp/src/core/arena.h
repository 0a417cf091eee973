// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one call: a stack of tensors. Grows while a shape is new, then never allocates again: it is as much
// as was in use at a time.
#pragma once

#include <vector>

#include "vimcore/tensor.h"

namespace vimcore {

class Arena {
public:
    explicit Arena(Device device) : device_(device) {}

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

    std::size_t bytes() const;                                // reserved now
    std::size_t allocations() const { return allocations_; }  // since construction; constant after warm-up

private:
    Device device_;
    std::vector<Buffer> blocks_;
    std::size_t block_ = 0, used_ = 0;  // where the next tensor goes
    std::size_t live_ = 0, peak_ = 0;   // bytes taken now, and at most so far
    std::size_t allocations_ = 0;
    int depth_ = 0;
    bool held_ = false;
};

}  // namespace vimcore
