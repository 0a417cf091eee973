// SPDX-License-Identifier: Apache-2.0
// What blocks may take on the GPUs that vimcore is built for, after the tables of NVIDIA's programming guide.
// tests/cuda/check_occupancy.cpp compares them with the header cuda_occupancy.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace vimcore::shim {

struct Architecture {
    int number;                // 90: compute capability 9.0
    std::size_t block_shared;  // bytes of shared memory that a block may have; more than 48 KiB on request
    std::size_t shared;        // of a multiprocessor
    int threads, blocks;       // of a multiprocessor at a time
    int barriers;              // of a multiprocessor, __syncthreads being one; 0: they limit nothing
    int cluster;               // blocks in a cluster; 1: there are none
};

inline constexpr std::size_t KiB = 1024;
inline constexpr Architecture architectures[] = {
    {80, 163 * KiB, 164 * KiB, 2048, 32, 0, 1},   {86, 99 * KiB, 100 * KiB, 1536, 16, 0, 1},
    {89, 99 * KiB, 100 * KiB, 1536, 24, 0, 1},    {90, 227 * KiB, 228 * KiB, 2048, 32, 64, 8},
    {100, 227 * KiB, 228 * KiB, 2048, 32, 64, 8}, {120, 99 * KiB, 100 * KiB, 1536, 24, 24, 8},
};

// The same on all of them.
inline constexpr int registers = 65536;       // of a multiprocessor, and of a block
inline constexpr int thread_registers = 255;  // the most of a thread
inline constexpr int block_threads = 1024;
inline constexpr std::size_t granted_shared = 48 * KiB;  // without request
inline constexpr std::size_t driver_shared = 1 * KiB;    // of every block, in the multiprocessor's

// What a block takes.
struct Footprint {
    int threads = 0, registers = 0, barriers = 1;  // registers: of each thread
    std::size_t shared = 0;
};

// Blocks that a multiprocessor has at a time; 0: it refuses to have one.
constexpr int resident_blocks(const Architecture& gpu, const Footprint& block)
{
    constexpr int quarters = 4, granularity = 256;  // schedulers of a multiprocessor; registers of a warp
    if (block.threads < 1 || block.threads > block_threads || block.shared > gpu.block_shared) return 0;
    if (block.registers > thread_registers) return 0;
    const int warps = (block.threads + 31) / 32;
    const int of_warp = (32 * std::max(block.registers, 1) + granularity - 1) / granularity * granularity;
    if ((warps + quarters - 1) / quarters * quarters * of_warp > registers) return 0;
    const int by_registers = registers / quarters / of_warp * quarters / warps;
    const int by_shared = static_cast<int>(gpu.shared / (block.shared + driver_shared));
    const int most = std::min({gpu.blocks, gpu.threads / 32 / warps, by_registers, by_shared});
    return gpu.barriers == 0 ? most : std::min(most, gpu.barriers / std::max(block.barriers, 1));
}

}  // namespace vimcore::shim
