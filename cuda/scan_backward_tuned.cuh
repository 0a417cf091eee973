// SPDX-License-Identifier: Apache-2.0
// The gradient of the scan of d_state 8, 16 or 32, both directions in one launch (formulas: scan_backward_generic.cuh).
// u, du, out, z, dout, dz (B, len, E); q (B, len, R + 2N); checkpoints (B, chunks, N, E).
// A block takes some channels of one image, with 64 threads for each direction, and walks through time in tiles of 16
// tokens from where the scan ended, so that the two directions meet in the middle. Whichever comes first to a tile
// leaves its y as float in `sum`; the other one adds, gates, and stores `out` and dz. A thread holds 2 channels x 4
// states. At the end of a chunk of several tiles, a run from the checkpoint keeps the states before each of them. One
// tile:
//   delta   q to float; delta, delta u, gy of the tile, once per token and channel. Tokens beyond the end get zeros,
//           which leave states and lambda as they are
//   run     the states before every fourth token
//   walk    from the last four tokens to the first: their decays and states again, kept in registers, and y; then
//           back through them with lambda
//   finish  du, draw, y with its skip, gate; the tile's share in ddt_weight, ddt_bias, dD and in dq
// What channels add to a row of dq meets in shared memory: 8 lanes of a warp, then the warps, in order; blocks leave
// float rows (`part`), scan_sums.h adds them up. So it does with dA, ddt_weight, ddt_bias, dD of every image.
#pragma once

#include "scan_backward_tile.cuh"
#include "scan_tuned.cuh"

namespace vimcore::cuda {

template <class T>
struct BackPass {
    const T *u, *q;
    const float *A_log, *D, *dt_weight, *dt_bias, *checkpoints;
    T* du;
    float* part;        // (B, groups, len, pitch): rows [dB | dC | ddt]
    float* parameters;  // (B, N + R + 2, E): dA, ddt_weight, ddt_bias, dD
    bool reverse;
};

template <class T>
struct TunedBack {
    BackPass<T> pass[2];
    const T *z, *dout;
    T *out, *dz;
    float* sum;     // (B, len, E) for two directions
    float* starts;  // (blocks, directions, tiles of a chunk - 1, 2, 64, 4) or null: a chunk is a tile
    int groups;     // of channels
    int tokens, dim, rank, pitch, directions;  // pitch: 2N + R, rounded up to 4
    int chunk_tiles, chunks;
    bool wide_q;  // four elements of q may be read at once
    float scale;
};

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

// ---- the recurrence ------------------------------------------------------------------------------------------------

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
    const int first = reduce_scatter<lanes, 2>(own, part);
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

// ---- the kernel ----------------------------------------------------------------------------------------------------

// Blocks of a multiprocessor that registers must be left for: as many as its shared memory has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int back_most_blocks = 2;
#else
inline constexpr int back_most_blocks = 3;
#endif
template <class Shape>
inline constexpr int back_blocks = Shape::states == 8 ? 2 : back_most_blocks;

template <class Shape>
__global__ void __launch_bounds__(2 * back_threads, back_blocks<Shape>)
    scan_backward_tuned(TunedBack<typename Shape::T> a)
{
    using T = typename Shape::T;
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, K = Shape::tile, step = Shape::step;
    constexpr int channels = Shape::channels;
    const int direction = static_cast<int>(threadIdx.x) / back_threads;
    const int thread = static_cast<int>(threadIdx.x) % back_threads;
    const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.groups)), e0 = group * channels;
    const Index b = blockIdx.x / static_cast<unsigned>(a.groups);
    const int live = a.dim - e0 < channels ? a.dim - e0 : channels;
    const BackPass<T>& p = a.pass[direction];
    const bool both = a.directions == 2, reverse = p.reverse;
    const int row = a.rank + 2 * N, tiles = (a.tokens + K - 1) / K;
    const BackLayout layout = Shape::layout(a.rank);
    const BackTile<Shape> tile(layout, direction * layout.bytes, a.rank);
    auto sync_direction = [&] { device::sync_group(1 + direction, back_threads); };

    for (int c = thread; c < channels; c += back_threads) {
        const bool is = c < live;
        for (int r = 0; r < a.rank; r++)
            tile.weight[r * channels + c] = is ? p.dt_weight[static_cast<Index>(e0 + c) * a.rank + r] : 0.0f;
        tile.weight[a.rank * channels + c] = is ? p.dt_bias[e0 + c] : 0.0f;
        tile.weight[(a.rank + 1) * channels + c] = is ? p.D[e0 + c] : 0.0f;
    }
    for (int i = thread; i < (a.rank + 2) * channels; i += back_threads) tile.totals[i] = 0.0f;

    const int part = thread % Shape::lanes;
    float A[C][S], lambda[C][S] = {}, dA[C][S] = {}, h[C][S];
#pragma unroll
    for (int k = 0; k < C; k++) {
        const int c = Shape::channel_of(back_row<Shape>(thread, k));
#pragma unroll
        for (int n = 0; n < S; n++)
            A[k][n] = c < live ? -expf(p.A_log[static_cast<Index>(e0 + c) * N + part * S + n]) * device::log2e : 0.0f;
    }
    // States of a tile's beginning: those of a chunk in `starts`, those of a step in shared memory.
    const Index own = (static_cast<Index>(blockIdx.x) * a.directions + direction) * (a.chunk_tiles - 1);
    auto start_at = [&](int j, int k) { return a.starts + (((own + j - 1) * C + k) * back_threads + thread) * S; };
    auto step_at = [&](int j, int k) { return ((j * C + k) * back_threads + thread) * S; };

    const Index image = b * a.tokens;
    const T* const q = p.q + image * row;
    auto part_of = [&](const BackRows& rows) {
        const int pair = thread % Shape::pairs, s0 = thread / Shape::pairs * Shape::deep;
        const Index place = (image + rows.natural(s0)) * a.dim + e0 + 2 * pair;
        return BackPart{pair, s0, 2 * pair < live ? rows.count - s0 : 0, rows.way * a.dim, place};
    };
    auto prepare = [&](const BackRows& rows) {
        sync_direction();  // all have left the tile before
        if (a.wide_q)
            back_load_q<4>(tile, q, a.rank, rows, thread);
        else
            back_load_q<1>(tile, q, a.rank, rows, thread);
        sync_direction();
        back_delta(tile, p.u, a.rank, part_of(rows));
    };

    for (int i = 0; i < tiles; i++) {
        const int left = tiles - 1 - i, index = reverse ? i : left;
        const int chunk = index / a.chunk_tiles, low = chunk * a.chunk_tiles;
        const int high = tiles - low < a.chunk_tiles ? tiles - 1 : low + a.chunk_tiles - 1;
        const int within = reverse ? high - index : index - low;  // tiles between the chunk's checkpoint and this one
        const bool chunk_ends = index == (reverse ? low : high);
        if (chunk_ends || within == 0) {
            const float* from =
                p.checkpoints + ((b * a.chunks + chunk) * N + part * S) * a.dim + e0 + 2 * (thread / Shape::lanes);
            const bool is = 2 * (thread / Shape::lanes) < live, swapped = (thread & 1) != 0;
#pragma unroll
            for (int n = 0; n < S; n++, from += a.dim) {
                device::Vec<float, 2> both{};
                if (is) both = device::load<2>(from);
                h[0][n] = swapped ? both[1] : both[0];
                h[1][n] = swapped ? both[0] : both[1];
            }
        } else {
#pragma unroll
            for (int k = 0; k < C; k++) get(h[k], device::load<S>(start_at(within, k)));
        }
#pragma unroll 1
        for (int j = 0; j < within && chunk_ends; j++) {
            prepare(back_rows(reverse ? high - j : low + j, K, a.tokens, reverse));
            sync_direction();
#pragma unroll 1
            for (int s = 0; s < K; s += step) back_run(tile, s, h, A, thread);
#pragma unroll
            for (int k = 0; k < C; k++) device::store(start_at(j + 1, k), put(h[k]));
        }

        const BackRows rows = back_rows(index, K, a.tokens, reverse);
        const BackPart own = part_of(rows);
        const Index gate = 2 * own.place - e0 - 2 * own.pair;
        prepare(rows);
        back_gy(tile, a.z + gate, a.dout, a.scale, own);
        sync_direction();
#pragma unroll 1
        for (int j = 0; j < K / step - 1; j++) {
#pragma unroll
            for (int k = 0; k < C; k++) tile.starts.template store<S>(step_at(j, k), put(h[k]));
            back_run(tile, j * step, h, A, thread);
        }
#pragma unroll 1
        for (int j = K / step - 1; j >= 0; j--) {
            if (j < K / step - 1) {
#pragma unroll
                for (int k = 0; k < C; k++) get(h[k], tile.starts.template load<S>(step_at(j, k)));
            }
            back_walk(tile, j * step, h, A, lambda, dA, thread);
        }
        sync_direction();

        float y[2][Shape::deep];
        back_finish(tile, p.u, p.du, a.rank, own, y);
        // Of two directions, the first to come to this tile; of both at once, the one that the other waits for.
        const bool first = both && (i < left || (i == left && direction == 0));
        if (first) store_part(a.sum + own.place, own.step, own.count, y);
        if (both)
            device::sync_block();
        else
            sync_direction();
        if (!first) {
            if (both) {
                float other[2][Shape::deep];
                load_part(a.sum + own.place, own.step, own.count, other);
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int s = 0; s < Shape::deep; s++) y[k][s] += other[k][s];
            }
            back_gate<Shape>(a.z + gate, a.dout, a.out, a.dz + gate, a.scale, own, y);
        }
        back_totals(tile, a.rank, thread);
        back_rows_out(tile, p.part + (b * a.groups + group) * a.tokens * a.pitch, a.rank, a.pitch, rows, thread);
    }

    sync_direction();
    float* const parameters = p.parameters + b * (N + a.rank + 2) * a.dim + e0;
#pragma unroll
    for (int k = 0; k < C; k++) {
        const int c = Shape::channel_of(back_row<Shape>(thread, k));
#pragma unroll
        for (int n = 0; n < S; n++)
            if (c < live) parameters[static_cast<Index>(part * S + n) * a.dim + c] = dA[k][n];
    }
    for (int i = thread; i < (a.rank + 2) * channels; i += back_threads) {
        const int r = i / channels, c = i % channels;
        if (c < live) parameters[static_cast<Index>(N + r) * a.dim + c] = tile.totals[i];
    }
}

}  // namespace vimcore::cuda
