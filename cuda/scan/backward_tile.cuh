// SPDX-License-Identifier: Apache-2.0
// One tile of the tuned scan's gradient (see scan/backward_tuned.cuh) as one warp has it in shared memory, and
// everything that happens to it but the recurrence and the products of matrices: q to float, the gradient of y, what
// follows from the sums over states. Outside the recurrence the lane with g = lane / 4 and q = lane % 4 has tokens g
// and g + 8, in the order of the scan, and the `wide` neighbouring channels of the warp from wide q on: so a product of
// matrices (device::multiply_add) lays them out, where column 2q + e of its j-th result is channel wide q + 2j + e.
#pragma once

#include <type_traits>

#include "core/device_scratch.h"
#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

inline constexpr int back_threads = device_scratch::back_threads;  // of a direction
inline constexpr int back_warps = back_threads / device::warp_size;

// What follows from N states and T; a thread of the recurrence has C channels x S states, `step` tokens in registers.
// Four lanes share a channel. aligned: all of a thread's neighbouring elements may be read and written at once.
template <class T_, int N, bool aligned_>
struct BackShape {
    using T = T_;
    static constexpr bool aligned = aligned_;
    static constexpr int states = N, C = device_scratch::back_thread_channels(N), S = N / 4, tile = 16, step = 4;
    static constexpr int slots = device::warp_size / 4, warp_channels = slots * C,
                         channels = back_warps * warp_channels;
    static constexpr int wide = 2 * C, halves = 2;   // channels and tokens of a thread outside the recurrence
    static constexpr int pitch = warp_channels + 4;  // floats from token to token: no bank conflicts
    static constexpr int array = tile * pitch;
    static constexpr int kept = C * S;                                   // states
    static constexpr int kept_tile = device_scratch::back_kept_tile(N);  // floats that a thread leaves for the walk
    // Sums over lanes are products by ones. dB and dC of bfloat16 are sums of what one product sees of a number: 3 bits
    // more than the results have.
    static constexpr bool exact = !std::is_same_v<T, __nv_bfloat16>, exact_dt = sizeof(T) == 4;
    // Whether registers can keep the ones that sums are multiplied by from token to token.
    static constexpr bool keeps_ones = states == 8 || (!exact && aligned);
    static_assert(kept_tile == tile / step * kept + halves * wide);
};

// Where one warp's arrays are in shared memory, in floats; those that depend on the rank come last. padded: the rank as
// products of matrices have it.
template <class Shape>
struct BackLayout {
    static constexpr int K = Shape::tile, channels = Shape::warp_channels, states = Shape::kept * device::warp_size;
    static constexpr int delta = 0, du = delta + Shape::array, gy = du + Shape::array, y = gy + Shape::array;
    static constexpr int BC = y + Shape::array, h = BC + K * 2 * Shape::states, lambda = h + states,
                         dA = lambda + states;
    static constexpr int dD = dA + states, bias = dD + device::warp_size * Shape::wide, D = bias + channels;
    static constexpr int totals = D + channels;
    int padded, ddt, floats;

    __host__ __device__ constexpr explicit BackLayout(int rank) : padded((rank + 15) / 16 * 16), ddt(du), floats(0)
    {
        floats = totals + padded * channels;
        if (K * padded <= BC - du) return;  // in place of du, gy and y, where there is room
        ddt = floats;
        floats += K * padded;
    }
};

// The arrays of one warp, in the order of the scan.
template <class Shape>
struct BackTile {
    device::Shared<float> delta;       // [token][channel]; later slope ln 2 sum_n A a h[t - 1] lambda; then draw
    device::Shared<float> du;          // [token][channel] delta u; later slope sum_n B lambda
    device::Shared<float> gy;          // [token][channel]; later the gradient of u
    device::Shared<float> y;           // [token][channel]
    device::Shared<float> ddt;         // [token][r], at last
    device::Shared<float> BC;          // [token][B (N) | C (N)], odd tokens [C | B]: no bank conflicts; later [dB | dC]
    device::Shared<float> h;           // [states / 4][lane][4]: states before the next step
    device::Shared<float> lambda, dA;  // the same; registers have them only where they are needed
    device::Shared<float> totals;      // ddt_weight: [rank / 16][channel / 8][lane][4]
    device::Shared<float> dD;          // [channel / 4 of the lane][lane][4]
    device::Shared<float> bias, D;     // [channel]
    int padded;

    __device__ BackTile(const BackLayout<Shape>& at, int base)
        : delta(take(base + at.delta, Shape::array)),
          du(take(base + at.du, Shape::array)),
          gy(take(base + at.gy, Shape::array)),
          y(take(base + at.y, Shape::array)),
          ddt(take(base + at.ddt, Shape::tile * at.padded)),
          BC(take(base + at.BC, Shape::tile * 2 * Shape::states)),
          h(take(base + at.h, at.states)),
          lambda(take(base + at.lambda, at.states)),
          dA(take(base + at.dA, at.states)),
          totals(take(base + at.totals, at.padded * at.channels)),
          dD(take(base + at.dD, device::warp_size * Shape::wide)),
          bias(take(base + at.bias, at.channels)),
          D(take(base + at.D, at.channels)),
          padded(at.padded)
    {
    }
    // ddt_bias is where delta has nothing, behind the channels of a token: two blocks of sm_80 have just room enough.
    __device__ static int dbias_of(int channel)  // in delta
    {
        return channel / 4 * Shape::pitch + Shape::warp_channels + channel % 4;
    }
    // Of one token: where B, or dB, begins, and C.
    __device__ static int B_of(int s) { return (2 * s + (s & 1)) * Shape::states; }
    __device__ static int C_of(int s) { return (2 * s + 1 - (s & 1)) * Shape::states; }
    // Of four of a lane's states: where they are in h, lambda and dA.
    __device__ static int state_of(int v, int lane) { return (v * device::warp_size + lane) * 4; }

private:
    __device__ static device::Shared<float> take(int at, int count) { return device::shared<float>(4 * at, count); }
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

// What a thread has of a tile outside the recurrence: its first token is `first`, its first element of a tensor
// (B, len, E) at `place`, that of its other token `other` elements further. live[i]: channels of token i that exist.
struct BackPart {
    int live[2];
    Index place, other;
};

// ---- neighbouring elements -----------------------------------------------------------------------------------------

template <class V, int n>
inline constexpr int back_piece = n * static_cast<int>(sizeof(V)) <= 16 ? n : 16 / static_cast<int>(sizeof(V));

// n elements of which `live` exist, zeros for the rest; all of them or none, if they may be read at once.
template <bool at_once, int n, class V>
__device__ __forceinline__ void load_row(const V* from, int live, float (&x)[n])
{
    constexpr int piece = back_piece<V, n>;
#pragma unroll
    for (int i = 0; i < n; i++) x[i] = 0.0f;
    if (live <= 0) return;
    if constexpr (at_once) {
#pragma unroll
        for (int i = 0; i < n; i += piece) {
            const auto part = device::load<piece>(from + i);
#pragma unroll
            for (int k = 0; k < piece; k++) x[i + k] = device::to_float(part[k]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; i++)
            if (i < live) x[i] = device::to_float(from[i]);
    }
}
template <bool at_once, int n, class V>
__device__ __forceinline__ void store_row(V* to, int live, const float (&x)[n])
{
    constexpr int piece = back_piece<V, n>;
    if (live <= 0) return;
    if constexpr (at_once) {
#pragma unroll
        for (int i = 0; i < n; i += piece) {
            device::Vec<V, piece> part;
#pragma unroll
            for (int k = 0; k < piece; k++) part[k] = device::from_float<V>(x[i + k]);
            device::store(to + i, part);
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; i++)
            if (i < live) to[i] = device::from_float<V>(x[i]);
    }
}
template <int n>
__device__ __forceinline__ void load_shared(device::Shared<float> from, int at, float (&x)[n])
{
    constexpr int piece = n < 4 ? n : 4;
#pragma unroll
    for (int i = 0; i < n; i += piece) {
        const auto part = from.template load<piece>(at + i);
#pragma unroll
        for (int k = 0; k < piece; k++) x[i + k] = part[k];
    }
}
template <int n>
__device__ __forceinline__ void store_shared(device::Shared<float> to, int at, const float (&x)[n])
{
    constexpr int piece = n < 4 ? n : 4;
#pragma unroll
    for (int i = 0; i < n; i += piece) {
        device::Vec<float, piece> part;
#pragma unroll
        for (int k = 0; k < piece; k++) part[k] = x[i + k];
        to.template store<piece>(at + i, part);
    }
}

// Both tokens of a part.
template <class Shape, int n, class V>
__device__ __forceinline__ void load_part(const V* from, Index other, const BackPart& own, float (&x)[2][n])
{
#pragma unroll
    for (int i = 0; i < 2; i++) load_row<Shape::aligned>(from + i * other, own.live[i], x[i]);
}
template <class Shape, int n, class V>
__device__ __forceinline__ void store_part(V* to, Index other, const BackPart& own, const float (&x)[2][n])
{
#pragma unroll
    for (int i = 0; i < 2; i++) store_row<Shape::aligned>(to + i * other, own.live[i], x[i]);
}
// Where a part lies in an array [token][channel].
template <class Shape>
__device__ __forceinline__ int part_at(int lane, int i)
{
    return (lane / 4 + 8 * i) * Shape::pitch + lane % 4 * Shape::wide;
}

// ---- q to float ----------------------------------------------------------------------------------------------------

// From the rows of q of one image, of `row` elements, to BC; zeros beyond the last token.
template <class Shape>
__device__ __forceinline__ void back_load_BC(const BackTile<Shape>& tile, const typename Shape::T* q, int rank, int row,
                                             const BackRows& rows, int lane)
{
    // A row takes `across` lanes, W columns each; if it is longer than a warp, several times.
    constexpr int N = Shape::states, W = Shape::aligned ? 4 : 1, parts = 2 * N / W;
    constexpr int across = parts < device::warp_size ? parts : device::warp_size, down = device::warp_size / across;
    static_assert(parts % across == 0 && Shape::tile % down == 0);
    const int c0 = lane % across * W, s0 = lane / across;
#pragma unroll
    for (int k = 0; k < Shape::tile / down; k++) {
        const int s = s0 + k * down;
        const auto* const from = q + static_cast<Index>(rows.natural(s)) * row + rank;
#pragma unroll
        for (int i = 0; i < parts / across; i++) {
            const int c = c0 + i * across * W;
            float x[W];
            load_row<true>(from + c, rows.count - s, x);
            store_shared(tile.BC, c < N ? tile.B_of(s) + c : tile.C_of(s) + c - N, x);
        }
    }
}

// ---- gradient of y -------------------------------------------------------------------------------------------------

// gy = scale silu(z) dout, and its share in dD. z: this thread's first element.
template <class Shape>
__device__ __forceinline__ void back_gy(const BackTile<Shape>& tile, const float (&gate)[2][Shape::wide],
                                        const float (&dout)[2][Shape::wide], const float (&u)[2][Shape::wide],
                                        float scale, int lane)
{
    constexpr int wide = Shape::wide;
    float gy[2][wide];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int k = 0; k < wide; k++) gy[i][k] = scale * dout[i][k] * device::silu(gate[i][k]);
        store_shared(tile.gy, part_at<Shape>(lane, i), gy[i]);
    }
#pragma unroll
    for (int v = 0; v < wide; v += 4) {
        const int at = (v / 4 * device::warp_size + lane) * 4;
        auto sum = tile.dD.template load<4>(at);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += fmaf(gy[1][v + k], u[1][v + k], gy[0][v + k] * u[0][v + k]);
        tile.dD.template store<4>(at, sum);
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

// What the walk left: du of the output, draw, y with its skip.
template <class Shape>
__device__ __forceinline__ void back_finish(const BackTile<Shape>& tile, const float (&u)[2][Shape::wide],
                                            float (&du)[2][Shape::wide], float (&draw)[2][Shape::wide],
                                            float (&y)[2][Shape::wide], int lane)
{
    constexpr int wide = Shape::wide;
    float D[wide];
    load_shared(tile.D, lane % 4 * wide, D);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = part_at<Shape>(lane, i);
        float by_u[wide], sum[wide];
        load_shared(tile.du, at, by_u);
        load_shared(tile.delta, at, draw[i]);
        load_shared(tile.gy, at, du[i]);
        load_shared(tile.y, at, sum);
#pragma unroll
        for (int k = 0; k < wide; k++) {
            draw[i][k] = fmaf(u[i][k], by_u[k], draw[i][k]);
            y[i][k] = fmaf(D[k], u[i][k], sum[k]);
        }
    }
}

// The gated output and the gradient of the gate, in place of y of both directions and of the gate.
template <class Shape>
__device__ __forceinline__ void back_gate(float (&gate)[2][Shape::wide], const float (&dout)[2][Shape::wide],
                                          float scale, float (&y)[2][Shape::wide])
{
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < Shape::wide; k++) {
            const float total = scale * y[i][k], slope = device::sigmoid(gate[i][k]), open = gate[i][k] * slope;
            y[i][k] = total * open;
            gate[i][k] = dout[i][k] * total * fmaf(open, 1.0f - slope, slope);
        }
}

}  // namespace vimcore::cuda
