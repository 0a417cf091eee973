// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace vimcore {

Tensor Arena::take(const Shape& shape, DType dtype)
{
    Tensor tensor{nullptr, shape, dtype, device_};
    std::size_t bytes = std::max<std::size_t>(64, (tensor.bytes() + 63) / 64 * 64);
    while (block_ < blocks_.size() && blocks_[block_].bytes - used_ < bytes) {
        if (used_ == 0 && !held_) drop_blocks(block_);  // too small, and nothing of it and those behind is taken
        block_ = std::min(block_ + 1, blocks_.size());
        used_ = 0;
    }
    if (block_ == blocks_.size()) {
        add_block(std::max(bytes, std::size_t{1} << 20));
        used_ = 0;
    }
    tensor.data = blocks_[block_].data + used_;
    used_ += bytes;
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return tensor;
}

void Arena::reserve(std::size_t bytes)
{
    if (depth_ > 0 || held_ || bytes_ >= bytes) return;
    drop_blocks(0);
    block_ = used_ = 0;
    add_block(bytes);
}

Arena::Scope::~Scope()
{
    arena_.block_ = block_;
    arena_.used_ = used_;
    arena_.live_ = live_;
    // The outermost scope joins the pieces that a new shape left behind, so that the next call finds one block for the
    // most that was taken at a time.
    if (--arena_.depth_ == 0 && arena_.blocks_.size() > 1 && !arena_.held_) {
        arena_.drop_blocks(0);
        arena_.block_ = arena_.used_ = 0;
        try {
            arena_.add_block(arena_.peak_);
        } catch (...) {  // no memory for one block now: start from nothing at the next call
        }
    }
}

void Arena::add_block(std::size_t bytes)
{
    if (counts()) {
        blocks_.push_back({{}, static_cast<char*>(placeholder_memory(bytes)), bytes});
    } else {
        Buffer memory(bytes, device_);
        char* const data = static_cast<char*>(memory.data());
        blocks_.push_back({std::move(memory), data, bytes});
    }
    allocations_++;
    bytes_ += bytes;
    most_bytes_ = std::max(most_bytes_, bytes_);
}

void Arena::drop_blocks(std::size_t first)
{
    while (blocks_.size() > first) {
        bytes_ -= blocks_.back().bytes;
        blocks_.pop_back();
    }
}

void* placeholder_memory(std::size_t bytes)
{
    constexpr std::uintptr_t page = 4096;
    static std::atomic<std::uintptr_t> next = std::uintptr_t{1} << 32;
    // Starts anew long before the addresses end; by then those of the first are forgotten.
    if (next > std::uintptr_t{1} << 62) next = std::uintptr_t{1} << 32;
    return reinterpret_cast<void*>(next.fetch_add((bytes / page + 1) * page));
}

}  // namespace vimcore
