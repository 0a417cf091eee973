// SPDX-License-Identifier: Apache-2.0
// Backward of the depthwise causal convolution, one direction or both.
//   dp[t] = du[t] silu'(p[t]), p as in conv1d.cu, computed again from x
//   dx[s] = sum_k w[k] dp[s + K - 1 - k] (forward) + sum_k w[k] dp[s - K + 1 + k] (reverse)
//   dw[k] += sum_t dp[t] x[t - K + 1 + k] (forward), dp[t] x[t + K - 1 - k] (reverse);  dbias += sum_t dp[t]
// x, dx (B, L, E of `stride` elements), du (B, L, E) T; w, dw (E, K), bias, dbias (E) float.
// Parallel mapping: a thread takes C neighbouring channels of some chunks of tokens and walks through each with the
// last K values of x and of dp in registers; the reverse direction's dp is K - 1 tokens behind, where it needs the same
// values of x. Values of dp beyond a chunk are computed twice. dw and dbias are summed in registers over a thread's
// chunks, then over the threads that share channels, in order.
#include <algorithm>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int max_block = 128;

template <class T>
struct Direction {
    const float *weight, *bias;
    const T* du;
    float *dweight, *dbias;  // (parts, E, K), (parts, E)
};

// mirrored: time runs backwards, for a reverse pass on its own. A part takes `items` chunks of some images.
template <class T>
struct ConvParams {
    const T* x;
    T* dx;
    Direction<T> pass[2];  // with two: forward, reverse
    Index batch, len, stride, dim, chunks, items, parts;
    int chunk, width;
    bool mirrored, silu;
};

__device__ __forceinline__ float silu_gradient(float p)
{
    const float s = device::sigmoid(p);
    return s * fmaf(p, 1.0f - s, 1.0f);
}

template <class T, int C, int K, int Passes>
__global__ void conv_backward_window(ConvParams<T> p)
{
    const Index part = blockIdx.x, e = (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * C;
    if (e >= p.dim) return;
    const Index step = p.mirrored ? -p.stride : p.stride, du_step = p.mirrored ? -p.dim : p.dim;

    Floats<C> tap[Passes][K], bias[Passes] = {}, dtap[Passes][K] = {}, dbias[Passes] = {};
#pragma unroll
    for (int d = 0; d < Passes; d++) {
#pragma unroll
        for (int i = 0; i < C * K; i += C) {
            const Floats<C> weight = device::load_floats<C>(p.pass[d].weight + e * K + i);
#pragma unroll
            for (int c = 0; c < C; c++) tap[d][(i + c) % K][(i + c) / K] = weight[c];
        }
        if (p.pass[d].bias) bias[d] = device::load_floats<C>(p.pass[d].bias + e);
    }

    const Index end_item = (part + 1) * p.items < p.batch * p.chunks ? (part + 1) * p.items : p.batch * p.chunks;
    for (Index item = part * p.items; item < end_item; item++) {
        const Index b = item / p.chunks, begin = item % p.chunks * p.chunk;
        const Index end = begin + p.chunk < p.len ? begin + p.chunk : p.len;
        const Index first = b * p.len + (p.mirrored ? p.len - 1 : 0);
        const T* x = p.x + first * p.stride + e;
        T* dx = p.dx + first * p.stride + e;
        Floats<C> window[K] = {}, recent[Passes][K] = {};  // x up to t; dp up to t, in reverse up to t - K + 1
#pragma unroll
        for (int i = 1; i < K; i++)
            if (begin - K + i >= 0) window[i] = device::load_floats<C>(x + (begin - K + i) * step);

        for (Index t = begin; t < end + K - 1; t++) {
            const Index s = t - (K - 1);
#pragma unroll
            for (int i = 0; i < K - 1; i++) window[i] = window[i + 1];
            window[K - 1] = t < p.len ? device::load_floats<C>(x + t * step) : Floats<C>{};
#pragma unroll
            for (int d = 0; d < Passes; d++) {
                const Index at = d == 0 ? t : s;
                Floats<C> dp = {};
                if (at >= 0 && at < p.len) {
                    dp = device::load_floats<C>(p.pass[d].du + first * p.dim + e + at * du_step);
                    if (p.silu) {
                        Floats<C> sum = bias[d];
#pragma unroll
                        for (int k = 0; k < K; k++)
#pragma unroll
                            for (int c = 0; c < C; c++)
                                sum[c] = fmaf(tap[d][k][c], window[d == 0 ? k : K - 1 - k][c], sum[c]);
#pragma unroll
                        for (int c = 0; c < C; c++) dp[c] *= silu_gradient(sum[c]);
                    }
                }
                if (at >= begin && at < end) {
#pragma unroll
                    for (int k = 0; k < K; k++)
#pragma unroll
                        for (int c = 0; c < C; c++)
                            dtap[d][k][c] = fmaf(dp[c], window[d == 0 ? k : K - 1 - k][c], dtap[d][k][c]);
#pragma unroll
                    for (int c = 0; c < C; c++) dbias[d][c] += dp[c];
                }
#pragma unroll
                for (int i = 0; i < K - 1; i++) recent[d][i] = recent[d][i + 1];
                recent[d][K - 1] = dp;
            }
            if (s < begin) continue;
            Floats<C> sum = {};
#pragma unroll
            for (int d = 0; d < Passes; d++)
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int c = 0; c < C; c++)
                        sum[c] = fmaf(tap[d][k][c], recent[d][d == 0 ? K - 1 - k : k][c], sum[c]);
            device::store_floats<C>(dx + s * step, sum);
        }
    }

#pragma unroll
    for (int d = 0; d < Passes; d++) {
        if (p.pass[d].dweight) {
#pragma unroll
            for (int i = 0; i < C * K; i += C) {
                Floats<C> weight;
#pragma unroll
                for (int c = 0; c < C; c++) weight[c] = dtap[d][(i + c) % K][(i + c) / K];
                device::store_floats<C>(p.pass[d].dweight + (part * p.dim + e) * K + i, weight);
            }
        }
        if (p.pass[d].dbias) device::store_floats<C>(p.pass[d].dbias + part * p.dim + e, dbias[d]);
    }
}

// Any K, one direction, three kernels: dp (B, L, E) float; dx, which a second direction adds to; dw and dbias of a part
// of all tokens.
template <class T>
__global__ void conv_dp(ConvParams<T> p, float* dp)
{
    const Index i = device::flat_index(), e = i % p.dim, row = i / p.dim, b = row / p.len, t = row % p.len;
    if (b >= p.batch) return;
    float value = device::to_float(p.pass[0].du[i]);
    if (p.silu) {
        float sum = p.pass[0].bias ? p.pass[0].bias[e] : 0.0f;
        for (int k = 0; k < p.width; k++) {
            const Index s = p.mirrored ? t + p.width - 1 - k : t - p.width + 1 + k;
            if (s >= 0 && s < p.len)
                sum =
                    fmaf(p.pass[0].weight[e * p.width + k], device::to_float(p.x[(b * p.len + s) * p.stride + e]), sum);
        }
        value *= silu_gradient(sum);
    }
    dp[i] = value;
}

template <class T>
__global__ void conv_dx(ConvParams<T> p, const float* dp, bool add)
{
    const Index i = device::flat_index(), e = i % p.dim, row = i / p.dim, b = row / p.len, s = row % p.len;
    if (b >= p.batch) return;
    T* dx = p.dx + row * p.stride + e;
    float sum = add ? device::to_float(*dx) : 0.0f;
    for (int k = 0; k < p.width; k++) {
        const Index t = p.mirrored ? s - p.width + 1 + k : s + p.width - 1 - k;
        if (t >= 0 && t < p.len) sum = fmaf(p.pass[0].weight[e * p.width + k], dp[(b * p.len + t) * p.dim + e], sum);
    }
    *dx = device::from_float<T>(sum);
}

template <class T>
__global__ void conv_dweight(ConvParams<T> p, const float* dp)
{
    const Index part = blockIdx.x, e = static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (e >= p.dim) return;
    const Index rows = p.batch * p.len, end = (part + 1) * p.items < rows ? (part + 1) * p.items : rows;
    for (int k = -1; k < p.width; k++) {
        float* const out = k < 0 ? p.pass[0].dbias : p.pass[0].dweight;
        if (!out) continue;
        float sum = 0;
        for (Index row = part * p.items; row < end; row++) {
            const Index t = row % p.len, s = p.mirrored ? t + p.width - 1 - k : t - p.width + 1 + k;
            if (k < 0)
                sum += dp[row * p.dim + e];
            else if (s >= 0 && s < p.len)
                sum = fmaf(dp[row * p.dim + e], device::to_float(p.x[(row - t + s) * p.stride + e]), sum);
        }
        out[k < 0 ? part * p.dim + e : (part * p.dim + e) * p.width + k] = sum;
    }
}

using device_scratch::ConvParts;

// The passes: one, or a forward and a reverse one.
template <class T>
ConvParams<T> params(const Conv1dBackward& a, std::span<const ConvBackwardPass> passes, const ConvParts& parts)
{
    const ConvBackwardPass& first = passes[0];
    ConvParams<T> p = {};
    p.x = a.x.as<T>();
    p.dx = a.dx.as<T>();
    p.batch = a.x.size(0);
    p.len = a.x.size(1);
    p.stride = a.x.size(2);
    p.dim = first.du.size(2);
    p.width = static_cast<int>(first.weight.numel() / p.dim);
    p.mirrored = passes.size() == 1 && first.reverse;
    p.silu = a.silu;
    p.items = parts.items;
    p.parts = parts.parts;
    for (std::size_t i = 0; i < passes.size(); i++) {
        const ConvBackwardPass& pass = passes[i];
        p.pass[i] = {pass.weight.as<float>(), pass.bias.as<float>(), pass.du.as<T>(), parts.dweight[i].as<float>(),
                     parts.dbias[i].as<float>()};
    }
    return p;
}

void join(Context& ctx, std::span<const ConvBackwardPass> passes, const ConvParts& parts)
{
    ColumnSum sums[4];
    for (std::size_t i = 0; i < passes.size(); i++) {
        const Tensor& dweight = passes[i].dweight;
        sums[2 * i] = {parts.dweight[i], dweight ? dweight.view({dweight.numel()}) : Tensor{}};
        sums[2 * i + 1] = {parts.dbias[i], passes[i].dbias};
    }
    sum_columns(ctx, {sums, 2 * passes.size()});
}

template <class T, int Passes>
void run_window(Context& ctx, const Conv1dBackward& a)
{
    constexpr int C = device_scratch::window_channels;
    const std::span<const ConvBackwardPass> passes = a.passes;
    const Index dim = passes[0].du.size(2), width = passes[0].weight.numel() / dim;
    Arena::Scope scope(arena_of(ctx));
    const Index chunk = device_scratch::conv_chunk(a), chunks = ceil_div(a.x.size(1), chunk);
    const ConvParts parts = device_scratch::conv_parts(ctx, passes, a.x.size(0) * chunks);
    ConvParams<T> p = params<T>(a, passes, parts);
    p.chunk = static_cast<int>(chunk);
    p.chunks = chunks;
    const Index threads = dim / C, tiles = ceil_div(threads, max_block);
    const Index block = round_up(ceil_div(threads, tiles), device::warp_size);
    const dim3 grid(static_cast<unsigned>(p.parts), static_cast<unsigned>(ceil_div(threads, block)));
    select<2, 3, 4>(width, [&](auto k) {
        VIM_LAUNCH((conv_backward_window<T, C, k(), Passes>), grid, static_cast<unsigned>(block), 0, stream_of(ctx), p);
    });
    join(ctx, passes, parts);
}

template <class T>
void run_any(Context& ctx, const Conv1dBackward& a, const ConvBackwardPass& pass, bool add)
{
    Arena::Scope scope(arena_of(ctx));
    const Index rows = a.x.size(0) * a.x.size(1);
    const ConvParts parts = device_scratch::conv_parts(ctx, {&pass, 1}, rows);
    const ConvParams<T> p = params<T>(a, {&pass, 1}, parts);
    const Tensor dp = device_scratch::conv_gradient(ctx, a, pass);
    const dim3 flat = flat_grid(rows * p.dim);
    VIM_LAUNCH((conv_dp<T>), flat, flat_block, 0, stream_of(ctx), p, dp.as<float>());
    VIM_LAUNCH((conv_dx<T>), flat, flat_block, 0, stream_of(ctx), p, dp.as<float>(), add);
    if (!pass.dweight && !pass.dbias) return;
    const dim3 grid(static_cast<unsigned>(p.parts), static_cast<unsigned>(ceil_div(p.dim, max_block)));
    VIM_LAUNCH((conv_dweight<T>), grid, max_block, 0, stream_of(ctx), p, dp.as<float>());
    join(ctx, {&pass, 1}, parts);
}

template <class T>
void run(Context& ctx, const Conv1dBackward& a)
{
    if (a.passes.empty() || a.passes[0].du.numel() == 0) return;
    if (device_scratch::conv_has_window(a))
        return a.passes.size() == 1 ? run_window<T, 1>(ctx, a) : run_window<T, 2>(ctx, a);
    for (std::size_t i = 0; i < a.passes.size(); i++) run_any<T>(ctx, a, a.passes[i], i > 0);
}

}  // namespace

void conv1d_backward(Context& ctx, const Conv1dBackward& args)
{
    dispatch(args.x.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
