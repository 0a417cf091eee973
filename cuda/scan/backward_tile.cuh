// SPDX-License-Identifier: Apache-2.0
// One tile of the tuned scan's gradient (see scan/backward_tuned.cuh) in shared memory, and everything that happens to
// it but the recurrence: q to float, delta, the gradient of y, what follows from the sums over states, the dt
// projection. Outside the recurrence a thread has two neighbouring channels and `deep` tokens in the order of the scan.
#pragma once

#include "core/device_scratch.h"
#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

inline constexpr int back_threads = device_scratch::back_threads;  // of a direction
inline constexpr int back_warps = back_threads / device::warp_size;

// Byte offsets of one direction's arrays in shared memory; those that depend on the rank come last.
struct BackLayout {
    int delta, du, decay, gy, y, BC, starts, terms, rows, dt, weight, totals, bytes;
};

// What follows from N states and T; a thread of the recurrence has C channels x S states, `step` tokens in registers.
template <class T_, int N>
struct BackShape {
    using T = T_;
    static constexpr int states = N, C = 2, S = 4, tile = 16, step = 4;
    static constexpr int pitch = tile + 4;  // floats from channel to channel: aligned by 16 bytes, no bank conflicts
    static constexpr int lanes = N / S;     // that share a channel
    static constexpr int slots = back_threads / lanes, channels = slots * C;  // of a block
    static constexpr int array = channels * pitch;
    static constexpr int pairs = channels / 2, deep = tile / (back_threads / pairs), vector = deep < 4 ? deep : 4;
    static_assert(deep > 0 && tile % (vector * (back_threads / pairs)) == 0);

    // What the lanes of a warp add to dB and dC of `round` tokens, [token][dB, dC][lane][S]; no bank conflicts.
    static constexpr int round = 2, terms_which = device::warp_size * S + 16, terms = round * 2 * terms_which;

    // Neighbouring channels lie half the tile apart: lanes that each write two of them touch all banks.
    __device__ static int row_of(int pair, int k) { return pair + k * pairs; }
    __device__ static int channel_of(int row) { return 2 * (row % pairs) + row / pairs; }

    __host__ __device__ static constexpr BackLayout layout(int rank)
    {
        BackLayout at{};
        at.delta = 0;
        at.du = at.delta + array * 4;
        at.decay = at.du + array * 4;
        at.gy = at.decay + array * 4;
        at.y = at.gy + array * 4;
        at.BC = at.y + array * 4;
        at.starts = at.BC + tile * 2 * N * 4;
        at.terms = at.starts + (tile / step - 1) * back_threads * C * S * 4;
        at.rows = at.terms + back_warps * terms * 4;
        at.dt = at.rows + back_warps * tile * 2 * N * 4;
        at.weight = at.dt + rank * pitch * 4;
        at.totals = at.weight + (rank + 2) * channels * 4;
        at.bytes = at.totals + (rank + 2) * channels * 4;
        return at;
    }
};

// The shared arrays of one direction, in the order of the scan.
template <class Shape>
struct BackTile {
    device::Shared<float> delta;   // [channel][token]; later draw
    device::Shared<float> du;      // [channel][token] delta u, later sum_n B lambda; behind it `decay`,
                                   // sum_n A a h[t - 1] lambda
    device::Shared<float> gy, y;   // [channel][token]; gy later gy u
    device::Shared<float> BC;      // [token][B (N) | C (N)]
    device::Shared<float> starts;  // [step][channel of a thread][thread][S] states before all steps but the last
    device::Shared<float> terms;   // [warp][...]
    device::Shared<float> rows;    // [warp][token][dB (N) | dC (N)]: sums over the warp's channels
    device::Shared<float> dt;      // [r][token]
    device::Shared<float> weight;  // [r][channel], then a row of dt_bias and one of D
    device::Shared<float> totals;  // [r][channel] ddt_weight, then ddt_bias and dD

    __device__ BackTile(const BackLayout& at, int base, int rank)
        : delta(device::shared<float>(base + at.delta, Shape::array)),
          du(device::shared<float>(base + at.du, 2 * Shape::array)),
          gy(device::shared<float>(base + at.gy, Shape::array)),
          y(device::shared<float>(base + at.y, Shape::array)),
          BC(device::shared<float>(base + at.BC, Shape::tile * 2 * Shape::states)),
          starts(device::shared<float>(base + at.starts,
                                       (Shape::tile / Shape::step - 1) * back_threads * Shape::C * Shape::S)),
          terms(device::shared<float>(base + at.terms, back_warps * Shape::terms)),
          rows(device::shared<float>(base + at.rows, back_warps * Shape::tile * 2 * Shape::states)),
          dt(device::shared<float>(base + at.dt, rank * Shape::pitch)),
          weight(device::shared<float>(base + at.weight, (rank + 2) * Shape::channels)),
          totals(device::shared<float>(base + at.totals, (rank + 2) * Shape::channels))
    {
    }
};

// A tile's tokens: `count`, the scan starts at `first`, `way` is +1 or -1.
struct BackRows {
    int first, count, way;
    __device__ int natural(int s) const { return first + way * s; }
};

__device__ __forceinline__ BackRows back_rows(int index, int tile, int tokens, bool reverse)
{
    const int begin = index * tile, count = tokens - begin < tile ? tokens - begin : tile;
    return {reverse ? begin + count - 1 : begin, count, reverse ? -1 : 1};
}

// What a thread has of a tile outside the recurrence: channels 2 pair and 2 pair + 1, tokens from s0 on, `count` of
// them in the sequence. place: its first element of a tensor (B, len, E); step: elements from token to token.
struct BackPart {
    int pair, s0, count, step;
    Index place;
};

// A thread's part of a tensor, from its first element on; zeros beyond the last token.
template <int deep, class V>
__device__ __forceinline__ void load_part(const V* from, int step, int count, float (&x)[2][deep])
{
    if (count >= deep) {
#pragma unroll
        for (int s = 0; s < deep; s++, from += step) {
            const device::Vec<V, 2> pair = device::load<2>(from);
            x[0][s] = device::to_float(pair[0]);
            x[1][s] = device::to_float(pair[1]);
        }
    } else {
#pragma unroll
        for (int s = 0; s < deep; s++, from += step) {
            x[0][s] = x[1][s] = 0.0f;
            if (s >= count) continue;
            x[0][s] = device::to_float(from[0]);
            x[1][s] = device::to_float(from[1]);
        }
    }
}
template <int deep, class V>
__device__ __forceinline__ void store_part(V* to, int step, int count, const float (&x)[2][deep])
{
#pragma unroll
    for (int s = 0; s < deep; s++, to += step)
        if (s < count)
            device::store(to, device::Vec<V, 2>{{device::from_float<V>(x[0][s]), device::from_float<V>(x[1][s])}});
}

// ---- q to float ----------------------------------------------------------------------------------------------------

// From the rows of q of one image, of `row` elements, to dt and BC, W columns at a time; zeros beyond the last token.
template <int W, class Shape>
__device__ __forceinline__ void back_load_q(const BackTile<Shape>& tile, const typename Shape::T* q, int rank, int row,
                                            const BackRows& rows, int thread)
{
    constexpr int K = Shape::tile, N = Shape::states, parts = 2 * N / W;
    auto load = [&](int s, int column) {
        device::Vec<float, W> to{};
        if (s >= rows.count) return to;
        const auto from = device::load<W>(q + static_cast<Index>(rows.natural(s)) * row + column);
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = device::to_float(from[i]);
        return to;
    };
#pragma unroll 1
    for (int i = thread; i < K * (rank / W); i += back_threads) {
        const int s = i % K, r = i / K * W;
        const auto x = load(s, r);
#pragma unroll
        for (int k = 0; k < W; k++) tile.dt[(r + k) * Shape::pitch + s] = x[k];
    }
#pragma unroll 2
    for (int i = thread; i < K * parts; i += back_threads) {
        const int s = i / parts, c = i % parts * W;
        tile.BC.template store<W>(s * 2 * N + c, load(s, rank + c));
    }
}

// ---- delta ---------------------------------------------------------------------------------------------------------

// delta and delta u, from u and the tile's dt.
template <class Shape>
__device__ __forceinline__ void back_delta(const BackTile<Shape>& tile, const typename Shape::T* u, int rank,
                                           const BackPart& own)
{
    constexpr int deep = Shape::deep, channels = Shape::channels, vector = Shape::vector;
    float in[2][deep], x[2][deep];
    load_part(u + own.place, own.step, own.count, in);
    const auto bias = tile.weight.template load<2>(rank * channels + 2 * own.pair);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) x[k][s] = bias[k];
#pragma unroll 4
    for (int r = 0; r < rank; r++) {
        const auto weight = tile.weight.template load<2>(r * channels + 2 * own.pair);
#pragma unroll
        for (int s = 0; s < deep; s += vector) {
            const auto dt = tile.dt.template load<vector>(r * Shape::pitch + own.s0 + s);
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int i = 0; i < vector; i++) x[k][s + i] = fmaf(weight[k], dt[i], x[k][s + i]);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) x[k][s] = device::softplus(x[k][s]);
    if (own.count < deep) {
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int s = 0; s < deep; s++)
                if (s >= own.count) x[k][s] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s += vector) {
            const int at = Shape::row_of(own.pair, k) * Shape::pitch + own.s0 + s;
            device::Vec<float, vector> delta, du;
#pragma unroll
            for (int i = 0; i < vector; i++) {
                delta[i] = x[k][s + i];
                du[i] = x[k][s + i] * in[k][s + i];
            }
            tile.delta.template store<vector>(at, delta);
            tile.du.template store<vector>(at, du);
        }
}

// gy = scale silu(z) dout. z: this thread's first element; its rows are twice as long.
template <class Shape>
__device__ __forceinline__ void back_gy(const BackTile<Shape>& tile, const typename Shape::T* z,
                                        const typename Shape::T* dout, float scale, const BackPart& own)
{
    constexpr int deep = Shape::deep, vector = Shape::vector;
    float gate[2][deep], in[2][deep];
    load_part(z, 2 * own.step, own.count, gate);
    load_part(dout + own.place, own.step, own.count, in);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s += vector) {
            device::Vec<float, vector> gy;
#pragma unroll
            for (int i = 0; i < vector; i++) gy[i] = scale * in[k][s + i] * device::silu(gate[k][s + i]);
            tile.gy.template store<vector>(Shape::row_of(own.pair, k) * Shape::pitch + own.s0 + s, gy);
        }
}

// ---- after the recurrence ------------------------------------------------------------------------------------------

// Slope of softplus, 1 - e^-delta, where its value is delta; accurate however small that is.
__device__ __forceinline__ float softplus_slope(float delta)
{
    float p = fmaf(delta, -1.0f / 720.0f, 1.0f / 120.0f);
    p = fmaf(delta, p, -1.0f / 24.0f);
    p = fmaf(delta, p, 1.0f / 6.0f);
    p = fmaf(delta, p, -0.5f);
    p = fmaf(delta, p, 1.0f);
    return delta < 0.25f ? delta * p : 1.0f - device::exp2(-device::log2e * delta);
}

// du to memory; draw and gy u to shared memory; y with its skip to `y`.
template <class Shape>
__device__ __forceinline__ void back_finish(const BackTile<Shape>& tile, const typename Shape::T* u,
                                            typename Shape::T* du, int rank, const BackPart& own,
                                            float (&y)[2][Shape::deep])
{
    constexpr int deep = Shape::deep, vector = Shape::vector;
    constexpr float ln2 = 0.69314718055994531f;
    const auto D = tile.weight.template load<2>((rank + 1) * Shape::channels + 2 * own.pair);
    float in[2][deep], out[2][deep];
    load_part(u + own.place, own.step, own.count, in);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s += vector) {
            const int at = Shape::row_of(own.pair, k) * Shape::pitch + own.s0 + s;
            const auto delta = tile.delta.template load<vector>(at), gy = tile.gy.template load<vector>(at);
            const auto lambda_B = tile.du.template load<vector>(at);
            const auto lambda_A = tile.du.template load<vector>(Shape::array + at);
            const auto sum = tile.y.template load<vector>(at);
            device::Vec<float, vector> draw, gyu;
#pragma unroll
            for (int i = 0; i < vector; i++) {
                const float x = in[k][s + i];
                draw[i] = softplus_slope(delta[i]) * fmaf(x, lambda_B[i], ln2 * lambda_A[i]);
                gyu[i] = gy[i] * x;
                out[k][s + i] = fmaf(delta[i], lambda_B[i], D[k] * gy[i]);
                y[k][s + i] = fmaf(D[k], x, sum[i]);
            }
            tile.delta.template store<vector>(at, draw);
            tile.gy.template store<vector>(at, gyu);
        }
    store_part(du + own.place, own.step, own.count, out);
}

// The gated output and the gradient of the gate, from y of both directions. z, dz: this thread's first elements.
template <class Shape>
__device__ __forceinline__ void back_gate(const typename Shape::T* z, const typename Shape::T* dout,
                                          typename Shape::T* out, typename Shape::T* dz, float scale,
                                          const BackPart& own, float (&y)[2][Shape::deep])
{
    constexpr int deep = Shape::deep;
    float gate[2][deep], in[2][deep];
    load_part(z, 2 * own.step, own.count, gate);
    load_part(dout + own.place, own.step, own.count, in);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) {
            const float total = scale * y[k][s], slope = device::sigmoid(gate[k][s]), open = gate[k][s] * slope;
            y[k][s] = total * open;
            gate[k][s] = in[k][s] * total * fmaf(open, 1.0f - slope, slope);
        }
    store_part(out + own.place, own.step, own.count, y);
    store_part(dz, 2 * own.step, own.count, gate);
}

// ---- dt projection -------------------------------------------------------------------------------------------------

// Adds the tile to ddt_weight, ddt_bias and dD, each row of totals by one thread per channel.
template <class Shape>
__device__ __forceinline__ void back_totals(const BackTile<Shape>& tile, int rank, int thread)
{
    constexpr int K = Shape::tile, channels = Shape::channels;
    static_assert(back_threads % channels == 0);
    const int c = thread % channels, at = Shape::row_of(c / 2, c % 2) * Shape::pitch;
    device::Vec<float, 4> draw[K / 4];
#pragma unroll
    for (int s = 0; s < K / 4; s++) draw[s] = tile.delta.template load<4>(at + 4 * s);
#pragma unroll 1
    for (int r = thread / channels; r < rank; r += back_threads / channels) {
        float sum = tile.totals[r * channels + c];
#pragma unroll
        for (int s = 0; s < K / 4; s++) {
            const auto dt = tile.dt.template load<4>(r * Shape::pitch + 4 * s);
#pragma unroll
            for (int i = 0; i < 4; i++) sum = fmaf(draw[s][i], dt[i], sum);
        }
        tile.totals[r * channels + c] = sum;
    }
    if (thread >= channels) return;
    float bias = tile.totals[rank * channels + c], D = tile.totals[(rank + 1) * channels + c];
#pragma unroll
    for (int s = 0; s < K / 4; s++) {
        const auto gyu = tile.gy.template load<4>(at + 4 * s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bias += draw[s][i];
            D += gyu[i];
        }
    }
    tile.totals[rank * channels + c] = bias;
    tile.totals[(rank + 1) * channels + c] = D;
}

// The tile's rows [dB | dC | ddt] of the block's share in dq: dB and dC from the warps, dt through the projection. to:
// the image's first token; rows are `pitch` elements apart, all aligned by 16 bytes.
template <class Shape>
__device__ __forceinline__ void back_rows_out(const BackTile<Shape>& tile, float* to, int rank, int pitch,
                                              const BackRows& rows, int thread)
{
    constexpr int K = Shape::tile, N = Shape::states, groups = K / 4, parts = 2 * N / 4;
#pragma unroll
    for (int i = thread; i < K * parts; i += back_threads) {
        const int s = i / parts, n = i % parts * 4;
        auto sum = tile.rows.template load<4>(s * 2 * N + n);
#pragma unroll
        for (int warp = 1; warp < back_warps; warp++) {
            const auto more = tile.rows.template load<4>((warp * K + s) * 2 * N + n);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += more[j];
        }
        if (s < rows.count) device::store(to + static_cast<Index>(rows.natural(s)) * pitch + n, sum);
    }
    const int s = thread % groups * 4;
    to += static_cast<Index>(rows.natural(s)) * pitch + 2 * N;
#pragma unroll 1
    for (int r = thread / groups; r < rank; r += back_threads / groups) {
        float sum[4] = {};
#pragma unroll 4
        for (int pair = 0; pair < Shape::pairs; pair++) {
            const auto weight = tile.weight.template load<2>(r * Shape::channels + 2 * pair);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const auto draw = tile.delta.template load<4>(Shape::row_of(pair, k) * Shape::pitch + s);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] = fmaf(draw[j], weight[k], sum[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (s + j < rows.count) to[rows.way * j * pitch + r] = sum[j];
    }
}

}  // namespace vimcore::cuda
