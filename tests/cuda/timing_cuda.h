// SPDX-License-Identifier: Apache-2.0
// How long a device takes, for the programs that print it.
#pragma once

#include "launch.h"
#include "vimcore/context.h"

namespace vimcore::test {

// Microseconds of one of `count` calls in a row, after `before` others; 0 without a device.
template <class F>
double microseconds([[maybe_unused]] Context& ctx, [[maybe_unused]] int before, [[maybe_unused]] int count,
                    [[maybe_unused]] F&& call)
{
#ifdef VIMCORE_SHIM
    return 0;
#else
    cudaEvent_t begin{}, end{};
    VIM_CUDA(cudaEventCreate(&begin));
    VIM_CUDA(cudaEventCreate(&end));
    for (int i = 0; i < before; i++) call();
    VIM_CUDA(cudaEventRecord(begin, cuda::stream_of(ctx)));
    for (int i = 0; i < count; i++) call();
    VIM_CUDA(cudaEventRecord(end, cuda::stream_of(ctx)));
    VIM_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    VIM_CUDA(cudaEventElapsedTime(&ms, begin, end));
    VIM_CUDA(cudaEventDestroy(begin));
    VIM_CUDA(cudaEventDestroy(end));
    return 1e3 * static_cast<double>(ms) / count;
#endif
}

}  // namespace vimcore::test
