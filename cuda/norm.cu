// SPDX-License-Identifier: Apache-2.0
// Residual add and normalisation of rows of D elements.
//   x = residual + row_scale[b] h;  residual_out = x;  out = weight (x - mean) rstd + bias   (RMSNorm: mean = 0, no
//   bias) rstd = 1 / sqrt(mean((x - mean)^2) + eps)
// h, out (rows, D) T; residual, residual_out (rows, D), weight, bias (D) float; len rows per image b.
// Parallel mapping: a warp per row, a lane holds every 32nd vector of V elements. Rows of up to 32 V M elements stay in
// registers; longer ones, and those that have no vectors, are read once per pass. Each element is read and written by
// one lane only, so that outputs may be written over inputs.
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int rows_per_block = 4;

// Vectors of V elements that a lane holds of a row of `dim`.
template <int V>
constexpr int vectors(Index dim)
{
    return static_cast<int>((dim + device::warp_size * V - 1) / (device::warp_size * V));
}

// The shortest row that a kernel is made for and that holds dim elements; dim itself where there is none.
Index made_for(Index dim)
{
    for (Index size : {256, 384, 512, 768, 1024})
        if (dim <= size) return size;
    return dim;
}

template <class T>
struct NormParams {
    const T* h;
    const float *row_scale, *residual, *weight, *bias;
    float* residual_out;
    T* out;
    Index rows, len, dim;
    float eps;
    bool layer;
};

template <class T>
__device__ __forceinline__ Index own_row()
{
    return static_cast<Index>(blockIdx.x) * rows_per_block + threadIdx.x / device::warp_size;
}

// V elements of x from i, the offset from the first row.
template <int V, class T>
__device__ __forceinline__ Floats<V> stream(const NormParams<T>& p, Index i, float scale)
{
    Floats<V> x;
    if (p.residual)
        x = device::load_floats<V>(p.residual + i);
    else
#pragma unroll
        for (int j = 0; j < V; j++) x[j] = 0;
    if (p.h) {
        const Floats<V> h = device::load_floats<V>(p.h + i);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] = fmaf(scale, h[j], x[j]);
    }
    return x;
}

template <int V>
__device__ __forceinline__ float sum(const Floats<V>& x)
{
    float total = x[0];
#pragma unroll
    for (int j = 1; j < V; j++) total += x[j];
    return total;
}

template <int V>
__device__ __forceinline__ float sum_squares(const Floats<V>& x, float mean)
{
    float total = 0;
#pragma unroll
    for (int j = 0; j < V; j++) total = fmaf(x[j] - mean, x[j] - mean, total);
    return total;
}

// Writes the V elements of out at column d; i: their offset from the first row.
template <int V, class T>
__device__ __forceinline__ void finish(const NormParams<T>& p, Index i, int d, Floats<V> x, const Floats<V>& weight,
                                       float mean, float rstd)
{
#pragma unroll
    for (int j = 0; j < V; j++) x[j] = (x[j] - mean) * rstd * weight[j];
    if (p.bias) {
        const Floats<V> bias = device::load_floats<V>(p.bias + d);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] += bias[j];
    }
    device::store_floats<V>(p.out + i, x);
}

template <class T, int V, int M>
__global__ void norm_registers(NormParams<T> p)
{
    const Index row = own_row<T>();
    if (row >= p.rows) return;
    const int dim = static_cast<int>(p.dim), first = static_cast<int>(threadIdx.x) % device::warp_size * V;
    const Index base = row * p.dim;
    const float scale = p.row_scale ? p.row_scale[row / p.len] : 1.0f;
    auto column = [&](int m) { return first + m * device::warp_size * V; };
    // All loads come before what waits for one of them, and before the stores, which may be to the same memory.
    Floats<V> x[M] = {}, weight[M] = {};  // zeros beyond the row
    device::Vec<T, V> h[M] = {};
    if (p.residual) {
#pragma unroll
        for (int m = 0; m < M; m++)
            if (column(m) < dim) x[m] = device::load_floats<V>(p.residual + base + column(m));
    }
    if (p.h) {
#pragma unroll
        for (int m = 0; m < M; m++)
            if (column(m) < dim) h[m] = device::load<V>(p.h + base + column(m));
    }
#pragma unroll
    for (int m = 0; m < M; m++)
        if (column(m) < dim) weight[m] = device::load_floats<V>(p.weight + column(m));
    if (p.h) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < V; j++) x[m][j] = fmaf(scale, device::to_float(h[m][j]), x[m][j]);
    }
    if (p.residual_out) {
#pragma unroll
        for (int m = 0; m < M; m++)
            if (column(m) < dim) device::store_floats<V>(p.residual_out + base + column(m), x[m]);
    }
    float mean = 0;
    if (p.layer) {
        float total = 0;
#pragma unroll
        for (int m = 0; m < M; m++) total += sum(x[m]);
        mean = device::warp_sum(total) / static_cast<float>(dim);
    }
    float squares = 0;
#pragma unroll
    for (int m = 0; m < M; m++)
        if (column(m) < dim) squares += sum_squares(x[m], mean);
    const float rstd = 1.0f / sqrtf(device::warp_sum(squares) / static_cast<float>(dim) + p.eps);
#pragma unroll
    for (int m = 0; m < M; m++)
        if (column(m) < dim) finish<V>(p, base + column(m), column(m), x[m], weight[m], mean, rstd);
}

template <class T, int V>
__global__ void norm_loop(NormParams<T> p)
{
    const Index row = own_row<T>();
    if (row >= p.rows) return;
    const int dim = static_cast<int>(p.dim), first = static_cast<int>(threadIdx.x) % device::warp_size * V;
    const Index base = row * p.dim;
    const float scale = p.row_scale ? p.row_scale[row / p.len] : 1.0f;
    // residual_out may lie over residual: what was written is read again
    auto again = [&](int d) {
        return p.residual_out ? device::load_floats<V>(p.residual_out + base + d) : stream<V>(p, base + d, scale);
    };
    float total = 0, squares = 0, mean = 0;
    for (int d = first; d < dim; d += device::warp_size * V) {
        const Floats<V> x = stream<V>(p, base + d, scale);
        if (p.residual_out) device::store_floats<V>(p.residual_out + base + d, x);
        total += sum(x);
        squares += sum_squares(x, 0.0f);
    }
    if (p.layer) {
        mean = device::warp_sum(total) / static_cast<float>(dim);
        squares = 0;
        for (int d = first; d < dim; d += device::warp_size * V) squares += sum_squares(again(d), mean);
    }
    const float rstd = 1.0f / sqrtf(device::warp_sum(squares) / static_cast<float>(dim) + p.eps);
    for (int d = first; d < dim; d += device::warp_size * V)
        finish<V>(p, base + d, d, again(d), device::load_floats<V>(p.weight + d), mean, rstd);
}

template <class T>
void run(Context& ctx, const NormForward& a)
{
    const NormParams<T> p{a.h.as<T>(),
                          a.row_scale.as<float>(),
                          a.residual.as<float>(),
                          a.weight.as<float>(),
                          a.bias.as<float>(),
                          a.residual_out.as<float>(),
                          a.out.as<T>(),
                          a.out.size(0) * a.out.size(1),
                          a.out.size(1),
                          a.out.size(2),
                          static_cast<float>(a.eps),
                          a.kind == Norm::layer};
    if (p.rows * p.dim == 0) return;
    constexpr int V = full_vector<T>;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, rows_per_block)));
    const dim3 block(rows_per_block * device::warp_size);
    const cudaStream_t stream = stream_of(ctx);
    if (p.dim % V != 0 || !aligned(V, {a.h, a.residual, a.weight, a.bias, a.residual_out, a.out}))
        VIM_LAUNCH((norm_loop<T, 1>), grid, block, 0, stream, p);
    else if (!select<vectors<V>(256), vectors<V>(384), vectors<V>(512), vectors<V>(768), vectors<V>(1024)>(
                 vectors<V>(made_for(p.dim)),
                 [&](auto m) { VIM_LAUNCH((norm_registers<T, V, m()>), grid, block, 0, stream, p); }))
        VIM_LAUNCH((norm_loop<T, V>), grid, block, 0, stream, p);
}

}  // namespace

void norm_forward(Context& ctx, const NormForward& args)
{
    dispatch(args.out.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
