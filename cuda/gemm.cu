// SPDX-License-Identifier: Apache-2.0
// y (m, n) = x (m, k) W (n, k)^T + bias, or added to y, `count` problems at fixed distances; x, W T, y T or float, bias
// float, sums float. x may lie in memory as (k, m), W as (k, n).
// Any sizes and leading dimensions; plain rather than fast: it stands in for cuBLASLt and checks it.
// Parallel mapping: a block computes 64 by 64 elements, a thread 4 by 4 of them; slices of 16 along k pass through
// shared memory. An element is one chain of multiply-adds in the order of k, whatever the rows around it.
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Either;
using device::Floats;

constexpr int tile = 64, part = 4, slice = 16, threads = (tile / part) * (tile / part);
constexpr int pitch = tile + 4;  // keeps the stores of a transposed slice off one bank

template <class T>
struct GemmParams {
    const T *x, *w;
    const float* bias;
    Either<T> y;
    Index m, n, k, ldx, ldw, ldy, stride_x, stride_w, stride_y;
    unsigned tiles;  // along m
    bool x_across, w_across, add;
};

// Copies rows [row, row + tile) of columns [k, k + slice) to shared memory, transposed; zeros outside. across: rows and
// columns change places in `from`.
template <class T>
__device__ __forceinline__ void stage(device::Shared<float> to, const T* from, bool across, Index row, Index rows,
                                      Index ld, Index k, Index columns)
{
    for (int i = static_cast<int>(threadIdx.x); i < tile * slice; i += threads) {
        const int r = across ? i % tile : i / slice, c = across ? i / tile : i % slice;
        const bool inside = row + r < rows && k + c < columns;
        const Index at = across ? (k + c) * ld + row + r : (row + r) * ld + k + c;
        to[c * pitch + r] = inside ? device::to_float(from[at]) : 0.0f;
    }
}

template <class T>
__global__ void gemm_kernel(GemmParams<T> p)
{
    const auto xs = device::shared<float>(0, slice * pitch);
    const auto ws = device::shared<float>(slice * pitch * static_cast<int>(sizeof(float)), slice * pitch);
    const Index problem = blockIdx.x / p.tiles, row = static_cast<Index>(blockIdx.x % p.tiles) * tile;
    const Index column = static_cast<Index>(blockIdx.y) * tile;
    const T *x = p.x + problem * p.stride_x, *w = p.w + problem * p.stride_w;
    const int i0 = static_cast<int>(threadIdx.x) / (tile / part) * part;
    const int j0 = static_cast<int>(threadIdx.x) % (tile / part) * part;

    float sum[part][part] = {};
    for (Index k = 0; k < p.k; k += slice) {
        stage(xs, x, p.x_across, row, p.m, p.ldx, k, p.k);
        stage(ws, w, p.w_across, column, p.n, p.ldw, k, p.k);
        device::sync_block();
#pragma unroll
        for (int c = 0; c < slice; c++) {
            const auto xv = xs.template load<part>(c * pitch + i0), wv = ws.template load<part>(c * pitch + j0);
#pragma unroll
            for (int i = 0; i < part; i++)
#pragma unroll
                for (int j = 0; j < part; j++) sum[i][j] = fmaf(xv[i], wv[j], sum[i][j]);
        }
        device::sync_block();
    }
#pragma unroll
    for (int i = 0; i < part; i++)
#pragma unroll
        for (int j = 0; j < part; j++) {
            const Index r = row + i0 + i, c = column + j0 + j, at = problem * p.stride_y + r * p.ldy + c;
            if (r >= p.m || c >= p.n) continue;
            Floats<1> y{{p.bias ? sum[i][j] + p.bias[c] : sum[i][j]}};
            if (p.add) y[0] += p.y.template load<1>(at)[0];
            p.y.template store<1>(at, y);
        }
}

template <class T>
void run(Context& ctx, const GemmArgs& a)
{
    GemmParams<T> p{static_cast<const T*>(a.x),
                    static_cast<const T*>(a.w),
                    a.bias,
                    {a.y, a.y_dtype == DType::f32},
                    a.m,
                    a.n,
                    a.k,
                    a.ldx,
                    a.ldw,
                    a.ldy,
                    a.stride_x,
                    a.stride_w,
                    a.stride_y,
                    static_cast<unsigned>(ceil_div(a.m, tile)),
                    a.x_across,
                    a.w_across,
                    a.add};
    const dim3 grid(static_cast<unsigned>(p.tiles * a.count), static_cast<unsigned>(ceil_div(a.n, tile)));
    VIM_LAUNCH((gemm_kernel<T>), grid, threads, 2 * slice * pitch * sizeof(float), stream_of(ctx), p);
}

}  // namespace

void gemm(Context& ctx, const GemmArgs& args)
{
    if (args.m * args.n * args.count == 0) return;
    dispatch(args.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
