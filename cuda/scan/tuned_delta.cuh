// SPDX-License-Identifier: Apache-2.0
// delta and delta u of a tile of the tuned scan (see scan/tuned.cuh), in shared memory:
//   delta[t, e] = softplus(dt_bias[e] + sum_r q[t, r] dt_weight[e, r])
// In float a thread has the channels and tokens that it has in `finish`. In 16-bit types a warp multiplies matrices of
// 16 channels and 16 ranks by those of 8 tokens.
#pragma once

#include "scan/tuned_tile.cuh"

namespace vimcore::cuda {

// By matrices of 16 channels and 8 tokens, 16 of the rank at a time. Of each of them a lane has two channels and two
// tokens; those of all are numbered so that W are neighbours in memory.
template <class Shape>
inline constexpr int matrix_wide = Shape::channels >= 32   ? 4
                                   : Shape::channels >= 16 ? 2
                                                           : 1;
template <class Shape>
__device__ __forceinline__ int matrix_channel(int lane, int i)
{
    constexpr int W = matrix_wide<Shape>;
    return i / W * (8 * W) + lane / 4 * W + i % W;
}

// dt_weight and dt_bias, once, as `tile_delta` wants them, and D: of channels from e0 on, of which `live` are there.
template <class Shape>
__device__ __forceinline__ void load_weights(const TunedTile<Shape>& tile, const float* weight, const float* bias,
                                             const float* D, int rank, int e0, int live, int thread)
{
    auto at = [&](int c, int r) {
        if (c >= live || r > rank) return 0.0f;
        return r == rank ? bias[e0 + c] : weight[static_cast<Index>(e0 + c) * rank + r];
    };
    for (int c = thread; c < Shape::channels; c += Shape::threads) tile.D[c] = c < live ? D[e0 + c] : 0.0f;
    if constexpr (Shape::matrix) {
        const int fragments = Shape::ranks(rank) * Shape::matrices * device::warp_size;
        for (int i = thread; i < fragments; i += Shape::threads) {
            const int lane = i % device::warp_size, m = i / device::warp_size % Shape::matrices,
                      k0 = i / device::warp_size / Shape::matrices * 16 + lane % 4 * 2;
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const int c = matrix_channel<Shape>(lane, 2 * m + pair % 2), k = k0 + pair / 2 * 8;
                device::Vec<float, 2> rest{{at(c, k), at(c, k + 1)}};
#pragma unroll
                for (int part = 0; part < Shape::weight_parts; part++) {
                    device::Vec<__nv_bfloat16, 2> rounded;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        rounded[j] = device::from_float<__nv_bfloat16>(rest[j]);
                        rest[j] -= device::to_float(rounded[j]);
                    }
                    tile.weights[(part * fragments + i) * 4 + pair] = device::bits(rounded);
                }
            }
        }
    } else {
        for (int c = thread; c < Shape::channels; c += Shape::threads) {
            for (int r = 0; r < rank; r++) tile.weight[r * Shape::channels + c] = at(c, r);
            tile.bias[c] = at(c, rank);
        }
    }
}

// Keeps delta and delta u of two neighbouring tokens.
template <class Shape>
__device__ __forceinline__ void keep_steps(const TunedTile<Shape>& tile, int row, int s, float delta0, float u0,
                                           float delta1, float u1)
{
    tile.steps.template store<4>(row * Shape::pitch + 2 * s, {{delta0, delta0 * u0, delta1, delta1 * u1}});
}

// dt of one token, columns k and k + 1 and those 8 further on, in parts of bfloat16; 1 for the bias, zeros behind it.
template <class Shape>
struct DtParts {
    static constexpr int parts = std::is_same_v<typename Shape::Type, __nv_bfloat16> ? 1 : 2;
    device::Vec<std::uint32_t, 2> part[parts];
};
template <class Shape>
__device__ __forceinline__ DtParts<Shape> load_dt(const TunedTile<Shape>& tile, int at, int k, int rank)
{
    using T = typename Shape::Type;
    DtParts<Shape> dt;
#pragma unroll
    for (int half = 0; half < 2; half++, k += 8) {
        device::Vec<T, 2> x{{device::from_float<T>(0.0f), device::from_float<T>(0.0f)}};
        if (Shape::straight) {  // of an even rank
            x = tile.q.template load<2>(at + k);
            if (k >= rank) x = {{device::from_float<T>(k == rank ? 1.0f : 0.0f), device::from_float<T>(0.0f)}};
        } else {
#pragma unroll
            for (int j = 0; j < 2; j++)
                x[j] = k + j < rank ? static_cast<T>(tile.q[at + k + j])
                                    : device::from_float<T>(k + j == rank ? 1.0f : 0.0f);
        }
        if constexpr (DtParts<Shape>::parts == 1) {
            dt.part[0][half] = device::bits(x);
        } else {
            device::Vec<__nv_bfloat16, 2> high, low;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float value = device::to_float(x[j]);
                high[j] = device::from_float<__nv_bfloat16>(value);
                low[j] = device::from_float<__nv_bfloat16>(value - device::to_float(high[j]));
            }
            dt.part[0][half] = device::bits(high);
            dt.part[1][half] = device::bits(low);
        }
    }
    return dt;
}

template <class Shape>
__device__ __forceinline__ void matrix_delta(const TunedTile<Shape>& tile, int u_at, int rank, int row, int count,
                                             bool reverse, int thread)
{
    constexpr int warps = Shape::threads / device::warp_size, M = Shape::matrices, W = matrix_wide<Shape>;
    constexpr int wide = Shape::wide;
    static_assert(W % wide == 0 && Shape::tile % (8 * warps) == 0);
    const int lane = thread % device::warp_size, warp = thread / device::warp_size;
    const int fragments = Shape::ranks(rank) * M * device::warp_size;
#pragma unroll
    for (int round = 0; round < Shape::tile / (8 * warps); round++) {
        const int t0 = 8 * (round * warps + warp);
        float x[M][4] = {};  // channels 2m, 2m + 1 of this lane by two tokens
        const int at = place_of(t0 + lane / 4, count, reverse) * row;
        auto add = [&](int k) {
            const DtParts<Shape> dt = load_dt(tile, at, k + lane % 4 * 2, rank);
#pragma unroll
            for (int part = Shape::weight_parts - 1; part >= 0; part--)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const int i = part * fragments + (k / 16 * M + m) * device::warp_size + lane;
                    const auto weight = tile.weights.template load<4>(4 * i);
#pragma unroll
                    for (int j = DtParts<Shape>::parts - 1; j >= 0; j--)
                        if (part + j < Shape::weight_parts) device::multiply_add(x[m], weight, dt.part[j]);
                }
        };
        add(0);
#pragma unroll 1
        for (int k = 16; k <= rank; k += 16) add(k);
        const int s = t0 + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][i] = device::softplus(x[m][i]);
        if (s + 1 >= count) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                x[m][1] = x[m][3] = 0.0f;
                if (s >= count) x[m][0] = x[m][2] = 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * M; i += W) {
            const int c = matrix_channel<Shape>(lane, i);
            if (Shape::channels < 16 && c >= Shape::channels) continue;
            const auto u0 = device::to_floats(tile.u.template load<W>(u_at + s * Shape::u_pitch + c));
            const auto u1 = device::to_floats(tile.u.template load<W>(u_at + (s + 1) * Shape::u_pitch + c));
#pragma unroll
            for (int k = 0; k < W; k++) {
                const int m = (i + k) / 2, first = (i + k) % 2 * 2;
                const int set = (i / W * 8 + lane / 4) * (W / wide) + k / wide;  // that of channel c + k
                keep_steps(tile, Shape::row_of(set, k % wide), s, x[m][first], u0[k], x[m][first + 1], u1[k]);
            }
        }
    }
}

// In float, of `wide` channels and `deep` tokens.
template <class Shape>
__device__ __forceinline__ void float_delta(const TunedTile<Shape>& tile, int u_at, int rank, int count, int thread)
{
    constexpr int wide = Shape::wide, deep = Shape::deep, channels = Shape::channels;
    const int c = wide * (thread % Shape::sets), s0 = thread / Shape::sets * deep;
    float x[wide][deep], u[wide][deep];
    const auto bias = tile.bias.template load<wide>(c);
#pragma unroll
    for (int k = 0; k < wide; k++)
#pragma unroll
        for (int s = 0; s < deep; s++) x[k][s] = bias[k];
#pragma unroll 4
    for (int r = 0; r < rank; r++) {
        const auto weight = tile.weight.template load<wide>(r * channels + c);
        const auto dt = tile.dt.template load<deep>(r * Shape::dt_pitch + s0);
#pragma unroll
        for (int k = 0; k < wide; k++)
#pragma unroll
            for (int s = 0; s < deep; s++) x[k][s] = fmaf(weight[k], dt[s], x[k][s]);
    }
#pragma unroll
    for (int s = 0; s < deep; s++) {
        const auto from = device::to_floats(tile.u.template load<wide>(u_at + (s0 + s) * Shape::u_pitch + c));
#pragma unroll
        for (int k = 0; k < wide; k++) {
            u[k][s] = from[k];
            x[k][s] = s0 + s < count ? device::softplus(x[k][s]) : 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < wide; k++)
#pragma unroll
        for (int s = 0; s < deep; s += 2)
            keep_steps(tile, Shape::row_of(c / wide, k), s0 + s, x[k][s], u[k][s], x[k][s + 1], u[k][s + 1]);
}

template <class Shape>
__device__ __forceinline__ void tile_delta(const TunedTile<Shape>& tile, int u_at, int rank, int row, int count,
                                           bool reverse, int thread)
{
    if constexpr (Shape::matrix)
        matrix_delta(tile, u_at, rank, row, count, reverse, thread);
    else
        float_delta(tile, u_at, rank, count, thread);
}

}  // namespace vimcore::cuda
