// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"

#include <algorithm>

namespace vimcore {

Tensor Arena::take(const Shape& shape, DType dtype)
{
    Tensor tensor{nullptr, shape, dtype, device_};
    std::size_t bytes = std::max<std::size_t>(64, (tensor.bytes() + 63) / 64 * 64);
    while (block_ < blocks_.size() && blocks_[block_].bytes() - used_ < bytes) {
        if (used_ == 0 && !held_) blocks_.resize(block_);  // too small, and nothing of it and those behind is taken
        block_ = std::min(block_ + 1, blocks_.size());
        used_ = 0;
    }
    if (block_ == blocks_.size()) {
        blocks_.emplace_back(std::max(bytes, std::size_t{1} << 20), device_);
        allocations_++;
        used_ = 0;
    }
    tensor.data = static_cast<char*>(blocks_[block_].data()) + used_;
    used_ += bytes;
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return tensor;
}

void Arena::reserve(std::size_t bytes)
{
    if (depth_ > 0 || held_ || this->bytes() >= bytes) return;
    blocks_.clear();
    block_ = used_ = 0;
    blocks_.emplace_back(bytes, device_);
    allocations_++;
}

Arena::Scope::~Scope()
{
    arena_.block_ = block_;
    arena_.used_ = used_;
    arena_.live_ = live_;
    // The outermost scope joins the pieces that a new shape left behind, so that the next call finds one block for the
    // most that was taken at a time.
    if (--arena_.depth_ == 0 && arena_.blocks_.size() > 1 && !arena_.held_) {
        arena_.blocks_.clear();
        arena_.block_ = arena_.used_ = 0;
        try {
            arena_.blocks_.emplace_back(arena_.peak_, arena_.device_);
            arena_.allocations_++;
        } catch (...) {  // no memory for one block now: start from nothing at the next call
        }
    }
}

std::size_t Arena::bytes() const
{
    std::size_t total = 0;
    for (const Buffer& block : blocks_) total += block.bytes();
    return total;
}

}  // namespace vimcore
