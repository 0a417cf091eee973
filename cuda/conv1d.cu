// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution of K taps, bias and optional SiLU.
//   forward  u[t] = silu(bias + sum_k w[k] x[t - K + 1 + k])
//   reverse  u[t] = silu(bias + sum_k w[k] x[t + K - 1 - k])
// x (B, L, E of `stride` elements) T, zero outside the sequence; u (B, T, E) T; w (E, K), bias (E) float.
// Parallel mapping: a thread takes C neighbouring channels of a chunk of tokens and walks through it with the inputs of
// the taps in registers; where both directions are wanted it reads x once and writes both, the reverse one K - 1 tokens
// behind the forward one, so that both take the same inputs. Consecutive threads take consecutive channels. Every u is
// summed in the order of k, however tokens are cut.
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int single_group = 4;  // tokens read ahead
template <class T>
constexpr int both_group = sizeof(T) == 2 ? 4 : 2;  // those of both directions: as much memory in either
constexpr int max_block = 128, max_chunk = 32;
// Blocks of a multiprocessor that registers must be left for: 96 of a thread, so that 128 images of 224 px run at a
// time.
constexpr int least_blocks = 5;

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

template <int C, class T>
__device__ __forceinline__ Floats<C> unpack(const device::Vec<T, C>& from)
{
    const device::Vec<float, C> x = device::to_floats(from);
    Floats<C> to;
#pragma unroll
    for (int c = 0; c < C; c++) to[c] = x[c];
    return to;
}

// K known to the compiler; one direction, or (Passes = 2) both. The window holds the tokens t - K + 1 .. t of a group's
// first token t and those that follow.
template <class T, int C, int K, int Passes>
__global__ void __launch_bounds__(max_block, least_blocks) conv_window(ConvParams<T> p)
{
    using Packed = device::Vec<T, C>;
    constexpr int carried = K - 1, group = Passes == 2 ? both_group<T> : single_group;
    const Place at = place<C>(p);
    if (at.e >= p.dim) return;
    const int way = p.mirrored ? -1 : 1, step = way * static_cast<int>(p.stride), ustep = way * static_cast<int>(p.dim);
    // The token that is read next, and where x ends on either side, as seen from the chunk's first token.
    const T* x = p.x + (at.b * p.len + (p.mirrored ? p.len - 1 - at.first : at.first)) * p.stride + at.e;
    const int before = static_cast<int>(at.first < carried ? at.first : carried);
    const int behind = static_cast<int>(p.len - at.first < 2 * max_chunk ? p.len - at.first : 2 * max_chunk);

    Floats<C> tap[Passes][K], bias[Passes] = {}, window[carried + group];
#pragma unroll
    for (int d = 0; d < Passes; d++) {
        const Floats<C * K> weight = device::load_floats<C * K>(p.pass[d].weight + at.e * K);
#pragma unroll
        for (int c = 0; c < C; c++)
#pragma unroll
            for (int k = 0; k < K; k++) tap[d][k][c] = weight[c * K + k];
        if (p.pass[d].bias) bias[d] = device::load_floats<C>(p.pass[d].bias + at.e);
    }
    // Of token at.first; the reverse direction has its output K - 1 tokens earlier.
    const Index from = at.first - p.begin;
    const Index u = (at.b * p.tokens + (p.mirrored ? p.tokens - 1 - from : from)) * p.dim + at.e;
    T* forward = p.pass[0].u + u;
    T* reverse = Passes == 2 ? p.pass[1].u + u : nullptr;
    auto read = [&](int t, int ahead) {  // ahead of x
        if (t >= -before && t < behind) return device::load<C>(x + ahead * step);
        Packed value;
#pragma unroll
        for (int c = 0; c < C; c++) value[c] = device::from_float<T>(0.0f);
        return value;
    };
#pragma unroll
    for (int i = 0; i < carried; i++) window[i] = unpack<C>(read(i - carried, i - carried));
    Packed next[group];
#pragma unroll
    for (int i = 0; i < group; i++) next[i] = read(i, i);

    // The last chunk goes on until the reverse direction is through as well.
    const int skipped = from < carried ? carried - static_cast<int>(from) : 0;
    const int last = Passes == 2 && from + at.count == p.tokens ? at.count + carried : at.count;
    for (int t = 0; t < last; t += group) {
#pragma unroll
        for (int i = 0; i < group; i++) window[carried + i] = unpack<C>(next[i]);
        x += group * step;
#pragma unroll
        for (int i = 0; i < group; i++) next[i] = read(t + group + i, i);
#pragma unroll
        for (int i = 0; i < group; i++) {
            if (t + i < at.count) {
                Floats<C> sum = bias[0];
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int c = 0; c < C; c++) sum[c] = fmaf(tap[0][k][c], window[i + k][c], sum[c]);
                device::store_floats<C>(forward + i * ustep, activate(sum, p.silu));
            }
            if (Passes == 2 && t + i < last && t + i >= skipped) {
                Floats<C> sum = bias[Passes - 1];
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int c = 0; c < C; c++) sum[c] = fmaf(tap[Passes - 1][k][c], window[i + K - 1 - k][c], sum[c]);
                device::store_floats<C>(reverse + (i - carried) * ustep, activate(sum, p.silu));
            }
        }
        forward += group * ustep;
        if (Passes == 2) reverse += group * ustep;
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
    const Index most = a.x.size(0) * p.tokens * p.dim < (1 << 22) ? 8 : max_chunk;
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
