// SPDX-License-Identifier: Apache-2.0
// The recurrences of the tuned scan's gradient (see scan/backward_tuned.cuh), four tokens of a tile at a time. A thread
// holds C channels x S states; the four lanes of a slot share its channels.
#pragma once

#include "scan/backward_products.cuh"

namespace vimcore::cuda {

// States of a thread in memory: four floats of each lane, then the next four.
template <class Shape, class Put>
__device__ __forceinline__ void put_states(const float (&x)[Shape::C][Shape::S], Put&& put)
{
#pragma unroll
    for (int v = 0; v < Shape::kept; v += 4) {
        device::Vec<float, 4> part;
#pragma unroll
        for (int i = 0; i < 4; i++) part[i] = x[(v + i) / Shape::S][(v + i) % Shape::S];
        put(v / 4, part);
    }
}
template <class Shape, class Get>
__device__ __forceinline__ void get_states(float (&x)[Shape::C][Shape::S], Get&& get)
{
#pragma unroll
    for (int v = 0; v < Shape::kept; v += 4) {
        const device::Vec<float, 4> part = get(v / 4);
#pragma unroll
        for (int i = 0; i < 4; i++) x[(v + i) / Shape::S][(v + i) % Shape::S] = part[i];
    }
}

template <class Shape>
__device__ __forceinline__ void put_states(const float (&x)[Shape::C][Shape::S], device::Shared<float> to, int lane)
{
    put_states<Shape>(x,
                      [&](int v, const auto& part) { to.template store<4>(BackTile<Shape>::state_of(v, lane), part); });
}
template <class Shape>
__device__ __forceinline__ void get_states(float (&x)[Shape::C][Shape::S], device::Shared<float> from, int lane)
{
    get_states<Shape>(x, [&](int v) { return from.template load<4>(BackTile<Shape>::state_of(v, lane)); });
}

// `step` tokens forward from s on.
template <class Shape>
__device__ __forceinline__ void back_run(const BackTile<Shape>& tile, int s, float (&h)[Shape::C][Shape::S],
                                         const float (&A)[Shape::C][Shape::S], int lane)
{
    constexpr int C = Shape::C, S = Shape::S;
    const int at = lane / 4 * C, state = lane % 4 * S;
#pragma unroll
    for (int i = 0; i < Shape::step; i++) {
        float B[S], delta[C], du[C];
        load_shared(tile.BC, s * 2 * Shape::states + tile.B_of(i) + state, B);
        load_shared(tile.delta, (s + i) * Shape::pitch + at, delta);
        load_shared(tile.du, (s + i) * Shape::pitch + at, du);
#pragma unroll
        for (int k = 0; k < C; k++)
#pragma unroll
            for (int n = 0; n < S; n++) h[k][n] = fmaf(device::exp2(delta[k] * A[k][n]), h[k][n], B[n] * du[k]);
    }
}

// `step` tokens from s on, back, nothing but lambda; delta is added to `steps`.
template <class Shape>
__device__ __forceinline__ void back_ahead(const BackTile<Shape>& tile, int s, const float (&A)[Shape::C][Shape::S],
                                           float (&lambda)[Shape::C][Shape::S], float (&steps)[Shape::C], int lane)
{
    constexpr int C = Shape::C, S = Shape::S;
    const int at = lane / 4 * C, state = lane % 4 * S;
#pragma unroll
    for (int i = Shape::step - 1; i >= 0; i--) {
        float C_[S], delta[C], gy[C];
        load_shared(tile.BC, s * 2 * Shape::states + tile.C_of(i) + state, C_);
        load_shared(tile.delta, (s + i) * Shape::pitch + at, delta);
        load_shared(tile.gy, (s + i) * Shape::pitch + at, gy);
#pragma unroll
        for (int k = 0; k < C; k++) {
            steps[k] += delta[k];
#pragma unroll
            for (int n = 0; n < S; n++)
                lambda[k][n] = fmaf(gy[k], C_[n], lambda[k][n]) * device::exp2(delta[k] * A[k][n]);
        }
    }
}

// What a thread needs of one of the four tokens: B and C begin at BC, the others at `at`.
template <class Shape>
struct BackToken {
    float B[Shape::S], C[Shape::S], delta[Shape::C], du[Shape::C], gy[Shape::C];

    __device__ __forceinline__ BackToken(const BackTile<Shape>& tile, int BC, int at, int i)
    {
        load_shared(tile.BC, BC + tile.B_of(i), B);
        load_shared(tile.BC, BC + tile.C_of(i), C);
        load_shared(tile.delta, at + i * Shape::pitch, delta);
        load_shared(tile.du, at + i * Shape::pitch, du);
        load_shared(tile.gy, at + i * Shape::pitch, gy);
    }
};

// What a warp adds to dB (0) and dC (1) of four tokens, of four states of a thread at a time.
template <class Shape>
struct BackRowSums {
    static constexpr int S = Shape::S, n = S < 4 ? S : 4;
    float sum[2][S / n][4] = {};

    __device__ __forceinline__ void add(int i, int which, const float (&x)[S], int lane)
    {
#pragma unroll
        for (int part = 0; part < S / n; part++) {
            float v[n];
#pragma unroll
            for (int k = 0; k < n; k++) v[k] = x[part * n + k];
            sum_slots<Shape::exact>(sum[which][part], i, v, lane);
        }
    }
    // To BC, in place of the four tokens from s on.
    __device__ __forceinline__ void store(const BackTile<Shape>& tile, int s, int lane) const
    {
        const int t = s + lane % 4, state = lane / 4 % 4 * S + lane / 16 * (n / 2);
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int part = 0; part < S / n; part++) {
                const float (&x)[4] = sum[which][part];
                float out[n / 2];
#pragma unroll
                for (int k = 0; k < n / 2; k++) out[k] = back_mend<Shape> * (x[k] + x[k + 2]);
                store_shared(tile.BC, (which == 0 ? tile.B_of(t) : tile.C_of(t)) + state + part * n, out);
            }
    }
};

// `step` tokens of step j: their states and y again from h, the states before them; then lambda from behind them to
// before them, and dA. Leaves y, and what BackTile says of delta, du, gy and BC.
template <class Shape>
__device__ __forceinline__ void back_walk(const BackTile<Shape>& tile, int j, float (&h)[Shape::C][Shape::S],
                                          const float (&A)[Shape::C][Shape::S], int lane)
{
    constexpr int C = Shape::C, S = Shape::S, step = Shape::step, pitch = Shape::pitch;
    constexpr float ln2 = 0.69314718055994531f;
    const int s = j * step, BC = s * 2 * Shape::states + lane % 4 * S, at = s * pitch + lane / 4 * C;
    float a[step][C][S], grown[step][C][S];  // decays; a h[t - 1]
    float y[4] = {}, lambda_A[4] = {}, lambda_B[4] = {};
    BackRowSums<Shape> rows;
#pragma unroll
    for (int i = 0; i < step; i++) {
        const BackToken<Shape> t(tile, BC, at, i);
        float sum[4] = {}, dC[S];
        if constexpr (!Shape::keeps_ones) device::renew(lane);
#pragma unroll
        for (int k = 0; k < C; k++)
#pragma unroll
            for (int n = 0; n < S; n++) {
                a[i][k][n] = device::exp2(t.delta[k] * A[k][n]);
                grown[i][k][n] = a[i][k][n] * h[k][n];
                h[k][n] = fmaf(t.B[n], t.du[k], grown[i][k][n]);
                sum[k] = n == 0 ? h[k][n] * t.C[n] : fmaf(h[k][n], t.C[n], sum[k]);
                dC[n] = k == 0 ? t.gy[k] * h[k][n] : fmaf(t.gy[k], h[k][n], dC[n]);
            }
        sum_states<true>(y, i, sum[0], sum[1], sum[2], sum[3], lane);
        rows.add(i, 1, dC, lane);
    }
    device::sync_warp();  // what was loaded is loaded again, to hold fewer registers
    float lambda[C][S], dA[C][S];
    get_states<Shape>(lambda, tile.lambda, lane);
    get_states<Shape>(dA, tile.dA, lane);
#pragma unroll
    for (int i = step - 1; i >= 0; i--) {
        const BackToken<Shape> t(tile, BC, at, i);
        float by_B[4] = {}, by_A[4] = {}, dB[S];
        if constexpr (!Shape::keeps_ones) device::renew(lane);
#pragma unroll
        for (int k = 0; k < C; k++)
#pragma unroll
            for (int n = 0; n < S; n++) {
                const float l = fmaf(t.gy[k], t.C[n], lambda[k][n]), kept = l * grown[i][k][n];
                by_B[k] = n == 0 ? l * t.B[n] : fmaf(l, t.B[n], by_B[k]);
                by_A[k] = n == 0 ? kept * A[k][n] : fmaf(kept, A[k][n], by_A[k]);
                dB[n] = k == 0 ? l * t.du[k] : fmaf(l, t.du[k], dB[n]);
                dA[k][n] = fmaf(t.delta[k], kept, dA[k][n]);
                lambda[k][n] = l * a[i][k][n];
            }
        if constexpr (C == 4) {
            sum_states<true>(lambda_B, i, by_B[0], by_B[1], by_B[2], by_B[3], lane);
            sum_states<true>(lambda_A, i, by_A[0], by_A[1], by_A[2], by_A[3], lane);
        } else {
            sum_states<true>(lambda_B, i, by_B[0], by_B[1], by_A[0], by_A[1], lane);
        }
        rows.add(i, 0, dB, lane);
    }
    put_states<Shape>(lambda, tile.lambda, lane);
    put_states<Shape>(dA, tile.dA, lane);
    if constexpr (C == 2) {
        lambda_A[0] = lambda_B[2];
        lambda_A[1] = lambda_B[3];
    }
    device::sync_warp();  // all lanes have read what follows writes over
    // A lane has all sums of one token of its slot's channels.
    const int own = at + lane % 4 * pitch;
    float delta[C], gy[C], D[C], by_one[C], by_u[C], out[C];
    load_shared(tile.delta, own, delta);
    load_shared(tile.gy, own, gy);
    load_shared(tile.D, lane / 4 * C, D);
#pragma unroll
    for (int k = 0; k < C; k++) {
        const float slope = softplus_slope(delta[k]);
        by_u[k] = slope * lambda_B[k];
        by_one[k] = slope * (ln2 * lambda_A[k]);
        gy[k] = fmaf(delta[k], lambda_B[k], D[k] * gy[k]);
        out[k] = y[k];
    }
    store_shared(tile.du, own, by_u);
    store_shared(tile.delta, own, by_one);
    store_shared(tile.gy, own, gy);
    store_shared(tile.y, own, out);
    rows.store(tile, s, lane);
}

}  // namespace vimcore::cuda
