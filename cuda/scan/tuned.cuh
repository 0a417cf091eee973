// SPDX-License-Identifier: Apache-2.0
// Selective scan of d_state 8, 16, 32 or 64, both directions in one launch:
//   delta[t, e] = softplus(dt_bias[e] + sum_r q[t, r] dt_weight[e, r]);  B = q[t, R : R + N], C = q[t, R + N :]
//   h[n, e] = 2^(delta A[e, n]) h[n, e] + delta u[t, e] B[t, n];  y[t, e] = sum_n C[t, n] h[n, e] + D[e] u[t, e]
//   out = scale (y_forward + y_reverse) silu(z)
// u, out, z (B, len, E); q (B, len, row), row >= R + 2N; state (B, N, E).
// A block takes some channels of one image, with 64 threads for each direction, and walks through time in tiles, the
// forward direction from the first tile, the reverse one from the last. Whichever direction comes first to a tile
// leaves its y as float in `sum`, the other one adds, scales and gates. What is in shared memory is in the order of the
// scan, so that but for the addresses of rows both directions run the same code. A thread holds C channels x S states
// in registers; N / S lanes share a channel. One step of the loop over tiles:
//   delta   delta and delta u of the tile, float, once per token and channel; tokens beyond the end get delta 0, which
//           leaves the states as they are
//   scan    the recurrence; meanwhile u and q of the next tile, and z and sum of this one, are copied to shared memory
//   finish  skip, sum of directions, gate, whole rows to `out`; q of the next tile to float
// y is summed over states in one order whatever C and S are: chains of 4, then pairs of neighbours. So all shapes and
// tiles give the same bits, and the choice may follow the batch.
#pragma once

#include "scan/tuned_tile.cuh"

namespace vimcore::cuda {

template <class T>
struct TunedPass {
    const T *u, *q;
    const float *A_log, *D, *dt_weight, *dt_bias;
    float *state, *checkpoints;  // or null
    int chunks;
    bool reverse, add, finish;
};

template <class T>
struct TunedScan {
    TunedPass<T> pass[2];
    const T* z;
    T* out;                       // z and out: first token of the passes
    float* sum;                   // (B, tokens, E) for two directions
    int groups;                   // of channels
    int tokens, len, dim, begin;  // len: rows from image to image in z and out
    int chunk, rank, row, directions;
    int q_bytes;   // that one copy of q takes: 16, 8, 4, or 0 where its rows are not aligned
    bool aligned;  // rows of u, z, out and sum by 16 bytes
    float scale;
};

// ---- the recurrence ------------------------------------------------------------------------------------------------

// Sum of neighbours, then of their sums, ...
template <int count>
__device__ __forceinline__ float pairwise(const float* x)
{
    if constexpr (count == 1)
        return x[0];
    else
        return pairwise<count / 2>(x) + pairwise<count / 2>(x + count / 2);
}

// Sums y over `lanes` neighbouring lanes; each keeps its part of them, from the index returned on.
template <int lanes, int count>
__device__ __forceinline__ int reduce_scatter(float (&y)[count], int lane)
{
    int first = 0;
#pragma unroll
    for (int bit = 1, width = count; bit < lanes; bit *= 2) {
        if (width == 1) {
            y[0] += device::shuffle_xor(y[0], bit);
            continue;
        }
        width /= 2;
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < width; i++) {
            const float keep = upper ? y[i + width] : y[i], send = upper ? y[i] : y[i + width];
            y[i] = keep + device::shuffle_xor(send, bit);
        }
        if (upper) first += width;
    }
    return first;
}

template <class Shape, int C, int S>
__device__ __forceinline__ void tile_scan(const TunedTile<Shape>& tile, float (&h)[C][S], const float (&A)[C][S],
                                          int thread)
{
    constexpr int N = Shape::states, lanes = Shape::lanes, slots = Shape::slots, groups = S / 4, step = 4;
    const int slot = thread / lanes, part = thread % lanes;
#pragma unroll 1
    for (int s = 0; s < Shape::tile; s += step) {
        device::Vec<float, step> delta[C], du[C];
#pragma unroll
        for (int k = 0; k < C; k++) {
            delta[k] = tile.delta.template load<step>((slot + k * slots) * Shape::pitch + s);
            du[k] = tile.du.template load<step>((slot + k * slots) * Shape::pitch + s);
        }
        float y[C * step];
#pragma unroll
        for (int i = 0; i < step; i++) {
            float sum[C][groups];
#pragma unroll
            for (int g = 0; g < groups; g++) {
                const auto B_ = tile.BC.template load<4>((s + i) * 2 * N + part * S + 4 * g);
                const auto C_ = tile.BC.template load<4>((s + i) * 2 * N + N + part * S + 4 * g);
#pragma unroll
                for (int k = 0; k < C; k++)
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        float& state = h[k][4 * g + n];
                        state = fmaf(device::exp2(delta[k][i] * A[k][4 * g + n]), state, B_[n] * du[k][i]);
                        sum[k][g] = n == 0 ? state * C_[n] : fmaf(state, C_[n], sum[k][g]);
                    }
            }
#pragma unroll
            for (int k = 0; k < C; k++) y[k * step + i] = pairwise<groups>(sum[k]);
        }
        const int first = reduce_scatter<lanes>(y, part);
        constexpr int kept = C * step / lanes > 0 ? C * step / lanes : 1, vector = kept < step ? kept : step;
        device::sync_warp();  // the other lanes have read du
        if (lanes <= C * step || part < C * step) {
#pragma unroll
            for (int i = 0; i < kept; i += vector) {
                device::Vec<float, vector> out;
#pragma unroll
                for (int j = 0; j < vector; j++) out[j] = y[i + j];
                const int k = (first + i) / step, at = (first + i) % step;
                tile.du.template store<vector>((slot + k * slots) * Shape::pitch + s + at, out);
            }
        }
    }
}

// A lane per state: the lanes lay out their states, then each of them sums whole tokens.
template <class Shape>
__device__ __forceinline__ void tile_scan(const TunedTile<Shape>& tile, float (&h)[1][1], const float (&A)[1][1],
                                          int thread)
{
    constexpr int N = Shape::states;
    const int channel = thread / N, n = thread % N, lane = thread % device::warp_size;
    const int spread = thread / device::warp_size * Shape::tile * scan_spread;
#pragma unroll 4
    for (int s = 0; s < Shape::tile; s += 4) {
        const auto delta = tile.delta.template load<4>(channel * Shape::pitch + s);
        const auto du = tile.du.template load<4>(channel * Shape::pitch + s);
        const auto B = tile.BC.template load<4>(n * Shape::pitch + s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            h[0][0] = fmaf(device::exp2(delta[i] * A[0][0]), h[0][0], B[i] * du[i]);
            tile.spread[spread + (s + i) * scan_spread + lane] = h[0][0];
        }
    }
    device::sync_warp();
#pragma unroll
    for (int s = n; s < Shape::tile; s += N) {
        float sum[N / 4];
#pragma unroll
        for (int g = 0; g < N / 4; g++) {
            const auto state = tile.spread.template load<4>(spread + s * scan_spread + lane / N * N + 4 * g);
            const auto C = tile.BC.template load<4>(N * Shape::pitch + s * Shape::C_pitch + 4 * g);
            sum[g] = state[0] * C[0];
#pragma unroll
            for (int i = 1; i < 4; i++) sum[g] = fmaf(state[i], C[i], sum[g]);
        }
        tile.du[channel * Shape::pitch + s] = pairwise<N / 4>(sum);
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// One tile of a direction: `count` tokens; the scan starts at `first`.
struct TunedRows {
    int first, count;
};

__device__ __forceinline__ TunedRows tuned_rows(int index, int tile, int tokens, bool reverse)
{
    const int begin = index * tile, count = tokens - begin < tile ? tokens - begin : tile;
    return {reverse ? begin + count - 1 : begin, count};
}

// Blocks of a multiprocessor that registers must be left for: as many as fit without spills.
template <class Shape>
inline constexpr int tuned_blocks =
    Shape::states == 16 && Shape::thread_states != 4 && sizeof(typename Shape::Type) == 2 ? 4 : 3;

template <class Shape>
__global__ void __launch_bounds__(2 * scan_threads, tuned_blocks<Shape>) scan_tuned(TunedScan<typename Shape::Type> a)
{
    using T = typename Shape::Type;
    using Copy = TunedCopy<Shape, T>;
    using CopySum = TunedCopy<Shape, float>;
    constexpr int N = Shape::states, C = Shape::thread_channels, S = Shape::thread_states;
    constexpr int channels = Shape::channels;
    const int direction = static_cast<int>(threadIdx.x) / scan_threads;
    const int thread = static_cast<int>(threadIdx.x) % scan_threads;
    const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.groups)), e0 = group * channels;
    const Index b = blockIdx.x / static_cast<unsigned>(a.groups);
    const int live = a.dim - e0 < channels ? a.dim - e0 : channels;
    const TunedPass<T> p = direction == 0 ? a.pass[0] : a.pass[1];
    const bool both = a.directions == 2;
    const TunedLayout layout = Shape::layout(a.rank, a.row);
    const TunedTile<Shape> tile(layout, direction * layout.bytes, a.rank, a.row);
    const int tiles = (a.tokens + Shape::tile - 1) / Shape::tile, way = p.reverse ? -1 : 1, row = way * a.dim;

    // These walk along: u to this thread's first copy of the next tile, q to the beginning of the next tile.
    const Index start = (p.reverse ? a.tokens - 1 : 0) + way * Copy::row(thread);
    const T* u = p.u + (b * a.tokens + start) * a.dim + e0 + Copy::channel(thread);
    const T* q = p.q + (b * a.tokens + (p.reverse ? (tiles - 1) * Shape::tile : 0)) * a.row;

    for (int c = thread; c < channels; c += scan_threads) {
        const bool is = c < live;
        for (int r = 0; r < a.rank; r++)
            tile.weight[r * channels + c] = is ? p.dt_weight[static_cast<Index>(e0 + c) * a.rank + r] : 0.0f;
        tile.weight[a.rank * channels + c] = is ? p.dt_bias[e0 + c] : 0.0f;
        tile.weight[(a.rank + 1) * channels + c] = is ? p.D[e0 + c] : 0.0f;
    }
    const int slot = thread / Shape::lanes, part = thread % Shape::lanes;
    float A[C][S], h[C][S];
#pragma unroll
    for (int k = 0; k < C; k++) {
        const int c = Shape::channel_of(slot + k * Shape::slots), e = e0 + c;
#pragma unroll
        for (int n = 0; n < S; n++) {
            const bool is = c < live;
            A[k][n] = is ? -expf(p.A_log[static_cast<Index>(e) * N + part * S + n]) * device::log2e : 0.0f;
            h[k][n] = is && p.state ? p.state[(b * N + part * S + n) * a.dim + e] : 0.0f;
        }
    }
    auto keep_states = [&](float* to) {  // (N, E)
#pragma unroll
        for (int k = 0; k < C; k++) {
            const int c = Shape::channel_of(slot + k * Shape::slots);
#pragma unroll
            for (int n = 0; n < S; n++)
                if (c < live) to[static_cast<Index>(part * S + n) * a.dim + e0 + c] = h[k][n];
        }
    };

    TunedRows rows{};
    for (int step = -1; step < tiles; step++) {  // -1: nothing but the copies for tile 0
        const int left = tiles - 1 - step;
        const int u_at = (step & 1) * Shape::tile * channels;
        if (step >= 0) {
            device::sync_block();
            tile_delta(tile, u_at, a.rank, rows.count, thread);
            device::sync_block();
        }

        // Alone; or first to come, second to come, or both at once, when direction 1 does it.
        const bool meet = both && step == left, second = both && step > left;
        const bool writes = step >= 0 && (!meet || direction == 1), last = !both || meet || second;
        const bool finishes = writes && last && (both ? a.pass[1].finish : p.finish);
        TunedRows next = rows;
        if (left > 0) {
            next = tuned_rows(p.reverse ? left - 1 : step + 1, Shape::tile, a.tokens, p.reverse);
            copy_q(tile.q, q, next.count * a.row, Shape::tile * a.row, a.q_bytes, thread);
            copy_channels<Shape>(tile.u, Shape::tile * channels - u_at, u, row, next.count, live, a.aligned, thread);
            q += static_cast<Index>(way * Shape::tile) * a.row;
            u += static_cast<Index>(next.count) * row;
        }
        const Index token = b * a.len + rows.first, own_token = b * a.tokens + rows.first;
        if (second) {
            const float* const from =
                a.sum + (own_token + way * CopySum::row(thread)) * a.dim + e0 + CopySum::channel(thread);
            copy_channels<Shape>(tile.sum, 0, from, row, rows.count, live, a.aligned, thread);
        }
        if (finishes) {
            const T* const from = a.z + (token + way * Copy::row(thread)) * 2 * a.dim + e0 + Copy::channel(thread);
            copy_channels<Shape>(tile.z, 0, from, 2 * row, rows.count, live, a.aligned, thread);
        }
        device::cp_async_commit();

        if (step >= 0) {
            if (p.checkpoints) {
                const int natural = a.begin + rows.first;
                if (p.reverse ? step == 0 || (natural + 1) % a.chunk == 0 : natural % a.chunk == 0)
                    keep_states(p.checkpoints + (b * p.chunks + natural / a.chunk) * N * a.dim);
            }
            tile_scan(tile, h, A, thread);
        }
        device::cp_async_wait<0>();
        device::sync_block();
        if (meet) {
            const TunedTile<Shape> other(layout, 0, a.rank, a.row);
            if (direction == 1) tile_meet(tile, other, u_at, a.rank, rows.count, thread);
            device::sync_block();
        }
        if (writes) {
            const int e = e0 + Shape::wide * (thread % Shape::pairs);
            T* const out = a.out + token * a.dim + e;
            float* const sum = last ? nullptr : a.sum + own_token * a.dim + e;
            tile_finish(tile, u_at, a.rank,
                        {out, sum, row, meet || second, p.add && !both, finishes, a.aligned, a.scale}, rows.count, live,
                        thread);
        }
        if (left > 0) convert_q(tile, a.rank, a.row, next.count, p.reverse, thread);
        rows = next;
    }
    if (p.state) keep_states(p.state + b * N * a.dim);
}

}  // namespace vimcore::cuda
