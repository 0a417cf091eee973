// SPDX-License-Identifier: Apache-2.0
// Host side of every CUDA call: errors with call, file and line; kernels start through VIM_LAUNCH and nothing else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace vimcore::cuda {

using Index = std::int64_t;

__host__ __device__ constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// What to do about cudaErrorInitializationError.
inline constexpr const char* forked_remedy =
    ": a process that used CUDA was forked, and the child cannot use it; start processes by \"spawn\" or "
    "\"forkserver\"";

// Throws vimcore::Error unless status is cudaSuccess.
void check(cudaError_t status, const char* call, const char* file, int line);
#define VIM_CUDA(call) ::vimcore::cuda::check((call), #call, __FILE__, __LINE__)

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream()); }

// After a launch: reports its error, or that of an earlier kernel, with both names. VIMCORE_CUDA_SYNC=1 waits for every
// kernel, so that the one that fails is the one named.
void after_launch(cudaError_t status, const char* kernel, const char* file, int line, cudaStream_t stream);
// Lets `kernel` use more than the 48 KiB of shared memory that every device grants.
void allow_shared_memory(const void* kernel, std::size_t bytes);

template <class... P, class... A>
void launch(const char* name, const char* file, int line, void (*kernel)(P...), dim3 grid, dim3 block,
            std::size_t shared, cudaStream_t stream, A&&... args)
{
    if (shared > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), shared);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    after_launch(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...), name, file, line, stream);
}

// VIM_LAUNCH((kernel<T, 4>), grid, block, bytes of dynamic shared memory, stream, arguments...)
#define VIM_LAUNCH(kernel, grid, block, shared, stream, ...) \
    ::vimcore::cuda::launch(#kernel, __FILE__, __LINE__, kernel, grid, block, shared, stream, __VA_ARGS__)

// The calling thread's current device, set for a while.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = -1;  // -1: was set already
};

// Calls f(T{}) with the device's type for dtype: float, __half or __nv_bfloat16.
template <class F>
void dispatch(DType dtype, F&& f)
{
    if (dtype == DType::bf16)
        f(__nv_bfloat16{});
    else if (dtype == DType::f16)
        f(__half{});
    else
        f(float{});
}

// Calls f(std::integral_constant<int, n>{}) for the n of the list that equals value; false if none does.
template <int... n, class F>
bool select(Index value, F&& f)
{
    return ((value == n && (f(std::integral_constant<int, n>{}), true)) || ...);
}

}  // namespace vimcore::cuda
