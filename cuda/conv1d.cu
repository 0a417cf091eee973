// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution of K taps, bias and optional SiLU.
//   forward  u[t] = silu(bias + sum_k w[k] x[t - K + 1 + k])
//   reverse  u[t] = silu(bias + sum_k w[k] x[t + K - 1 - k])
// x (B, L, E of `stride` elements) T, zero outside the sequence; u (B, T, E) T; w (E, K), bias (E) float.
// Parallel mapping: a thread takes C neighbouring channels of a chunk of tokens and walks through it with the inputs of
// the taps in registers; where both directions are wanted it reads x once and writes both. Consecutive threads take
// consecutive channels. Every u is summed in the order of k, however tokens are cut.
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int group = 4;  // tokens read ahead
constexpr int max_block = 128;

template <class T>
struct Direction {
    const float *weight, *bias;
    T* u;
};

// A chunk is `chunk` of the `tokens` from `begin`. mirrored: time runs backwards, for a reverse pass on its own.
template <class T>
struct ConvParams {
    const T* x;
    Direction<T> pass[2];  // with two: forward, reverse
    Index len, stride, begin, tokens, dim, chunks;
    int chunk, width;
    bool mirrored, silu;
};

// Where a thread works: image b, tokens [first, first + count) of the walk, channels from e.
struct Place {
    Index b, first, e;
    int count;
};
template <int C, class T>
__device__ __forceinline__ Place place(const ConvParams<T>& p)
{
    const Index b = blockIdx.x / static_cast<unsigned>(p.chunks), chunk = blockIdx.x % static_cast<unsigned>(p.chunks);
    const Index rest = p.tokens - chunk * p.chunk;
    return {b, p.begin + chunk * p.chunk, (static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x) * C,
            static_cast<int>(rest < p.chunk ? rest : p.chunk)};
}

template <int C>
__device__ __forceinline__ Floats<C> activate(Floats<C> p, bool silu)
{
    if (silu)
#pragma unroll
        for (int c = 0; c < C; c++) p[c] = device::silu(p[c]);
    return p;
}

// K known to the compiler. The window holds the tokens t - K + 1 .. t + ahead of a group's first token t.
template <class T, int C, int K, int Passes>
__global__ void conv_window(ConvParams<T> p)
{
    using Packed = device::Vec<T, C>;
    constexpr int ahead = Passes == 2 ? K - 1 : 0, carried = K - 1 + ahead;
    const Place at = place<C>(p);
    if (at.e >= p.dim) return;
    const Index step = p.mirrored ? -p.stride : p.stride, ustep = p.mirrored ? -p.dim : p.dim;
    const T* x = p.x + (at.b * p.len + (p.mirrored ? p.len - 1 : 0)) * p.stride + at.e;

    Floats<C> tap[Passes][K], bias[Passes] = {}, window[carried + group];
    T* u[Passes];
#pragma unroll
    for (int d = 0; d < Passes; d++) {
        const Floats<C * K> weight = device::load_floats<C * K>(p.pass[d].weight + at.e * K);
#pragma unroll
        for (int c = 0; c < C; c++)
#pragma unroll
            for (int k = 0; k < K; k++) tap[d][k][c] = weight[c * K + k];
        if (p.pass[d].bias) bias[d] = device::load_floats<C>(p.pass[d].bias + at.e);
        const Index from = at.first - p.begin;
        u[d] = p.pass[d].u + (at.b * p.tokens + (p.mirrored ? p.tokens - 1 - from : from)) * p.dim + at.e;
    }
    auto read = [&](Index t) {
        Packed value;
        if (t >= 0 && t < p.len) return device::load<C>(x + t * step);
#pragma unroll
        for (int c = 0; c < C; c++) value[c] = device::from_float<T>(0.0f);
        return value;
    };
    auto unpack = [&](const Packed& from) {
        Floats<C> to;
#pragma unroll
        for (int c = 0; c < C; c++) to[c] = device::to_float(from[c]);
        return to;
    };
#pragma unroll
    for (int i = 0; i < carried; i++) window[i] = unpack(read(at.first - (K - 1) + i));
    Packed next[group];
#pragma unroll
    for (int i = 0; i < group; i++) next[i] = read(at.first + ahead + i);

    for (int t = 0; t < at.count; t += group) {
#pragma unroll
        for (int i = 0; i < group; i++) window[carried + i] = unpack(next[i]);
        if (t + group < at.count)
#pragma unroll
            for (int i = 0; i < group; i++) next[i] = read(at.first + t + group + ahead + i);
#pragma unroll
        for (int i = 0; i < group; i++) {
            if (t + i >= at.count) break;
#pragma unroll
            for (int d = 0; d < Passes; d++) {
                Floats<C> sum = bias[d];
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int c = 0; c < C; c++)
                        sum[c] = fmaf(tap[d][k][c], window[d == 0 ? i + k : i + 2 * (K - 1) - k][c], sum[c]);
                device::store_floats<C>(u[d], activate(sum, p.silu));
                u[d] += ustep;
            }
        }
#pragma unroll
        for (int i = 0; i < carried; i++) window[i] = window[i + group];
    }
}

// Any K, one direction; inputs are read again for every tap.
template <class T>
__global__ void conv_any(ConvParams<T> p)
{
    const Place at = place<1>(p);
    if (at.e >= p.dim) return;
    const Index step = p.mirrored ? -p.stride : p.stride;
    const T* x = p.x + (at.b * p.len + (p.mirrored ? p.len - 1 : 0)) * p.stride + at.e;
    const float* weight = p.pass[0].weight + at.e * p.width;
    for (int i = 0; i < at.count; i++) {
        const Index t = at.first + i, from = t - p.begin;
        Floats<1> sum{{p.pass[0].bias ? p.pass[0].bias[at.e] : 0.0f}};
        for (int k = 0; k < p.width; k++) {
            const Index s = t - p.width + 1 + k;
            if (s >= 0) sum[0] = fmaf(weight[k], device::to_float(x[s * step]), sum[0]);
        }
        T* u = p.pass[0].u + (at.b * p.tokens + (p.mirrored ? p.tokens - 1 - from : from)) * p.dim + at.e;
        device::store_floats<1>(u, activate(sum, p.silu));
    }
}

template <class T>
ConvParams<T> params(const Conv1dForward& a, std::span<const ConvForwardPass> passes)
{
    const ConvForwardPass& first = passes[0];
    ConvParams<T> p = {};
    p.x = a.x.as<T>();
    p.len = a.x.size(1);
    p.stride = a.x.size(2);
    p.tokens = first.u.size(1);
    p.dim = first.u.size(2);
    p.width = static_cast<int>(first.weight.numel() / p.dim);
    p.mirrored = passes.size() == 1 && first.reverse;
    p.begin = p.mirrored ? p.len - first.begin - p.tokens : first.begin;
    p.silu = a.silu;
    for (std::size_t i = 0; i < passes.size(); i++)
        p.pass[i] = {passes[i].weight.as<float>(), passes[i].bias.as<float>(), passes[i].u.as<T>()};
    // Long chunks read fewer tokens twice, short ones make more threads of a small batch.
    const Index most = a.x.size(0) * p.tokens * p.dim < (1 << 22) ? 8 : 32;
    p.chunk = static_cast<int>(ceil_div(p.tokens, ceil_div(p.tokens, most)));
    p.chunks = ceil_div(p.tokens, p.chunk);
    return p;
}

struct Blocks {
    dim3 grid, block;
};
template <class T>
Blocks blocks(const ConvParams<T>& p, Index batch, int channels)
{
    const Index threads = ceil_div(p.dim, channels), tiles = ceil_div(threads, max_block);
    const Index size = round_up(ceil_div(threads, tiles), device::warp_size);
    return {dim3(static_cast<unsigned>(batch * p.chunks), static_cast<unsigned>(ceil_div(threads, size))),
            dim3(static_cast<unsigned>(size))};
}

// passes: one, or a forward and a reverse one over the same tokens. False: not for these sizes or addresses.
template <class T, int Passes>
bool run_window(Context& ctx, const Conv1dForward& a, std::span<const ConvForwardPass> passes)
{
    constexpr int C = 4;
    const ConvParams<T> p = params<T>(a, passes);
    if (p.dim % C != 0 || p.stride % C != 0 || !aligned(C, {a.x})) return false;
    for (const ConvForwardPass& pass : passes)
        if (!aligned(C, {pass.weight, pass.bias, pass.u})) return false;
    const Blocks at = blocks(p, a.x.size(0), C);
    return select<2, 3, 4>(p.width, [&](auto k) {
        VIM_LAUNCH((conv_window<T, C, k(), Passes>), at.grid, at.block, 0, stream_of(ctx), p);
    });
}

template <class T>
void run(Context& ctx, const Conv1dForward& a)
{
    const auto same_tokens = [](const ConvForwardPass& f, const ConvForwardPass& r) {
        return !f.reverse && r.reverse && f.begin == r.begin && f.u.shape == r.u.shape &&
               f.weight.numel() == r.weight.numel();
    };
    if (a.passes.size() == 2 && a.passes[0].u.numel() && same_tokens(a.passes[0], a.passes[1]) &&
        run_window<T, 2>(ctx, a, a.passes))
        return;
    for (std::size_t i = 0; i < a.passes.size(); i++) {
        const std::span<const ConvForwardPass> pass = a.passes.subspan(i, 1);
        if (pass[0].u.numel() == 0 || run_window<T, 1>(ctx, a, pass)) continue;
        const ConvParams<T> p = params<T>(a, pass);
        const Blocks at = blocks(p, a.x.size(0), 1);
        VIM_LAUNCH((conv_any<T>), at.grid, at.block, 0, stream_of(ctx), p);
    }
}

}  // namespace

void conv1d_forward(Context& ctx, const Conv1dForward& args)
{
    dispatch(args.x.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
