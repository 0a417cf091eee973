// SPDX-License-Identifier: Apache-2.0
// Sizes of the CUDA backend's scratch memory that the plan of memory must know where there is no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vimcore::device_sizes {

inline constexpr std::int64_t blas_workspace = std::int64_t{32} << 20;  // bytes of one product by cuBLASLt, at most

// The scan's tuned gradient, for 8, 16 or 32 states: tokens of a tile, threads of a direction, elements that a thread
// keeps, channels of a block.
inline constexpr std::int64_t back_tile = 16, back_threads = 64, back_kept = 8;
constexpr bool back_is_tuned(std::int64_t states) { return states == 8 || states == 16 || states == 32; }
constexpr std::int64_t back_channels(std::int64_t states) { return back_threads * back_kept / states; }

// Tokens of a segment: all, up to some length; then, whatever the batch is, so that its images give the same bits. A
// multiple of the chunk.
constexpr std::int64_t back_segment(std::int64_t len, std::int64_t chunk)
{
    constexpr std::int64_t whole = 2048, least = 256, most_segments = 64;
    const std::int64_t wanted = len < whole ? len : std::max(least, (len + most_segments - 1) / most_segments);
    return (wanted + chunk - 1) / chunk * chunk;
}

// The generic one: states of a launch, channels of a block, tokens of a tile.
inline constexpr std::int64_t generic_states = 16, generic_channels = 64, generic_tile = 8;

// Parts into which sums over tokens are cut.
inline constexpr std::int64_t conv_parts = 512, norm_parts = 1024, dt_parts = 64;

}  // namespace vimcore::device_sizes
