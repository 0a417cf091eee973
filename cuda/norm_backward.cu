// SPDX-License-Identifier: Apache-2.0
// Backward of the normalisation of rows of D elements; statistics are computed again from x.
//   g = weight dout, n = (x - mean) rstd;  dx = rstd (g - n mean(g n) - [layer] mean(g))
//   dresidual = dresidual_out + dx;  dh = row_scale[b] dresidual;  dweight += sum dout n;  dbias += sum dout
// dout, dh (rows, D) T; x, dresidual_out, dresidual (rows, D), weight, dweight, dbias (D) float; len rows per image b.
// Parallel mapping: a block takes a part of the rows, a warp every fourth row of it, a lane every 32nd vector of V
// elements. Rows of up to 32 V M elements stay in registers, and so do a lane's sums for dweight and dbias, which are
// joined over the warps of a block, then over the blocks, in order. Longer rows, and those that have no vectors, take
// two kernels: a warp per row, then a thread per column and part of the rows. dresidual may lie over dresidual_out.
#include <algorithm>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int warps = 4;

template <class T>
struct NormParams {
    const float *x, *row_scale, *weight, *dresidual_out;
    const T* dout;
    float* dresidual;
    T* dh;
    float *dweight, *dbias;  // (parts, D): sums of each part
    float* statistics;       // (rows, 2): mean, rstd; for the columns of long rows
    Index rows, len, dim, part;
    float eps;
};

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % device::warp_size; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / device::warp_size; }

// Writes what a lane has for V elements at offset i; dx: the part that came through the norm.
template <int V, class T>
__device__ __forceinline__ void finish(const NormParams<T>& p, Index i, Floats<V> dx, float scale)
{
    if (p.dresidual_out) {
        const Floats<V> d = device::load_floats<V>(p.dresidual_out + i);
#pragma unroll
        for (int j = 0; j < V; j++) dx[j] += d[j];
    }
    device::store_floats<V>(p.dresidual + i, dx);
    if (!p.dh) return;
#pragma unroll
    for (int j = 0; j < V; j++) dx[j] *= scale;
    device::store_floats<V>(p.dh + i, dx);
}

// Sums over the warps of a block, which are in memory afterwards. M vectors of V elements a lane.
template <int V, int M>
__device__ __forceinline__ void join(const Floats<V> (&sum)[M], float* out, int dim)
{
    constexpr int row = M * V * device::warp_size;
    const auto parts = device::shared<float>(0, warps * row);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < V; j++) parts[warp() * row + (m * device::warp_size + lane()) * V + j] = sum[m][j];
    device::sync_block();
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += warps * device::warp_size) {
        float total = parts[d];
#pragma unroll
        for (int w = 1; w < warps; w++) total += parts[w * row + d];
        out[d] = total;
    }
    device::sync_block();
}

template <class T, int V, int M, bool layer>
__global__ void norm_backward_registers(NormParams<T> p)
{
    const int dim = static_cast<int>(p.dim);
    const float share = 1.0f / static_cast<float>(dim);
    auto column = [&](int m) { return (m * device::warp_size + lane()) * V; };
    Floats<V> weight[M] = {}, dweight[M] = {}, dbias[layer ? M : 1] = {};  // zeros beyond the row
#pragma unroll
    for (int m = 0; m < M; m++)
        if (column(m) < dim) weight[m] = device::load_floats<V>(p.weight + column(m));
    const Index first = blockIdx.x * p.part, end = first + p.part < p.rows ? first + p.part : p.rows;
    for (Index row = first + warp(); row < end; row += warps) {
        const Index base = row * p.dim;
        Floats<V> x[M] = {}, g[M] = {};
#pragma unroll
        for (int m = 0; m < M; m++)
            if (column(m) < dim) x[m] = device::load_floats<V>(p.x + base + column(m));
#pragma unroll
        for (int m = 0; m < M; m++)
            if (column(m) < dim) g[m] = device::load_floats<V>(p.dout + base + column(m));
        float mean = 0, squares = 0;
        if constexpr (layer) {
            float total = 0;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int j = 0; j < V; j++) total += x[m][j];
            mean = device::warp_sum(total) * share;
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < V; j++) {
                x[m][j] = column(m) < dim ? x[m][j] - mean : 0.0f;
                squares = fmaf(x[m][j], x[m][j], squares);
            }
        const float rstd = 1.0f / sqrtf(device::warp_sum(squares) * share + p.eps);
        float along = 0, total = 0;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < V; j++) {
                x[m][j] *= rstd;
                dweight[m][j] = fmaf(g[m][j], x[m][j], dweight[m][j]);
                if constexpr (layer) dbias[m][j] += g[m][j];
                g[m][j] *= weight[m][j];
                along = fmaf(g[m][j], x[m][j], along);
                if constexpr (layer) total += g[m][j];
            }
        along = device::warp_sum(along) * share;
        if constexpr (layer) total = device::warp_sum(total) * share;
        const float scale = p.row_scale ? p.row_scale[row / p.len] : 1.0f;
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (column(m) >= dim) continue;
#pragma unroll
            for (int j = 0; j < V; j++) g[m][j] = rstd * (g[m][j] - fmaf(x[m][j], along, total));
            finish<V>(p, base + column(m), g[m], scale);
        }
    }
    if (p.dweight) join<V, M>(dweight, p.dweight + blockIdx.x * p.dim, dim);
    if constexpr (layer)
        if (p.dbias) join<V, M>(dbias, p.dbias + blockIdx.x * p.dim, dim);
}

template <class T, bool layer>
__global__ void norm_backward_rows(NormParams<T> p)
{
    const Index row = static_cast<Index>(blockIdx.x) * warps + warp(), base = row * p.dim;
    if (row >= p.rows) return;
    const float share = 1.0f / static_cast<float>(p.dim);
    float mean = 0, squares = 0, along = 0, total = 0;
    if constexpr (layer) {
        for (Index d = lane(); d < p.dim; d += device::warp_size) mean += p.x[base + d];
        mean = device::warp_sum(mean) * share;
    }
    for (Index d = lane(); d < p.dim; d += device::warp_size) {
        const float x = p.x[base + d] - mean;
        squares = fmaf(x, x, squares);
    }
    const float rstd = 1.0f / sqrtf(device::warp_sum(squares) * share + p.eps);
    for (Index d = lane(); d < p.dim; d += device::warp_size) {
        const float g = device::to_float(p.dout[base + d]) * p.weight[d];
        along = fmaf(g, (p.x[base + d] - mean) * rstd, along);
        if constexpr (layer) total += g;
    }
    along = device::warp_sum(along) * share;
    if constexpr (layer) total = device::warp_sum(total) * share;
    const float scale = p.row_scale ? p.row_scale[row / p.len] : 1.0f;
    for (Index d = lane(); d < p.dim; d += device::warp_size) {
        const float g = device::to_float(p.dout[base + d]) * p.weight[d];
        finish<1>(p, base + d, {{rstd * (g - fmaf((p.x[base + d] - mean) * rstd, along, total))}}, scale);
    }
    if (p.statistics && lane() == 0) {
        p.statistics[2 * row] = mean;
        p.statistics[2 * row + 1] = rstd;
    }
}

template <class T>
__global__ void norm_backward_columns(NormParams<T> p)
{
    const Index d = static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (d >= p.dim) return;
    const Index first = blockIdx.x * p.part, end = first + p.part < p.rows ? first + p.part : p.rows;
    float weight = 0, bias = 0;
    for (Index row = first; row < end; row++) {
        const float g = device::to_float(p.dout[row * p.dim + d]);
        const float n = (p.x[row * p.dim + d] - p.statistics[2 * row]) * p.statistics[2 * row + 1];
        weight = fmaf(g, n, weight);
        bias += g;
    }
    if (p.dweight) p.dweight[blockIdx.x * p.dim + d] = weight;
    if (p.dbias) p.dbias[blockIdx.x * p.dim + d] = bias;
}

template <class T, bool layer>
void run(Context& ctx, const NormBackward& a)
{
    Arena::Scope scope(arena_of(ctx));
    NormParams<T> p{};
    p.x = a.x.as<float>();
    p.row_scale = a.row_scale.as<float>();
    p.weight = a.weight.as<float>();
    p.dresidual_out = a.dresidual_out.as<float>();
    p.dout = a.dout.as<T>();
    p.dresidual = a.dresidual.as<float>();
    p.dh = a.dh.as<T>();
    p.rows = a.x.size(0) * a.x.size(1);
    p.len = a.x.size(1);
    p.dim = a.x.size(2);
    p.eps = static_cast<float>(a.eps);
    const device_scratch::NormSums own = device_scratch::norm_sums(ctx, a);
    static_assert(warps == device_scratch::norm_rows);
    const Index parts = own.parts;
    p.part = own.part;
    p.dweight = own.dweight.template as<float>();
    p.dbias = own.dbias.template as<float>();
    p.statistics = own.statistics.template as<float>();

    constexpr int V = full_vector<T>, vector = device::warp_size * V;
    const cudaStream_t stream = stream_of(ctx);
    const Index vectors = ceil_div(p.dim, vector);
    if (own.registers) {
        select<1, 2, 3, 4, 6, 8>(vectors == 5   ? 6
                                 : vectors == 7 ? 8
                                                : vectors,
                                 [&](auto m) {
                                     if constexpr (m() * V <= 32)
                                         VIM_LAUNCH((norm_backward_registers<T, V, m(), layer>),
                                                    static_cast<unsigned>(parts), warps * device::warp_size,
                                                    warps * m() * vector * sizeof(float), stream, p);
                                 });
    } else {
        VIM_LAUNCH((norm_backward_rows<T, layer>), static_cast<unsigned>(ceil_div(p.rows, warps)),
                   warps * device::warp_size, 0, stream, p);
        constexpr int columns = 128;
        const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(p.dim, columns)));
        if (p.statistics) VIM_LAUNCH((norm_backward_columns<T>), grid, columns, 0, stream, p);
    }
    const ColumnSum sums[] = {{own.dweight, a.dweight}, {own.dbias, a.dbias}};
    sum_columns(ctx, sums);
}

}  // namespace

void norm_backward(Context& ctx, const NormBackward& args)
{
    dispatch(args.dout.dtype, [&](auto t) {
        using T = decltype(t);
        args.kind == Norm::layer ? run<T, true>(ctx, args) : run<T, false>(ctx, args);
    });
}

}  // namespace vimcore::cuda
