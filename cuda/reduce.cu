// SPDX-License-Identifier: Apache-2.0
// Sums over rows, for gradients of parameters: out[j] += sum_i x[i, j]; x (rows, columns) T, out (columns) float.
// Parallel mapping: a block per 32 columns and chunk of rows; its warps take every eighth row, a lane a column. Partial
// sums are joined in the order of the warps; those of several chunks are rows again, until one chunk is left. Up to
// four sums over equally many rows share a launch.
#include <algorithm>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "device.cuh"

namespace vimcore::cuda {

namespace {

constexpr int warps = 8;
constexpr Index chunk_rows = device_scratch::chunk_rows;
constexpr std::size_t most = device_scratch::most_sums;

template <class T>
struct SumParams {
    const T* x[most];
    float* out[most];
    Index columns[most];
    Index rows, chunks;
    bool add;
};

template <class T>
__global__ void sum_columns_kernel(SumParams<T> p)
{
    const auto parts = device::shared<float>(0, warps * device::warp_size);
    const Index chunk = blockIdx.x % p.chunks, tile = blockIdx.x / p.chunks;
    const int lane = static_cast<int>(threadIdx.x) % device::warp_size;
    const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
    const Index columns = p.columns[blockIdx.y], column = tile * device::warp_size + lane;
    if (tile * device::warp_size >= columns) return;
    const Index end = chunk == p.chunks - 1 ? p.rows : (chunk + 1) * chunk_rows;
    float sum = 0;
    if (column < columns) {
        const T* x = p.x[blockIdx.y] + column;
#pragma unroll 4
        for (Index row = chunk * chunk_rows + warp; row < end; row += warps) sum += device::to_float(x[row * columns]);
    }
    parts[static_cast<int>(threadIdx.x)] = sum;
    device::sync_block();
    if (warp > 0 || column >= columns) return;
#pragma unroll
    for (int w = 1; w < warps; w++) sum += parts[w * device::warp_size + lane];
    float* const out = p.out[blockIdx.y] + chunk * columns + column;
    *out = p.add ? *out + sum : sum;
}

// Into `rest`, or to `out` where there is one chunk.
template <class T>
void run(Context& ctx, std::span<const ColumnSum> sums, std::span<const ColumnSum> rest, Index chunks)
{
    SumParams<T> p{};
    p.rows = sums[0].x.size(0);
    p.chunks = chunks;
    p.add = p.chunks == 1;
    Index widest = 0;
    for (std::size_t i = 0; i < sums.size(); i++) {
        p.x[i] = sums[i].x.template as<T>();
        p.columns[i] = sums[i].x.size(1);
        p.out[i] = (p.add ? sums[i].out : rest[i].x).template as<float>();
        widest = std::max(widest, p.columns[i]);
    }
    if (widest == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(widest, device::warp_size) * p.chunks),
                    static_cast<unsigned>(sums.size()));
    VIM_LAUNCH((sum_columns_kernel<T>), grid, warps * device::warp_size, warps * device::warp_size * sizeof(float),
               stream_of(ctx), p);
}

}  // namespace

void sum_columns(Context& ctx, std::span<const ColumnSum> sums)
{
    device_scratch::sum_columns(
        ctx, sums, [&](std::span<const ColumnSum> wanted, std::span<const ColumnSum> rest, Index chunks) {
            dispatch(wanted[0].x.dtype, [&](auto t) { run<decltype(t)>(ctx, wanted, rest, chunks); });
        });
}

}  // namespace vimcore::cuda
