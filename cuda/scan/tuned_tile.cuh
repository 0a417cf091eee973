// SPDX-License-Identifier: Apache-2.0
// One tile of the tuned scan (see scan/tuned.cuh) in shared memory, and everything that happens to it but the
// recurrence: copies in, q to float, delta, skip, sum of directions and gate.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

inline constexpr int scan_threads = 64;  // of a direction
inline constexpr int scan_spread = 36;   // floats from token to token where a warp lays out its states

// Byte offsets of one direction's arrays in shared memory; those that depend on the rank come last.
struct TunedLayout {
    int delta, du, BC, u, z, out, spread, dt, weight, q, bytes;
};

// What follows from N states, C channels and S states per thread, and tiles of K tokens.
template <class T, int N, int C, int S, int K>
struct TunedShape {
    static_assert((S == 1 || S % 4 == 0) && N % S == 0 && K % 16 == 0);
    using Type = T;
    static constexpr int states = N, thread_channels = C, thread_states = S, tile = K;
    static constexpr int pitch = K + 4;    // floats from channel to channel: aligned by 16 bytes, no bank conflicts
    static constexpr int C_pitch = N + 4;  // S = 1: floats from token to token of C
    static constexpr int lanes = N / S;    // that share a channel
    static constexpr int channels = scan_threads / lanes * C;  // of a block
    static constexpr int slots = channels / C;

    // Outside the recurrence a thread has `wide` neighbouring channels and `deep` tokens.
    static constexpr int wide = channels >= 32 ? 2 : 1, pairs = channels / wide, deep = K / (scan_threads / pairs);
    static_assert(deep > 0 && deep <= 8);
    static constexpr int vector = deep < 4 ? deep : 4;

    static constexpr int BC_size = S == 1 ? N * pitch + K * C_pitch : K * 2 * N;
    static constexpr int spread_size = S == 1 ? scan_threads / device::warp_size * K * scan_spread : 0;

    // Neighbouring channels lie half the tile apart: lanes that each write two of them touch all banks.
    __device__ static int row_of(int pair, int k) { return pair + k * pairs; }
    __device__ static int channel_of(int row) { return wide * (row % pairs) + row / pairs; }

    __host__ __device__ static constexpr TunedLayout layout(int rank, int row)  // row: of q
    {
        TunedLayout at{};
        const int size = sizeof(T);
        at.delta = 0;
        at.du = at.delta + channels * pitch * 4;
        at.BC = at.du + channels * pitch * 4;
        at.u = at.BC + BC_size * 4;
        at.z = at.u + 2 * K * channels * size;
        at.out = at.z + K * channels * size;
        at.spread = at.out + K * channels * 4;
        at.dt = at.spread + spread_size * 4;
        at.weight = at.dt + rank * pitch * 4;
        at.q = at.weight + (rank + 2) * channels * 4;
        at.bytes = at.q + K * row * size;
        return at;
    }
};

// The shared arrays of one direction. All but q are in the order of the scan.
template <class Shape>
struct TunedTile {
    using T = typename Shape::Type;
    device::Shared<float> delta, du;  // [channel][token]; the recurrence leaves y in du
    device::Shared<float> BC;         // S > 1: [token][B (N) | C (N)]; S = 1: [B's state][token], [token][C's state]
    device::Shared<float> dt;         // [r][token]
    device::Shared<float> weight;     // [r][channel], then a row of dt_bias and one of D
    device::Shared<T> q, u, z;        // [token][...] as they came; u twice
    device::Shared<float> sum;        // [token][channel]: y of the other direction
    device::Shared<float> spread;     // S = 1: [warp][token][lane]

    __device__ TunedTile(const TunedLayout& at, int base, int rank, int row)
        : delta(device::shared<float>(base + at.delta, Shape::channels * Shape::pitch)),
          du(device::shared<float>(base + at.du, Shape::channels * Shape::pitch)),
          BC(device::shared<float>(base + at.BC, Shape::BC_size)),
          dt(device::shared<float>(base + at.dt, rank * Shape::pitch)),
          weight(device::shared<float>(base + at.weight, (rank + 2) * Shape::channels)),
          q(device::shared<T>(base + at.q, Shape::tile * row)),
          u(device::shared<T>(base + at.u, 2 * Shape::tile * Shape::channels)),
          z(device::shared<T>(base + at.z, Shape::tile * Shape::channels)),
          sum(device::shared<float>(base + at.out, Shape::tile * Shape::channels)),
          spread(device::shared<float>(base + at.spread, Shape::spread_size))
    {
    }
};

// ---- copies to shared memory ---------------------------------------------------------------------------------------

// How the threads share the copy of a tile's rows of channels: each takes `part` neighbouring elements of every
// down-th row.
template <class Shape, class V>
struct TunedCopy {
    static constexpr int row_bytes = Shape::channels * static_cast<int>(sizeof(V));
    static constexpr int bytes = row_bytes < 16 ? row_bytes : 16, parts = row_bytes / bytes;
    static constexpr int part = Shape::channels / parts, down = scan_threads / parts;
    static_assert(scan_threads % parts == 0);
    __device__ static int row(int thread) { return thread / parts; }
    __device__ static int channel(int thread) { return thread % parts * part; }
};

// `count` rows, the rest of the tile zeros, and zeros beyond `live` channels. `from`: where this thread begins; rows
// are `row` elements apart.
template <class Shape, class V>
__device__ __forceinline__ void copy_channels(device::Shared<V> to, int at, const V* from, int row, int count, int live,
                                              bool aligned, int thread)
{
    using Copy = TunedCopy<Shape, V>;
    const int first = Copy::row(thread), c = Copy::channel(thread);
    at += first * Shape::channels + c;
    count = c < live ? count - first : 0;
    if (aligned) {
#pragma unroll
        for (int s = 0; s < Shape::tile; s += Copy::down) {
            if (Copy::down <= Shape::tile || first < Shape::tile)
                device::cp_async<Copy::bytes>(to, at + s * Shape::channels, from, s < count);
            from += static_cast<Index>(Copy::down) * row;
        }
    } else {
#pragma unroll 1
        for (int s = 0; s < Shape::tile - first; s += Copy::down) {
#pragma unroll 1
            for (int i = 0; i < Copy::part; i++)
                to[at + s * Shape::channels + i] = s < count && c + i < live ? from[i] : device::from_float<V>(0.0f);
            from += static_cast<Index>(Copy::down) * row;
        }
    }
}

// q of one tile, in its own order: `count` elements, then zeros up to `size`.
template <int bytes, class T>
__device__ __forceinline__ void copy_q_by(device::Shared<T> to, const T* from, int count, int size, int thread)
{
    constexpr int part = bytes / static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int i = thread * part; i < size; i += scan_threads * part) device::cp_async<bytes>(to, i, from + i, i < count);
}

template <class T>
__device__ __forceinline__ void copy_q(device::Shared<T> to, const T* from, int count, int size, int bytes, int thread)
{
    if (bytes == 16)
        copy_q_by<16>(to, from, count, size, thread);
    else if (bytes == 8)
        copy_q_by<8>(to, from, count, size, thread);
    else if (bytes == 4)
        copy_q_by<4>(to, from, count, size, thread);
    else
#pragma unroll 1
        for (int i = thread; i < size; i += scan_threads) to[i] = i < count ? from[i] : device::from_float<T>(0.0f);
}

// ---- q to float ----------------------------------------------------------------------------------------------------

// W columns from c on of token s, of B and C.
template <class Shape, int W>
__device__ __forceinline__ void convert_BC(device::Shared<float> to, int s, int c,
                                           device::Vec<typename Shape::Type, W> from)
{
    constexpr int N = Shape::states;
    device::Vec<float, W> x;
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = device::to_float(from[i]);
    if constexpr (Shape::thread_states > 1) {
        to.store<W>(s * 2 * N + c, x);
    } else if (c < N) {
#pragma unroll
        for (int i = 0; i < W; i++) to[(c + i) * Shape::pitch + s] = x[i];
    } else {
        to.store<W>(N * Shape::pitch + s * Shape::C_pitch + c - N, x);
    }
}

template <int W, class Shape>
__device__ __forceinline__ void convert_q_by(const TunedTile<Shape>& tile, int rank, int row, int count, bool reverse,
                                             int thread)
{
    constexpr int K = Shape::tile, parts = 2 * Shape::states / W;
    auto place = [&](int s) { return (reverse && s < count ? count - 1 - s : s) * row; };  // of token s of the scan
#pragma unroll 1
    for (int i = thread; i < K * (rank / W); i += scan_threads) {
        const int s = i % K, r = i / K * W;
        const auto x = tile.q.template load<W>(place(s) + r);
#pragma unroll
        for (int k = 0; k < W; k++) tile.dt[(r + k) * Shape::pitch + s] = device::to_float(x[k]);
    }
#pragma unroll 2
    for (int i = thread; i < K * parts; i += scan_threads) {
        const int s = i / parts, c = i % parts * W;
        convert_BC<Shape, W>(tile.BC, s, c, tile.q.template load<W>(place(s) + rank + c));
    }
}

template <class Shape>
__device__ __forceinline__ void convert_q(const TunedTile<Shape>& tile, int rank, int row, int count, bool reverse,
                                          int thread)
{
    if (rank % 4 == 0 && row % 4 == 0)
        convert_q_by<4>(tile, rank, row, count, reverse, thread);
    else
        convert_q_by<1>(tile, rank, row, count, reverse, thread);
}

// ---- delta ---------------------------------------------------------------------------------------------------------

template <class Shape>
__device__ __forceinline__ void tile_delta(const TunedTile<Shape>& tile, int u_at, int rank, int count, int thread)
{
    constexpr int wide = Shape::wide, deep = Shape::deep, channels = Shape::channels, vector = Shape::vector;
    const int pair = thread % Shape::pairs, s0 = thread / Shape::pairs * deep;
    float x[wide][deep];
    const auto bias = tile.weight.template load<wide>(rank * channels + wide * pair);
#pragma unroll
    for (int k = 0; k < wide; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) x[k][s] = bias[k];
#pragma unroll 4
    for (int r = 0; r < rank; r++) {
        const auto weight = tile.weight.template load<wide>(r * channels + wide * pair);
#pragma unroll
        for (int s = 0; s < deep; s += vector) {
            const auto dt = tile.dt.template load<vector>(r * Shape::pitch + s0 + s);
#pragma unroll
            for (int k = 0; k < wide; k++)
#pragma unroll
                for (int i = 0; i < vector; i++) x[k][s + i] = fmaf(weight[k], dt[i], x[k][s + i]);
        }
    }
#pragma unroll
    for (int k = 0; k < wide; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) x[k][s] = device::softplus(x[k][s]);
    if (s0 + deep > count) {
#pragma unroll
        for (int k = 0; k < wide; k++)
#pragma unroll
            for (int s = 0; s < deep; s++)
                if (s0 + s >= count) x[k][s] = 0.0f;
    }
#pragma unroll
    for (int s = 0; s < deep; s += vector) {
        device::Vec<float, vector> delta[wide], du[wide];
#pragma unroll
        for (int i = 0; i < vector; i++) {
            const auto u = tile.u.template load<wide>(u_at + (s0 + s + i) * channels + wide * pair);
#pragma unroll
            for (int k = 0; k < wide; k++) {
                delta[k][i] = x[k][s + i];
                du[k][i] = delta[k][i] * device::to_float(u[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < wide; k++) {
            tile.delta.template store<vector>(Shape::row_of(pair, k) * Shape::pitch + s0 + s, delta[k]);
            tile.du.template store<vector>(Shape::row_of(pair, k) * Shape::pitch + s0 + s, du[k]);
        }
    }
}

// ---- skip, sum, gate -----------------------------------------------------------------------------------------------

// Where both directions have just computed the same tile: lays out the other one's y as if it had been copied.
template <class Shape>
__device__ __forceinline__ void tile_meet(const TunedTile<Shape>& tile, const TunedTile<Shape>& other, int u_at,
                                          int rank, int count, int thread)
{
    constexpr int channels = Shape::channels;
#pragma unroll 1
    for (int i = thread; i < channels * count; i += scan_threads) {
        const int c = i % channels, s = i / channels, there = count - 1 - s;  // it counts from the other end
        const float D = other.weight[(rank + 1) * channels + c];
        const float y = other.du[Shape::row_of(c / Shape::wide, c % Shape::wide) * Shape::pitch + there];
        const typename Shape::Type u = other.u[u_at + there * channels + c];
        tile.sum[i] = fmaf(D, device::to_float(u), y);
    }
}

// Where a thread's first channels of the scan's first token go.
template <class T>
struct TunedFinish {
    T* out;
    float* sum;  // in place of out where the other direction is still to come
    int row;     // elements from token to token in both
    bool both;   // add the other direction's y
    bool add;    // add what out holds
    bool finish, aligned;
    float scale;
};

template <class Shape>
__device__ __forceinline__ void tile_finish(const TunedTile<Shape>& tile, int u_at, int rank,
                                            TunedFinish<typename Shape::Type> to, int count, int live, int thread)
{
    constexpr int wide = Shape::wide, deep = Shape::deep, channels = Shape::channels, vector = Shape::vector;
    const int pair = thread % Shape::pairs, c = wide * pair, s0 = thread / Shape::pairs * deep;
    live -= c;
    if (live <= 0) return;
    const auto D = tile.weight.template load<wide>((rank + 1) * channels + c);
    Index place = static_cast<Index>(s0) * to.row;
#pragma unroll 1
    for (int s = s0; s < s0 + deep; s += vector) {
        device::Vec<float, vector> y[wide];
        const int at = s * channels + c;
#pragma unroll
        for (int k = 0; k < wide; k++) y[k] = tile.du.template load<vector>(Shape::row_of(pair, k) * Shape::pitch + s);
#pragma unroll
        for (int i = 0; i < vector; i++) {
            const auto u = tile.u.template load<wide>(u_at + at + i * channels);
#pragma unroll
            for (int k = 0; k < wide; k++) y[k][i] = fmaf(D[k], device::to_float(u[k]), y[k][i]);
        }
        if (to.both) {
#pragma unroll
            for (int i = 0; i < vector; i++) {
                const auto sum = tile.sum.template load<wide>(at + i * channels);
#pragma unroll
                for (int k = 0; k < wide; k++) y[k][i] += sum[k];
            }
        }
        if (to.add) {
#pragma unroll
            for (int i = 0; i < vector; i++)
#pragma unroll
                for (int k = 0; k < wide; k++)
                    if (s + i < count && k < live)
                        y[k][i] += device::to_float(to.out[place + static_cast<Index>(i) * to.row + k]);
        }
        if (to.finish) {
#pragma unroll
            for (int i = 0; i < vector; i++) {
                const auto z = tile.z.template load<wide>(at + i * channels);
#pragma unroll
                for (int k = 0; k < wide; k++) y[k][i] *= to.scale * device::silu(device::to_float(z[k]));
            }
        }
        auto store = [&](auto* out) {
            using V = std::remove_pointer_t<decltype(out)>;
            out += place;
            if (to.aligned) {
#pragma unroll
                for (int i = 0; i < vector; i++) {
                    device::Vec<V, wide> rounded;
#pragma unroll
                    for (int k = 0; k < wide; k++) rounded[k] = device::from_float<V>(y[k][i]);
                    if (s + i < count) device::store(out, rounded);
                    out += to.row;
                }
            } else {
#pragma unroll
                for (int i = 0; i < vector; i++) {
#pragma unroll
                    for (int k = 0; k < wide; k++)
                        if (s + i < count && k < live) out[k] = device::from_float<V>(y[k][i]);
                    out += to.row;
                }
            }
        };
        if (to.sum)
            store(to.sum);
        else
            store(to.out);
        place += static_cast<Index>(vector) * to.row;
    }
}

}  // namespace vimcore::cuda
