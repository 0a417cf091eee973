// SPDX-License-Identifier: Apache-2.0
// Selective scan of d_state 8, 16, 32 or 64, both directions in one launch:
//   delta[t, e] = softplus(dt_bias[e] + sum_r q[t, r] dt_weight[e, r]);  B = q[t, R : R + N], C = q[t, R + N :]
//   h[n, e] = 2^(delta A[e, n]) h[n, e] + delta u[t, e] B[t, n];  y[t, e] = sum_n C[t, n] h[n, e] + D[e] u[t, e]
//   out = scale (y_forward + y_reverse) silu(z)
// u, out, z (B, len, E); q (B, len, row), row >= R + 2N; state (B, N, E).
// A block takes some channels of one image, with a warp or two for each direction, and walks through time in tiles, the
// forward direction from the first tile, the reverse one from the last. Directions of one warp wait for each other in
// the middle only. Whichever direction comes first to a tile leaves its y as float in `sum`, the other one adds, scales
// and gates. What is in shared memory but q is in the order of the scan, so that but for the addresses of rows both
// directions run the same code. A thread holds C channels x S states in registers; N / S lanes share a channel. One
// step of the loop over tiles:
//   delta   delta and delta u of the tile, float, once per token and channel; tokens beyond the end get delta 0, which
//           leaves the states as they are
//   scan    the recurrence; meanwhile u and q of the next tile, and z and sum of this one, are copied to shared memory
//   finish  skip, sum of directions, gate, whole rows to `out`; q of the next tile to float
// y is summed over states in one order whatever C and S are: chains of 4, then pairs of neighbours. So all shapes and
// tiles give the same bits, and the choice may follow the batch.
#pragma once

#include <type_traits>

#include "scan/tuned_delta.cuh"

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
    float inverse_scale;
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

// delta and delta u of some tokens.
template <int count, class Shape>
__device__ __forceinline__ void load_steps(const TunedTile<Shape>& tile, int row, int s, float (&delta)[count],
                                           float (&du)[count])
{
#pragma unroll
    for (int i = 0; i < count; i += 2) {
        const auto pair = tile.steps.template load<4>(row * Shape::pitch + 2 * (s + i));
        delta[i] = pair[0];
        du[i] = pair[1];
        delta[i + 1] = pair[2];
        du[i + 1] = pair[3];
    }
}

template <class Shape, int C, int S>
__device__ __forceinline__ void tile_scan(const TunedTile<Shape>& tile, float (&h)[C][S], const float (&A)[C][S],
                                          int thread)
{
    constexpr int N = Shape::states, lanes = Shape::lanes, slots = Shape::slots, groups = S / 4, step = 4;
    const int slot = thread / lanes, part = thread % lanes;
#pragma unroll 1
    for (int s = 0; s < Shape::tile; s += step) {
        float delta[C][2], du[C][2];
        float y[C * step];
#pragma unroll
        for (int i = 0; i < step; i++) {
            if (i % 2 == 0) {
#pragma unroll
                for (int k = 0; k < C; k++) load_steps<2>(tile, slot + k * slots, s + i, delta[k], du[k]);
            }
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
                        state = fmaf(device::exp2(delta[k][i % 2] * A[k][4 * g + n]), state, B_[n] * du[k][i % 2]);
                        sum[k][g] = n == 0 ? state * C_[n] : fmaf(state, C_[n], sum[k][g]);
                    }
            }
#pragma unroll
            for (int k = 0; k < C; k++) y[k * step + i] = pairwise<groups>(sum[k]);
        }
        const int first = reduce_scatter<lanes>(y, part);
        constexpr int kept = C * step / lanes > 0 ? C * step / lanes : 1, vector = kept < step ? kept : step;
        if constexpr (lanes > 1) device::sync_warp();  // the other lanes have read what y takes the place of
        if (lanes <= C * step || part < C * step) {
#pragma unroll
            for (int i = 0; i < kept; i += vector) {
                device::Vec<float, vector> out;
#pragma unroll
                for (int j = 0; j < vector; j++) out[j] = y[i + j];
                const int k = (first + i) / step, at = (first + i) % step;
                tile.steps.template store<vector>(Shape::y_of(slot + k * slots, s) + at, out);
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
        float delta[4], du[4];
        load_steps<4>(tile, channel, s, delta, du);
        const auto B = tile.BC.template load<4>(n * Shape::BC_pitch + s);
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
            const auto C = tile.BC.template load<4>(N * Shape::BC_pitch + s * Shape::C_pitch + 4 * g);
            sum[g] = state[0] * C[0];
#pragma unroll
            for (int i = 1; i < 4; i++) sum[g] = fmaf(state[i], C[i], sum[g]);
        }
        tile.steps[Shape::y_of(channel, s)] = pairwise<N / 4>(sum);
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// Blocks of a multiprocessor that registers must be left for: as many as fit without spills. Six of the first are all
// of 128 images of 384 channels at a time, on 132 multiprocessors.
template <class Shape>
inline constexpr int tuned_blocks = Shape::threads == device::warp_size                              ? 6
                                    : Shape::thread_states == 1 && sizeof(typename Shape::Type) == 2 ? 4
                                                                                                     : 3;

template <class Shape>
__global__ void __launch_bounds__(2 * Shape::threads, tuned_blocks<Shape>)
    scan_tuned(const __grid_constant__ TunedScan<typename Shape::Type> a)
{
    using T = typename Shape::Type;
    using Copy = TunedCopy<Shape, T>;
    using CopySum = TunedCopy<Shape, float>;
    constexpr int N = Shape::states, C = Shape::thread_channels, S = Shape::thread_states, K = Shape::tile;
    constexpr int channels = Shape::channels;
    const int direction = static_cast<int>(threadIdx.x) / Shape::threads;
    const int thread = static_cast<int>(threadIdx.x) % Shape::threads;
    const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.groups)), e0 = group * channels;
    const Index b = blockIdx.x / static_cast<unsigned>(a.groups);
    const int live = Shape::straight || a.dim - e0 > channels ? channels : a.dim - e0;
    const TunedPass<T>& p = a.pass[direction];
    const bool both = Shape::straight || a.directions == 2;
    const TunedLayout layout = Shape::layout(a.rank, a.row);
    const TunedTile<Shape> tile(layout, direction * layout.bytes, a.row);
    const int tiles = (a.tokens + K - 1) / K, way = p.reverse ? -1 : 1, row = way * a.dim;

    load_weights(tile, p.dt_weight, p.dt_bias, p.D, a.rank, e0, live, thread);
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

    // Only the last tile has fewer than K tokens: where time runs backwards it comes first.
    const int last_count = a.tokens - (tiles - 1) * K;
    auto count_of = [&](int step) { return step == (p.reverse ? 0 : tiles - 1) ? last_count : K; };
    // Where a tile's first token lies: in u and sum, and in out, z being twice as long. From there on, where this
    // thread copies from and writes to.
    using Offset = std::conditional_t<Shape::straight, int, Index>;
    const int start = p.reverse ? a.tokens - 1 : 0;
    const Offset image = static_cast<Offset>(b);
    Offset own = (image * a.tokens + start) * a.dim;
    Offset place = Shape::straight ? own : (image * a.len + start) * a.dim;
    const int copied = Copy::row(thread) * row + e0 + Copy::channel(thread);
    const int copied_z = copied + Copy::row(thread) * row;
    const int copied_sum = CopySum::row(thread) * row + e0 + CopySum::channel(thread);
    const int written = thread / Shape::sets * Shape::deep * row + e0 + Shape::wide * (thread % Shape::sets);
    auto fetch = [&](int index, Offset from, int count, int u_at) {
        copy_q<Shape>(tile.q, p.q + (image * a.tokens + index * K) * a.row, count * a.row, K * a.row, a.q_bytes,
                      thread);
        copy_channels<Shape, Shape::u_pitch>(tile.u, u_at, p.u + (from + copied), row, count, live, a.aligned, thread);
    };

    fetch(p.reverse ? tiles - 1 : 0, own, count_of(0), 0);
    device::cp_async_commit();
    device::cp_async_wait<0>();
    sync_direction<Shape>();
    convert_q(tile, a.rank, a.row, count_of(0), p.reverse, thread);
    sync_direction<Shape>();
#pragma unroll 1
    for (int step = 0; step < tiles; step++) {
        const int left = tiles - 1 - step, count = count_of(step), u_at = (step & 1) * K * Shape::u_pitch;
        // Alone; or first to come, second to come, or both at once, when direction 1 does it.
        const bool meet = both && step == left, second = both && step > left;
        const bool writes = !meet || direction == 1, last = !both || meet || second;
        const bool finishes = writes && last && (Shape::straight || (both ? a.pass[1].finish : p.finish));
        if (second && step - left <= 2) device::sync_block();  // the other direction has written its first half
        tile_delta(tile, u_at, a.rank, a.row, count, p.reverse, thread);
        sync_direction<Shape>();

        const int to_next = count * row;
        if (left > 0)
            fetch(p.reverse ? left - 1 : step + 1, own + to_next, count_of(step + 1), K * Shape::u_pitch - u_at);
        if (second)
            copy_channels<Shape, channels>(tile.sum, 0, a.sum + (own + copied_sum), row, count, live, a.aligned,
                                           thread);
        if (finishes)
            copy_channels<Shape, channels>(tile.z, 0, a.z + (2 * place + copied_z), 2 * row, count, live, a.aligned,
                                           thread);
        device::cp_async_commit();

        if (p.checkpoints) {  // where a chunk begins, in natural order
            const int begin = a.begin + (p.reverse ? left : step) * K;
            if (p.reverse ? step == 0 || (begin + K) % a.chunk == 0 : begin % a.chunk == 0)
                keep_states(p.checkpoints + (b * p.chunks + begin / a.chunk) * N * a.dim);
        }
        tile_scan(tile, h, A, thread);
        device::cp_async_wait<0>();
        sync_direction<Shape>();
        if (meet) {
            device::sync_block();
            const TunedTile<Shape> other(layout, 0, a.row);
            if (direction == 1) tile_meet(tile, other, u_at, count, thread);
            device::sync_block();
        }
        if (writes)
            tile_finish(tile, u_at,
                        {a.out + (place + written), last ? nullptr : a.sum + (own + written), row, meet || second,
                         p.add && !both, finishes, a.aligned, a.inverse_scale},
                        count, live, thread);
        if (left > 0) convert_q(tile, a.rank, a.row, count_of(step + 1), p.reverse, thread);
        sync_direction<Shape>();
        own += to_next;
        place = Shape::straight ? own : place + to_next;
    }
    if (p.state) keep_states(p.state + b * N * a.dim);
}

}  // namespace vimcore::cuda
