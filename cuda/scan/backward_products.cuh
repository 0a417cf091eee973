// SPDX-License-Identifier: Apache-2.0
// Products of matrices in the tuned scan's gradient (see scan/backward_tuned.cuh), each by one warp on one tile: the dt
// projection and its two gradients; and the sums over lanes, which are products by ones. The multiplier sees 10 bits
// of a fraction: a factor that has more is cut in two, whose products are added.
#pragma once

#include "scan/backward_tile.cuh"

namespace vimcore::cuda {

// What is left of x after what the multiplier sees of it.
__device__ __forceinline__ float back_rest(float x) { return x - device::tf32(x); }

// The dt projection's arguments: W (E, R), from the warp's first channel on; q of the image.
template <class T>
struct BackProjection {
    const float* weight;
    const T* q;
    int rank, row, live;  // live: channels of the warp that exist
};

// Elements r, r + 1, ... of a row that has `rank`; zeros beyond, or if there is no such row.
template <class Shape, int n, class V>
__device__ __forceinline__ void load_ranks(const V* row, int r, int rank, bool is, float (&x)[n])
{
    load_row<Shape::aligned>(row + r, is ? rank - r : 0, x);
}

// delta before softplus, without the bias: d[j] of the products' j-th result (see backward_tile.cuh).
template <class Shape>
__device__ __forceinline__ void back_project(const BackProjection<typename Shape::T>& p, const BackRows& rows, int lane,
                                             float (&d)[Shape::C][4])
{
    constexpr int C = Shape::C;
    const int g = lane / 4, q = lane % 4, c0 = g / 2 * Shape::wide + g % 2;
    // Of 16 ranks q has 4q .. 4q + 3, two for each of two products.
#pragma unroll 1
    for (int r = 4 * q; r - 4 * q < p.rank; r += 16) {
        float x[2][4], w[C][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
            load_ranks<Shape>(p.q + static_cast<Index>(rows.natural(g + 8 * i)) * p.row, r, p.rank,
                              g + 8 * i < rows.count, x[i]);
#pragma unroll
        for (int j = 0; j < C; j++)
            load_ranks<Shape>(p.weight + (c0 + 2 * j) * p.rank, r, p.rank, c0 + 2 * j < p.live, w[j]);
#pragma unroll
        for (int k = 0; k < 4; k += 2)
#pragma unroll
            for (int j = 0; j < C; j++) {
                const float rest[2] = {back_rest(w[j][k]), back_rest(w[j][k + 1])};
                if constexpr (Shape::exact_dt)
                    device::multiply_add(d[j], back_rest(x[0][k]), back_rest(x[1][k]), back_rest(x[0][k + 1]),
                                         back_rest(x[1][k + 1]), w[j][k], w[j][k + 1]);
                device::multiply_add(d[j], x[0][k], x[1][k], x[0][k + 1], x[1][k + 1], rest[0], rest[1]);
                device::multiply_add(d[j], x[0][k], x[1][k], x[0][k + 1], x[1][k + 1], w[j][k], w[j][k + 1]);
            }
    }
}

// ddt[t, r] = sum over the warp's channels of draw[t, e] W[e, r], to tile.ddt.
template <class Shape>
__device__ __forceinline__ void back_ddt(const BackTile<Shape>& tile, const BackProjection<typename Shape::T>& p,
                                         const float (&draw)[2][Shape::wide], int lane)
{
    constexpr int wide = Shape::wide;
    const int g = lane / 4, q = lane % 4;
    float rest[2][wide];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < wide; k++) rest[i][k] = back_rest(draw[i][k]);
#pragma unroll 1
    for (int r = 0; r < p.rank; r += 16) {
        float d[2][4] = {};  // of ranks r + 2n and r + 2n + 1
#pragma unroll
        for (int k = 0; k < wide; k += 2) {
            float w[2][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = wide * q + k + i;
                load_ranks<Shape>(p.weight + c * p.rank, r + 2 * g, p.rank, c < p.live, w[i]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                device::multiply_add(d[n], rest[0][k], rest[1][k], rest[0][k + 1], rest[1][k + 1], w[0][n], w[1][n]);
                device::multiply_add(d[n], draw[0][k], draw[1][k], draw[0][k + 1], draw[1][k + 1], back_rest(w[0][n]),
                                     back_rest(w[1][n]));
                device::multiply_add(d[n], draw[0][k], draw[1][k], draw[0][k + 1], draw[1][k + 1], w[0][n], w[1][n]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            tile.ddt.template store<4>(
                (g + 8 * i) * tile.padded + r + 4 * q,
                device::Vec<float, 4>{{d[0][2 * i], d[1][2 * i], d[0][2 * i + 1], d[1][2 * i + 1]}});
    }
}

// Adds the tile to totals, dW[r, e] += sum_t dt[t, r] draw[t, e], of which a lane has ranks r + 2g and r + 2g + 1,
// channels 8j + 2q and 8j + 2q + 1; and to ddt_bias.
template <class Shape>
__device__ __forceinline__ void back_totals(const BackTile<Shape>& tile, const BackProjection<typename Shape::T>& p,
                                            const BackRows& rows, int lane)
{
    constexpr int C = Shape::C, K = Shape::tile;
    static_assert(K == 16);
    const int g = lane / 4, q = lane % 4;
    float draw[K / 8][C][2];
#pragma unroll
    for (int s = 0; s < K / 8; s++)
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) draw[s][j][i] = tile.delta[(8 * s + 2 * q + i) * Shape::pitch + 8 * j + g];
#pragma unroll
    for (int j = 0; j < C; j++) {
        float sum = (draw[0][j][0] + draw[0][j][1]) + (draw[1][j][0] + draw[1][j][1]);
        sum += device::shuffle_xor(sum, 1);
        sum += device::shuffle_xor(sum, 2);
        if (q == j) tile.delta[tile.dbias_of(8 * j + g)] += sum;
    }
#pragma unroll 1
    for (int r = 0; r < p.rank; r += 16) {
        float d[C][4] = {}, dt[K / 8][2][2];  // of tokens 8s + 2q + i
#pragma unroll
        for (int s = 0; s < K / 8; s++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = 8 * s + 2 * q + i;
                const auto* const from = p.q + static_cast<Index>(rows.natural(t)) * p.row;
                load_ranks<Shape>(from, r + 2 * g, p.rank, t < rows.count, dt[s][i]);
            }
#pragma unroll
        for (int s = 0; s < K / 8; s++)
#pragma unroll
            for (int j = 0; j < C; j++) {
                const auto& x = dt[s];
                const float a = draw[s][j][0], b = draw[s][j][1];
                if constexpr (Shape::exact_dt)
                    device::multiply_add(d[j], back_rest(x[0][0]), back_rest(x[0][1]), back_rest(x[1][0]),
                                         back_rest(x[1][1]), a, b);
                device::multiply_add(d[j], x[0][0], x[0][1], x[1][0], x[1][1], back_rest(a), back_rest(b));
                device::multiply_add(d[j], x[0][0], x[0][1], x[1][0], x[1][1], a, b);
            }
#pragma unroll
        for (int j = 0; j < C; j++) {
            const int at = ((r / 16 * C + j) * device::warp_size + lane) * 4;
            auto sum = tile.totals.template load<4>(at);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += d[j][i];
            tile.totals.template store<4>(at, sum);
        }
    }
}

// ---- sums over lanes -----------------------------------------------------------------------------------------------

// Cut off, numbers are smaller by this share on the average; 1 where nothing is cut off. Sums are divided by it.
template <class Shape>
inline constexpr float back_mend = Shape::exact ? 1.0f : 1.0f + 0.72134752f / 2048;

// 1 for lanes of row n of eight (four lanes each), else 0.
__device__ __forceinline__ float back_unit(int lane, int n) { return lane / 4 == n ? 1.0f : 0.0f; }

// Of token i of four: sums of a, b, c, d over the four lanes of a channel to d[0 .. 3] of lane i of them.
template <bool exact>
__device__ __forceinline__ void sum_states(float (&to)[4], int i, float a, float b, float c, float d, int lane)
{
    const float left = back_unit(lane, 2 * i), right = back_unit(lane, 2 * i + 1);
    if constexpr (exact) device::multiply_add(to, back_rest(a), back_rest(c), back_rest(b), back_rest(d), left, right);
    device::multiply_add(to, a, c, b, d, left, right);
}

// Of token i of four: sums of x over a warp's slots of channels, of even and of odd slots to two elements each. Lane i
// of a channel has, with g = lane / 4 and p = g % 4, value 2 (g / 4) of lane p in to[0] and to[2], the next one in
// to[1] and to[3]; of two values, value g / 4 in to[0] and to[2]. First a product by the unit matrix brings a value's
// slots to the lanes where another one adds them.
template <bool exact, int n>
__device__ __forceinline__ void sum_slots(float (&to)[4], int i, const float (&x)[n], int lane)
{
    static_assert(n == 2 || n == 4);
    const float low = lane / 4 == lane % 4 ? 1.0f : 0.0f, high = lane / 4 == lane % 4 + 4 ? 1.0f : 0.0f;
    const float any = lane / 4 == lane % 4 + 1 ? 1.0f : 0.0f, other = lane / 4 == lane % 4 + 3 ? 1.0f : 0.0f;
    const float left = back_unit(lane, 2 * i), right = back_unit(lane, 2 * i + 1);
    // Only the upper half of the first products is used. What is below in A is not zero, so that four registers keep A.
    auto add = [&](const float (&v)[n]) {
        float one[4] = {}, two[4] = {};
        device::multiply_add(one, low, any, high, other, v[0], v[n / 2]);
        if constexpr (n == 4) device::multiply_add(two, low, any, high, other, v[1], v[3]);
        device::multiply_add(to, one[0], one[1], two[0], two[1], left, right);
    };
    if constexpr (exact) {
        float rest[n];
#pragma unroll
        for (int k = 0; k < n; k++) rest[k] = back_rest(x[k]);
        add(rest);
    }
    add(x);
}

}  // namespace vimcore::cuda
