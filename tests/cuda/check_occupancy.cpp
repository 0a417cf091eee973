// SPDX-License-Identifier: Apache-2.0
// Compares tests/shim/architecture.h with NVIDIA's cuda_occupancy.h, for blocks of every size.
// tests/cuda/compile_all.sh builds and runs it; no GPU takes part.
#include <cuda_occupancy.h>

#include <cstdio>

#include "architecture.h"

using namespace vimcore::shim;

namespace {

int wanted(const Architecture& gpu, const Footprint& block)
{
    cudaOccDeviceProp properties;
    properties.computeMajor = gpu.number / 10;
    properties.computeMinor = gpu.number % 10;
    properties.maxThreadsPerBlock = block_threads;
    properties.maxThreadsPerMultiprocessor = gpu.threads;
    properties.regsPerBlock = properties.regsPerMultiprocessor = registers;
    properties.warpSize = 32;
    properties.sharedMemPerBlock = granted_shared;
    properties.sharedMemPerMultiprocessor = gpu.shared;
    properties.numSms = 1;
    properties.sharedMemPerBlockOptin = gpu.block_shared;
    properties.reservedSharedMemPerBlock = driver_shared;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = block_threads;
    kernel.numRegs = block.registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = gpu.block_shared;
    kernel.numBlockBarriers = block.barriers;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel, &state, block.threads, block.shared);
    return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : 0;
}

}  // namespace

int main()
{
    int compared = 0, differ = 0;
    for (const Architecture& gpu : architectures)
        for (int threads : {1, 32, 64, 96, 128, 192, 256, 288, 384, 512, 768, 1024})
            for (int of_thread = 1; of_thread <= 255; of_thread += of_thread < 16 ? 15 : 7)
                for (int barriers : {1, 2, 3, 8, 16})
                    for (std::size_t shared = 0; shared <= 228 * KiB; shared += 4 * KiB + 512) {
                        const Footprint block{threads, of_thread, barriers, shared};
                        const int ours = resident_blocks(gpu, block), theirs = wanted(gpu, block);
                        compared++;
                        if (ours == theirs || differ++ > 20) continue;
                        std::printf("sm_%d: %d threads of %d registers, %d barriers, %zu bytes: %d blocks, NVIDIA %d\n",
                                    gpu.number, threads, of_thread, barriers, shared, ours, theirs);
                    }
    std::printf("%d footprints of blocks, %d of them with another number of blocks than NVIDIA's header has\n",
                compared, differ);
    return differ ? 1 : 0;
}
