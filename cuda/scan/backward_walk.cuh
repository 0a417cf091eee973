// SPDX-License-Identifier: Apache-2.0
// The recurrences of the tuned scan's gradient (see scan/backward_tuned.cuh), four tokens of a tile at a time. A thread
// holds 2 channels x 4 states; N / 4 lanes share its channels.
#pragma once

#include "scan/backward_tile.cuh"
#include "scan/tuned.cuh"

namespace vimcore::cuda {

template <int S>
__device__ __forceinline__ device::Vec<float, S> put(const float (&x)[S])
{
    device::Vec<float, S> to;
#pragma unroll
    for (int i = 0; i < S; i++) to[i] = x[i];
    return to;
}
template <int S>
__device__ __forceinline__ void get(float (&x)[S], const device::Vec<float, S>& from)
{
#pragma unroll
    for (int i = 0; i < S; i++) x[i] = from[i];
}

// Row of channel k of a thread. Every other lane has its channels the other way round, so that two lanes exchange sums
// over states by sending what they have of their second channel.
template <class Shape>
__device__ __forceinline__ int back_row(int thread, int k)
{
    return thread / Shape::lanes + (k ^ (thread & 1)) * Shape::slots;
}

// `step` tokens forward from s on.
template <class Shape>
__device__ __forceinline__ void back_run(const BackTile<Shape>& tile, int s, float (&h)[Shape::C][Shape::S],
                                         const float (&A)[Shape::C][Shape::S], int thread)
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, step = Shape::step;
    const int part = thread % Shape::lanes;
    device::Vec<float, step> delta[C], du[C];
#pragma unroll
    for (int k = 0; k < C; k++) {
        delta[k] = tile.delta.template load<step>(back_row<Shape>(thread, k) * Shape::pitch + s);
        du[k] = tile.du.template load<step>(back_row<Shape>(thread, k) * Shape::pitch + s);
    }
#pragma unroll
    for (int i = 0; i < step; i++) {
        const auto B = tile.BC.template load<S>((s + i) * 2 * N + part * S);
#pragma unroll
        for (int k = 0; k < C; k++)
#pragma unroll
            for (int n = 0; n < S; n++) h[k][n] = fmaf(device::exp2(delta[k][i] * A[k][n]), h[k][n], B[n] * du[k][i]);
    }
}

// `step` tokens from s on, back, nothing but lambda; delta is added to `steps`.
template <class Shape>
__device__ __forceinline__ void back_ahead(const BackTile<Shape>& tile, int s, const float (&A)[Shape::C][Shape::S],
                                           float (&lambda)[Shape::C][Shape::S], float (&steps)[Shape::C], int thread)
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, step = Shape::step;
    const int part = thread % Shape::lanes;
    device::Vec<float, step> delta[C], gy[C];
#pragma unroll
    for (int k = 0; k < C; k++) {
        delta[k] = tile.delta.template load<step>(back_row<Shape>(thread, k) * Shape::pitch + s);
        gy[k] = tile.gy.template load<step>(back_row<Shape>(thread, k) * Shape::pitch + s);
    }
#pragma unroll
    for (int i = step - 1; i >= 0; i--) {
        const auto C_ = tile.BC.template load<S>((s + i) * 2 * N + N + part * S);
#pragma unroll
        for (int k = 0; k < C; k++) {
            steps[k] += delta[k][i];
#pragma unroll
            for (int n = 0; n < S; n++)
                lambda[k][n] = fmaf(gy[k][i], C_[n], lambda[k][n]) * device::exp2(delta[k][i] * A[k][n]);
        }
    }
}

// As reduce_scatter, for lanes of which those that differ in bits below `bit` have their sums already. A recursion, so
// that the compiler knows every index.
template <int lanes, int bit = 1, int width = 0, int count>
__device__ __forceinline__ int back_reduce(float (&y)[count], int lane)
{
    constexpr int values = width == 0 ? count : width, half = values / 2;
    if constexpr (bit >= lanes) {
        return 0;
    } else if constexpr (values == 1) {
        y[0] += device::shuffle_xor(y[0], bit);
        return back_reduce<lanes, bit * 2, 1>(y, lane);
    } else {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float keep = upper ? y[i + half] : y[i], send = upper ? y[i] : y[i + half];
            y[i] = keep + device::shuffle_xor(send, bit);
        }
        return (upper ? half : 0) + back_reduce<lanes, bit * 2, half>(y, lane);
    }
}

// Sums over a channel's lanes: value i belongs to channel i / (count / 2), then array i / 4, token s + i % 4. Arrays
// follow each other in `to`.
template <class Shape, int count>
__device__ __forceinline__ void back_sums(device::Shared<float> to, int s, float (&x)[count], int thread)
{
    constexpr int lanes = Shape::lanes, step = Shape::step, half = count / 2;
    constexpr int kept = count / lanes > 0 ? count / lanes : 1, vector = kept < step ? kept : step;
    const int part = thread % lanes;
    float own[half];
#pragma unroll
    for (int i = 0; i < half; i++) own[i] = x[i] + device::shuffle_xor(x[half + i], 1);
    const int first = back_reduce<lanes, 2>(own, part);
    device::sync_warp();  // every lane has read what this may write over
    if (lanes > count && part >= count) return;
#pragma unroll
    for (int i = 0; i < kept; i += vector) {
        device::Vec<float, vector> out;
#pragma unroll
        for (int j = 0; j < vector; j++) out[j] = own[i + j];
        const int at = first + i;
        to.store<vector>(at / step * Shape::array + back_row<Shape>(thread, 0) * Shape::pitch + s + at % step, out);
    }
}

// `step` tokens from s on: their states and y again from h, the states before them; then lambda from behind them to
// before them.
template <class Shape>
__device__ __forceinline__ void back_walk(const BackTile<Shape>& tile, int s, const float (&h)[Shape::C][Shape::S],
                                          const float (&A)[Shape::C][Shape::S], float (&lambda)[Shape::C][Shape::S],
                                          float (&dA)[Shape::C][Shape::S], int thread)
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, step = Shape::step, round = Shape::round;
    constexpr int which = Shape::terms_which;
    const int part = thread % Shape::lanes;
    const int warp = thread / device::warp_size, lane = thread % device::warp_size;
    int at[C];
    device::Vec<float, step> delta_in[C], du_in[C];
#pragma unroll
    for (int k = 0; k < C; k++) {
        at[k] = back_row<Shape>(thread, k) * Shape::pitch + s;
        delta_in[k] = tile.delta.template load<step>(at[k]);
        du_in[k] = tile.du.template load<step>(at[k]);
    }
    float a[step][C][S], state[step + 1][C][S], y[C * step];
#pragma unroll
    for (int k = 0; k < C; k++)
#pragma unroll
        for (int n = 0; n < S; n++) state[0][k][n] = h[k][n];
#pragma unroll
    for (int i = 0; i < step; i++) {
        const auto B = tile.BC.template load<S>((s + i) * 2 * N + part * S);
        const auto C_ = tile.BC.template load<S>((s + i) * 2 * N + N + part * S);
#pragma unroll
        for (int k = 0; k < C; k++) {
            float& sum = y[k * step + i];
#pragma unroll
            for (int n = 0; n < S; n++) {
                a[i][k][n] = device::exp2(delta_in[k][i] * A[k][n]);
                state[i + 1][k][n] = fmaf(a[i][k][n], state[i][k][n], B[n] * du_in[k][i]);
                sum = n == 0 ? state[i + 1][k][n] * C_[n] : fmaf(state[i + 1][k][n], C_[n], sum);
            }
        }
    }
    back_sums<Shape>(tile.y, s, y, thread);

    float sums[2 * C * step];
    device::Vec<float, round> delta_of[C], du_of[C], gy_of[C];  // read again, to hold fewer registers meanwhile
#pragma unroll
    for (int i = step - 1; i >= 0; i--) {
        if (i % round == round - 1) {
#pragma unroll
            for (int k = 0; k < C; k++) {
                delta_of[k] = tile.delta.template load<round>(at[k] + i / round * round);
                du_of[k] = tile.du.template load<round>(at[k] + i / round * round);
                gy_of[k] = tile.gy.template load<round>(at[k] + i / round * round);
            }
        }
        const auto B = tile.BC.template load<S>((s + i) * 2 * N + part * S);
        const auto C_ = tile.BC.template load<S>((s + i) * 2 * N + N + part * S);
        device::Vec<float, S> dB, dC;
#pragma unroll
        for (int k = 0; k < C; k++) {
            const float delta = delta_of[k][i % round], du = du_of[k][i % round], gy = gy_of[k][i % round];
            float &lambda_B = sums[2 * k * step + i], &lambda_A = sums[(2 * k + 1) * step + i];
#pragma unroll
            for (int n = 0; n < S; n++) {
                const float l = fmaf(gy, C_[n], lambda[k][n]);
                lambda_B = n == 0 ? l * B[n] : fmaf(l, B[n], lambda_B);
                dB[n] = k == 0 ? l * du : fmaf(l, du, dB[n]);
                dC[n] = k == 0 ? gy * state[i + 1][k][n] : fmaf(gy, state[i + 1][k][n], dC[n]);
                lambda[k][n] = l * a[i][k][n];
                const float kept = lambda[k][n] * state[i][k][n];
                lambda_A = n == 0 ? kept * A[k][n] : fmaf(kept, A[k][n], lambda_A);
                dA[k][n] = fmaf(delta, kept, dA[k][n]);
            }
        }
        const int terms = warp * Shape::terms;
        tile.terms.template store<S>(terms + i % round * 2 * which + lane * S, dB);
        tile.terms.template store<S>(terms + (i % round * 2 + 1) * which + lane * S, dC);
        if (i % round != 0) continue;
        device::sync_warp();
        constexpr int all = round * 2 * N, W = all >= 4 * device::warp_size ? 4 : all / device::warp_size;
#pragma unroll
        for (int v = 0; v < all; v += W * device::warp_size) {  // token, dB or dC, state
            const int at = v + lane * W, token = at / (2 * N), n = at % (2 * N);
            const int from = terms + (token * 2 + n / N) * which + n % N;
            auto sum = tile.terms.template load<W>(from);
#pragma unroll
            for (int g = 1; g < device::warp_size / Shape::lanes; g++) {
                const auto more = tile.terms.template load<W>(from + g * N);
#pragma unroll
                for (int j = 0; j < W; j++) sum[j] += more[j];
            }
            tile.rows.template store<W>((warp * Shape::tile + s + i + token) * 2 * N + n, sum);
        }
        device::sync_warp();
    }
    back_sums<Shape>(tile.du, s, sums, thread);
}

}  // namespace vimcore::cuda
