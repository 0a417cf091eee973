// SPDX-License-Identifier: Apache-2.0
// One tile of the tuned scan (see scan/tuned.cuh) in shared memory, and everything that happens to it but the
// recurrence and delta (scan/tuned_delta.cuh): copies in, q to float, skip, sum of directions and gate.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

inline constexpr int scan_spread = 36;  // floats from token to token where a warp lays out its states

// Byte offsets of one direction's arrays in shared memory; those that depend on the rank come last.
struct TunedLayout {
    int steps, BC, u, z, sum, spread, dt, weight, bias, D, q, bytes;
};

// What follows from N states, C channels and S states per thread, tiles of K tokens, and P threads of a direction.
// straight: only for both directions of one sum that finish, whole groups of channels and rows by 16 bytes, so that the
// code has no branches for what is not.
template <class T, int N, int C, int S, int K, int P, bool Straight = false>
struct TunedShape {
    static_assert((S == 1 || S % 4 == 0) && N % S == 0 && K % 8 == 0 && P % device::warp_size == 0);
    using Type = T;
    static constexpr int states = N, thread_channels = C, thread_states = S, tile = K, threads = P;
    static constexpr bool straight = Straight;
    static constexpr int pitch = 2 * K + 4;  // floats from channel to channel: aligned by 16 bytes, no bank conflicts
    static constexpr int BC_pitch = K + 4,
                         C_pitch = N + 4;           // S = 1: floats from state to state of B, token to token of C
    static constexpr int lanes = N / S;             // that share a channel
    static constexpr int channels = P / lanes * C;  // of a block
    static constexpr int u_pitch = channels + 16 / sizeof(T);  // elements from token to token of u
    static constexpr int slots = channels / C;

    // In `finish` a thread has `wide` neighbouring channels, a set, and `deep` neighbouring tokens.
    static constexpr int part = channels * K / P, deep = part < 4 ? part : 4, wide = part / deep;
    static constexpr int sets = channels / wide;
    static_assert(wide <= 4 && wide * deep == part && sets * wide == channels && sets * (K / deep) == P);

    // Delta of 16-bit activations is a product of matrices, in rows of 16 channels, whose weights are sums of three
    // bfloat16, exact to 24 bits; the bias is one more column of them, that of 1. The others multiply in float.
    static constexpr bool matrix = sizeof(T) == 2;
    static constexpr int matrices = (channels + 15) / 16, weight_parts = 3, fragment = 4 * device::warp_size;
    static constexpr int dt_pitch = K + 4;  // float: from r to r of dt
    __host__ __device__ static constexpr int ranks(int rank) { return rank / 16 + 1; }

    static constexpr int BC_size = S == 1 ? N * BC_pitch + K * C_pitch : K * 2 * N;
    static constexpr int spread_size = S == 1 ? P / device::warp_size * K * scan_spread : 0;

    // Channels of a set lie far apart: lanes that each access vectors of tokens of several touch all banks.
    __device__ static int row_of(int set, int k) { return set + k * sets; }
    __device__ static int channel_of(int row) { return wide * (row % sets) + row / sets; }
    // Where y of the first of up to four neighbouring tokens lies: in place of deltas that have been used.
    __device__ static int y_of(int row, int s) { return row * pitch + s / 4 * 8 + s % 4; }

    __host__ __device__ static constexpr TunedLayout layout(int rank, int row)  // row: of q
    {
        TunedLayout at{};
        const int size = sizeof(T);
        at.steps = 0;
        at.BC = at.steps + channels * pitch * 4;
        at.u = at.BC + BC_size * 4;
        at.z = at.u + 2 * K * u_pitch * size;
        at.sum = at.z + K * channels * size;
        at.spread = at.sum + K * channels * 4;
        at.dt = at.spread + spread_size * 4;
        at.weight = at.dt + (matrix ? 0 : rank * dt_pitch * 4);
        at.bias = at.weight + (matrix ? weight_parts * ranks(rank) * matrices * fragment : rank * channels) * 4;
        at.D = at.bias + (matrix ? 0 : channels) * 4;
        at.q = at.D + channels * 4;
        at.bytes = at.q + K * row * size;
        return at;
    }
};

// Waits for the threads of a direction, which alone share what is in its arrays; or for all of the block, since of what
// waits for fewer the compiler does not know that warps are together afterwards.
template <class Shape>
__device__ __forceinline__ void sync_direction()
{
    if constexpr (Shape::threads == device::warp_size)
        device::sync_warp();
    else
        device::sync_block();
}

// The shared arrays of one direction. All but q are in the order of the scan.
template <class Shape>
struct TunedTile {
    using T = typename Shape::Type;
    device::Shared<float> steps;   // [channel][token]: delta, delta u; then y (Shape::y_of)
    device::Shared<float> BC;      // S > 1: [token][B (N) | C (N)]; S = 1: [B's state][token], [token][C's state]
    device::Shared<float> dt;      // float: [r][token]
    device::Shared<float> weight;  // float: [r][channel]
    device::Shared<std::uint32_t>
        weights;                    // 16 bits: [part][16 r][16 channels][lane][4 pairs], operands of multiply_add
    device::Shared<float> bias, D;  // [channel]; bias: float
    device::Shared<T> q, u, z;      // [token][...] as they came; u twice
    device::Shared<float> sum;      // [token][channel]: y of the other direction
    device::Shared<float> spread;   // S = 1: [warp][token][lane]

    __device__ TunedTile(const TunedLayout& at, int base, int row)
        : steps(device::shared<float>(base + at.steps, Shape::channels * Shape::pitch)),
          BC(device::shared<float>(base + at.BC, Shape::BC_size)),
          dt(device::shared<float>(base + at.dt, (at.weight - at.dt) / 4)),
          weight(device::shared<float>(base + at.weight, (at.bias - at.weight) / 4)),
          weights(device::shared<std::uint32_t>(base + at.weight, (at.bias - at.weight) / 4)),
          bias(device::shared<float>(base + at.bias, (at.D - at.bias) / 4)),
          D(device::shared<float>(base + at.D, Shape::channels)),
          q(device::shared<T>(base + at.q, Shape::tile * row)),
          u(device::shared<T>(base + at.u, 2 * Shape::tile * Shape::u_pitch)),
          z(device::shared<T>(base + at.z, Shape::tile * Shape::channels)),
          sum(device::shared<float>(base + at.sum, Shape::tile * Shape::channels)),
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
    static constexpr int part = Shape::channels / parts, down = Shape::threads / parts;
    static_assert(Shape::threads % parts == 0);
    __device__ static int row(int thread) { return thread / parts; }
    __device__ static int channel(int thread) { return thread % parts * part; }
};

// `count` rows, the rest of the tile zeros, and zeros beyond `live` channels. `from`: where this thread begins; rows
// are `row` elements apart, `pitch` in shared memory.
template <class Shape, int pitch, class V>
__device__ __forceinline__ void copy_channels(device::Shared<V> to, int at, const V* from, int row, int count, int live,
                                              bool aligned, int thread)
{
    using Copy = TunedCopy<Shape, V>;
    const int first = Copy::row(thread), c = Copy::channel(thread);
    at += first * pitch + c;
    count = Shape::straight || c < live ? count - first : 0;
    if (Shape::straight || aligned) {
#pragma unroll
        for (int s = 0; s < Shape::tile; s += Copy::down) {
            if (Copy::down <= Shape::tile || first < Shape::tile)
                device::cp_async<Copy::bytes>(to, at + s * pitch, from, s < count);
            from += static_cast<Index>(Copy::down) * row;
        }
    } else {
#pragma unroll 1
        for (int s = 0; s < Shape::tile - first; s += Copy::down) {
#pragma unroll 1
            for (int i = 0; i < Copy::part; i++)
                to[at + s * pitch + i] = s < count && c + i < live ? from[i] : device::from_float<V>(0.0f);
            from += static_cast<Index>(Copy::down) * row;
        }
    }
}

// q of one tile, in its own order: `count` elements, then zeros up to `size`.
template <int bytes, int threads, class T>
__device__ __forceinline__ void copy_q_by(device::Shared<T> to, const T* from, int count, int size, int thread)
{
    constexpr int part = bytes / static_cast<int>(sizeof(T)), step = threads * part;
    int i = thread * part;
    if (i < size) device::cp_async<bytes>(to, i, from + i, i < count);
    if (i + step < size) device::cp_async<bytes>(to, i + step, from + i + step, i + step < count);
#pragma unroll 1
    for (i += 2 * step; i < size; i += step) device::cp_async<bytes>(to, i, from + i, i < count);
}

template <class Shape>
__device__ __forceinline__ void copy_q(device::Shared<typename Shape::Type> to, const typename Shape::Type* from,
                                       int count, int size, int bytes, int thread)
{
    if (Shape::straight || bytes == 16)
        copy_q_by<16, Shape::threads>(to, from, count, size, thread);
    else if (bytes == 8)
        copy_q_by<8, Shape::threads>(to, from, count, size, thread);
    else if (bytes == 4)
        copy_q_by<4, Shape::threads>(to, from, count, size, thread);
    else
#pragma unroll 1
        for (int i = thread; i < size; i += Shape::threads)
            to[i] = i < count ? from[i] : device::from_float<typename Shape::Type>(0.0f);
}

// ---- q to float ----------------------------------------------------------------------------------------------------

// Token s of the scan in a tile of `count` that is in its own order.
__device__ __forceinline__ int place_of(int s, int count, bool reverse)
{
    return reverse && s < count ? count - 1 - s : s;
}

// W columns from c on of token s, of B and C.
template <class Shape, int W>
__device__ __forceinline__ void convert_BC(device::Shared<float> to, int s, int c,
                                           device::Vec<typename Shape::Type, W> from)
{
    constexpr int N = Shape::states;
    const auto x = device::to_floats(from);
    if constexpr (Shape::thread_states > 1) {
        to.store<W>(s * 2 * N + c, x);
    } else if (c < N) {
#pragma unroll
        for (int i = 0; i < W; i++) to[(c + i) * Shape::BC_pitch + s] = x[i];
    } else {
        to.store<W>(N * Shape::BC_pitch + s * Shape::C_pitch + c - N, x);
    }
}

template <int W, class Shape>
__device__ __forceinline__ void convert_q_by(const TunedTile<Shape>& tile, int rank, int row, int count, bool reverse,
                                             int thread)
{
    constexpr int K = Shape::tile, parts = 2 * Shape::states / W, each = K * parts / Shape::threads;
    static_assert(K * parts % Shape::threads == 0);
    if constexpr (!Shape::matrix) {
#pragma unroll 1
        for (int first = 0; first < K * (rank / W); first += Shape::threads) {  // the same way for all threads
            const int s = (first + thread) % K, r = (first + thread) / K * W;
            if (r >= rank / W * W) continue;
            const auto x = tile.q.template load<W>(place_of(s, count, reverse) * row + r);
#pragma unroll
            for (int k = 0; k < W; k++) tile.dt[(r + k) * Shape::dt_pitch + s] = device::to_float(x[k]);
        }
    }
#pragma unroll 2
    for (int i = 0; i < each; i++) {
        const int s = (thread + i * Shape::threads) / parts, c = (thread + i * Shape::threads) % parts * W;
        convert_BC<Shape, W>(tile.BC, s, c, tile.q.template load<W>(place_of(s, count, reverse) * row + rank + c));
    }
}

template <class Shape>
__device__ __forceinline__ void convert_q(const TunedTile<Shape>& tile, int rank, int row, int count, bool reverse,
                                          int thread)
{
    if (Shape::straight || (rank % 4 == 0 && row % 4 == 0))
        convert_q_by<4>(tile, rank, row, count, reverse, thread);
    else
        convert_q_by<1>(tile, rank, row, count, reverse, thread);
}

// ---- skip, sum, gate -----------------------------------------------------------------------------------------------

// Where both directions have just computed the same tile: lays out the other one's y as if it had been copied.
template <class Shape>
__device__ __forceinline__ void tile_meet(const TunedTile<Shape>& tile, const TunedTile<Shape>& other, int u_at,
                                          int count, int thread)
{
    constexpr int channels = Shape::channels;
#pragma unroll 1
    for (int i = thread; i < channels * count; i += Shape::threads) {
        const int c = i % channels, s = i / channels, there = count - 1 - s;  // it counts from the other end
        const float y = other.steps[Shape::y_of(Shape::row_of(c / Shape::wide, c % Shape::wide), there)];
        const typename Shape::Type u = other.u[u_at + there * Shape::u_pitch + c];
        const float D = other.D[c];
        tile.sum[i] = fmaf(D, device::to_float(u), y);
    }
}

// Where a thread's channels of its first token go.
template <class T>
struct TunedFinish {
    T* out;
    float* sum;  // in place of out where the other direction is still to come
    int row;     // elements from token to token of the scan in both
    bool both;   // add the other direction's y
    bool add;    // add what out holds
    bool finish, aligned;
    float inverse_scale;
};

template <class Shape>
__device__ __forceinline__ void tile_finish(const TunedTile<Shape>& tile, int u_at,
                                            TunedFinish<typename Shape::Type> to, int count, int live, int thread)
{
    constexpr int wide = Shape::wide, deep = Shape::deep, channels = Shape::channels;
    const int set = thread % Shape::sets, c = wide * set, s0 = thread / Shape::sets * deep, at = s0 * channels + c;
    live -= c;
    count -= s0;
    if (!Shape::straight && (live <= 0 || count <= 0)) return;
    const auto D = tile.D.template load<wide>(c);
    device::Vec<float, deep> y[wide];
#pragma unroll
    for (int k = 0; k < wide; k++) y[k] = tile.steps.template load<deep>(Shape::y_of(Shape::row_of(set, k), s0));
#pragma unroll
    for (int i = 0; i < deep; i++) {
        const auto u = device::to_floats(tile.u.template load<wide>(u_at + (s0 + i) * Shape::u_pitch + c));
#pragma unroll
        for (int k = 0; k < wide; k++) y[k][i] = fmaf(D[k], u[k], y[k][i]);
    }
    auto store = [&](auto* out) {
        using V = std::remove_pointer_t<decltype(out)>;
#pragma unroll
        for (int i = 0; i < deep; i++) {
            if (Shape::straight || to.aligned) {
                device::Vec<V, wide> rounded;
#pragma unroll
                for (int k = 0; k < wide; k++) rounded[k] = device::from_float<V>(y[k][i]);
                if (i < count) device::store(out, rounded);
            } else {
#pragma unroll
                for (int k = 0; k < wide; k++)
                    if (i < count && k < live) out[k] = device::from_float<V>(y[k][i]);
            }
            out += to.row;
        }
    };
    if (Shape::straight && to.sum) {
        store(to.sum);
        return;
    }
    if (Shape::straight || to.both) {
#pragma unroll
        for (int i = 0; i < deep; i++) {
            const auto sum = tile.sum.template load<wide>(at + i * channels);
#pragma unroll
            for (int k = 0; k < wide; k++) y[k][i] += sum[k];
        }
    }
    if (!Shape::straight && to.add) {
#pragma unroll
        for (int i = 0; i < deep; i++)
#pragma unroll
            for (int k = 0; k < wide; k++)
                if (i < count && k < live) y[k][i] += device::to_float(to.out[static_cast<Index>(i) * to.row + k]);
    }
    if (Shape::straight || to.finish) {
#pragma unroll
        for (int i = 0; i < deep; i++) {
            const auto z = device::to_floats(tile.z.template load<wide>(at + i * channels));
#pragma unroll
            for (int k = 0; k < wide; k++) y[k][i] *= device::scaled_silu(z[k], to.inverse_scale);
        }
    }
    if (!Shape::straight && to.sum)
        store(to.sum);
    else
        store(to.out);
}

}  // namespace vimcore::cuda
