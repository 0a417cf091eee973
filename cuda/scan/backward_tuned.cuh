// SPDX-License-Identifier: Apache-2.0
// The gradient of the scan of d_state 8, 16 or 32, both directions in one launch (formulas: scan/backward_generic.cuh).
// u, du, out, z, dout, dz (B, len, E); q (B, len, row); checkpoints (B, chunks, N, E).
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
// Long sequences are cut into segments, a block each: a launch before finds lambda and the sum of delta of every
// segment as if nothing came after it, from which a block has lambda of its own end. How they are cut depends on the
// length only. What channels add to a row of dq meets in shared memory: 8 lanes of a warp, then the warps, in order;
// blocks leave float rows (`part`), scan/sums.h adds them up. So it does with dA, ddt_weight, ddt_bias, dD of every
// image and segment.
#pragma once

#include "scan/backward_walk.cuh"

namespace vimcore::cuda {

template <class T>
struct BackPass {
    const T *u, *q;
    const float *A_log, *D, *dt_weight, *dt_bias, *checkpoints;
    T* du;
    float* part;            // (B, groups, len, pitch): rows [dB | dC | ddt]
    float* parameters;      // (B, segments, N + R + 2, E): dA, ddt_weight, ddt_bias, dD
    float *lambda, *steps;  // (B, segments, N, E), (B, segments, E): of a segment alone; or null, there is one
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
    int tokens, dim, rank, row, pitch, directions;  // row: of q; pitch: 2N + R, rounded up to 4
    int chunk_tiles, chunks;
    int segment_tiles, segments;  // a segment is some chunks
    bool wide_q;                  // four elements of q may be read at once
    float scale;
};

// ---- what both kernels do ------------------------------------------------------------------------------------------

template <class Shape>
struct BackBlock {
    using T = typename Shape::T;
    static constexpr int N = Shape::states, C = Shape::C, S = Shape::S, K = Shape::tile, channels = Shape::channels;

    const TunedBack<T>& a;
    const int direction = static_cast<int>(threadIdx.x) / back_threads;
    const int thread = static_cast<int>(threadIdx.x) % back_threads;
    const BackPass<T>& p = a.pass[direction];
    const bool reverse = p.reverse;
    const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.groups)), e0 = group * channels;
    const int unit = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.groups));  // image and segment
    const int b = unit / a.segments, segment = unit - b * a.segments;
    const int begin = segment * a.segment_tiles;  // first tile of the segment
    const BackLayout layout = Shape::layout(a.rank);
    const BackTile<Shape> tile{layout, direction * layout.bytes, a.rank};

    // Cheaper to find again than to keep in registers: channels of the block, tiles of the image, of the segment.
    __device__ __forceinline__ int live() const { return a.dim - e0 < channels ? a.dim - e0 : channels; }
    __device__ __forceinline__ int tiles() const { return (a.tokens + K - 1) / K; }
    __device__ __forceinline__ int count() const
    {
        return tiles() - begin < a.segment_tiles ? tiles() - begin : a.segment_tiles;
    }

    __device__ explicit BackBlock(const TunedBack<T>& args) : a(args) {}

    __device__ __forceinline__ void sync() const { device::sync_group(1 + direction, back_threads); }

    __device__ __forceinline__ void load_weights() const
    {
        for (int c = thread; c < channels; c += back_threads) {
            const bool is = c < live();
            for (int r = 0; r < a.rank; r++)
                tile.weight[r * channels + c] = is ? p.dt_weight[static_cast<Index>(e0 + c) * a.rank + r] : 0.0f;
            tile.weight[a.rank * channels + c] = is ? p.dt_bias[e0 + c] : 0.0f;
            tile.weight[(a.rank + 1) * channels + c] = is ? p.D[e0 + c] : 0.0f;
        }
    }
    __device__ __forceinline__ void load_A(float (&A)[C][S]) const
    {
        const int part = thread % Shape::lanes;
#pragma unroll
        for (int k = 0; k < C; k++) {
            const int c = Shape::channel_of(back_row<Shape>(thread, k));
#pragma unroll
            for (int n = 0; n < S; n++)
                A[k][n] =
                    c < live() ? -expf(p.A_log[static_cast<Index>(e0 + c) * N + part * S + n]) * device::log2e : 0.0f;
        }
    }
    // A thread's values of (N, E), whose channels begin at the block's; zeros beyond the last one.
    __device__ __forceinline__ void load_states(const float* from, float (&x)[C][S]) const
    {
        const int c = 2 * (thread / Shape::lanes);
        from += static_cast<Index>(thread % Shape::lanes * S) * a.dim + c;
        const bool swapped = (thread & 1) != 0;
#pragma unroll
        for (int n = 0; n < S; n++, from += a.dim) {
            device::Vec<float, 2> both{};
            if (c < live()) both = device::load<2>(from);
            x[0][n] = swapped ? both[1] : both[0];
            x[1][n] = swapped ? both[0] : both[1];
        }
    }
    __device__ __forceinline__ void store_states(float* to, const float (&x)[C][S]) const
    {
        const int c = 2 * (thread / Shape::lanes);
        if (c >= live()) return;
        to += static_cast<Index>(thread % Shape::lanes * S) * a.dim + c;
        const bool swapped = (thread & 1) != 0;
#pragma unroll
        for (int n = 0; n < S; n++, to += a.dim)
            device::store(to, device::Vec<float, 2>{{swapped ? x[1][n] : x[0][n], swapped ? x[0][n] : x[1][n]}});
    }

    __device__ __forceinline__ BackRows rows_of(int index) const { return back_rows(index, K, a.tokens, reverse); }
    __device__ __forceinline__ BackPart part_of(const BackRows& rows) const
    {
        const int pair = thread % Shape::pairs, s0 = thread / Shape::pairs * Shape::deep;
        const Index place = (static_cast<Index>(b) * a.tokens + rows.natural(s0)) * a.dim + e0 + 2 * pair;
        return {pair, s0, 2 * pair < live() ? rows.count - s0 : 0, rows.way * a.dim, place};
    }
    // Where a thread's part of a tensor (B, len, 2E) begins.
    __device__ __forceinline__ Index gate_of(const BackPart& own) const { return 2 * own.place - e0 - 2 * own.pair; }
    __device__ __forceinline__ void prepare(const BackRows& rows) const
    {
        const T* const q = p.q + static_cast<Index>(b) * a.tokens * a.row;
        sync();  // all have left the tile before
        if (a.wide_q)
            back_load_q<4>(tile, q, a.rank, a.row, rows, thread);
        else
            back_load_q<1>(tile, q, a.rank, a.row, rows, thread);
        sync();
        back_delta(tile, p.u, a.rank, part_of(rows));
    }
    __device__ __forceinline__ void prepare_gy(const BackRows& rows) const
    {
        const BackPart own = part_of(rows);
        back_gy(tile, a.z + gate_of(own), a.dout, a.scale, own);
        sync();
    }
};

// ---- the kernels ---------------------------------------------------------------------------------------------------

// Blocks of a multiprocessor that registers must be left for: as many as its shared memory has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int back_most_blocks = 2;
#else
inline constexpr int back_most_blocks = 3;
#endif
template <class Shape>
inline constexpr int back_blocks = Shape::states == 8 ? 2 : back_most_blocks;

// lambda and the sum of delta of every segment alone.
template <class Shape>
__global__ void __launch_bounds__(2 * back_threads, back_blocks<Shape>)
    scan_backward_ahead(TunedBack<typename Shape::T> a)
{
    constexpr int C = Shape::C, S = Shape::S, K = Shape::tile, step = Shape::step;
    const BackBlock<Shape> block(a);
    float A[C][S], lambda[C][S] = {}, steps[C] = {};
    block.load_weights();
    block.load_A(A);
    for (int i = 0; i < block.count(); i++) {
        const BackRows rows = block.rows_of(block.begin + (block.reverse ? i : block.count() - 1 - i));
        block.prepare(rows);
        block.prepare_gy(rows);
#pragma unroll 1
        for (int s = K - step; s >= 0; s -= step) back_ahead(block.tile, s, A, lambda, steps, block.thread);
    }
    const Index unit = block.unit;
    block.store_states(block.p.lambda + unit * Shape::states * a.dim + block.e0, lambda);
    if (block.thread % Shape::lanes != 0) return;
#pragma unroll
    for (int k = 0; k < C; k++) {
        const int c = Shape::channel_of(back_row<Shape>(block.thread, k));
        if (c < block.live()) block.p.steps[unit * a.dim + block.e0 + c] = steps[k];
    }
}

// lambda of a segment's end: what the segments after it, in the order of the scan, bring.
template <class Shape>
__device__ __forceinline__ void back_arrive(const BackBlock<Shape>& block, const float (&A)[Shape::C][Shape::S],
                                            float (&lambda)[Shape::C][Shape::S])
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S;
    const auto& a = block.a;
    const int after = block.reverse ? block.segment : a.segments - 1 - block.segment;
#pragma unroll 1
    for (int i = 0; i < after; i++) {
        const Index unit = static_cast<Index>(block.b) * a.segments + (block.reverse ? i : a.segments - 1 - i);
        float own[C][S];
        block.load_states(block.p.lambda + unit * N * a.dim + block.e0, own);
#pragma unroll
        for (int k = 0; k < C; k++) {
            const int c = Shape::channel_of(back_row<Shape>(block.thread, k));
            const float steps = c < block.live() ? block.p.steps[unit * a.dim + block.e0 + c] : 0.0f;
#pragma unroll
            for (int n = 0; n < S; n++) lambda[k][n] = fmaf(device::exp2(steps * A[k][n]), lambda[k][n], own[k][n]);
        }
    }
}

template <class Shape>
__global__ void __launch_bounds__(2 * back_threads, back_blocks<Shape>)
    scan_backward_tuned(TunedBack<typename Shape::T> a)
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, K = Shape::tile, step = Shape::step;
    constexpr int channels = Shape::channels;
    const BackBlock<Shape> block(a);
    const BackTile<Shape>& tile = block.tile;
    const auto& p = block.p;
    const int thread = block.thread, direction = block.direction;
    const bool both = a.directions == 2, reverse = block.reverse;
    float A[C][S], lambda[C][S] = {}, dA[C][S] = {}, h[C][S];
    block.load_weights();
    block.load_A(A);
    for (int i = thread; i < (a.rank + 2) * channels; i += back_threads) tile.totals[i] = 0.0f;
    back_arrive(block, A, lambda);

    // States of a tile's beginning: those of a chunk in `starts`, those of a step in shared memory.
    auto start_at = [&](int j, int k) {
        const Index chunk = static_cast<Index>(blockIdx.x) * a.directions + direction;
        return a.starts + (((chunk * (a.chunk_tiles - 1) + j - 1) * C + k) * back_threads + thread) * S;
    };
    auto step_at = [&](int j, int k) { return ((j * C + k) * back_threads + thread) * S; };

    for (int i = 0; i < block.count(); i++) {
        const int left = block.count() - 1 - i, index = block.begin + (reverse ? i : left);
        const int chunk = index / a.chunk_tiles, low = chunk * a.chunk_tiles;
        const int high = block.tiles() - low < a.chunk_tiles ? block.tiles() - 1 : low + a.chunk_tiles - 1;
        const int within = reverse ? high - index : index - low;  // tiles between the chunk's checkpoint and this one
        const bool chunk_ends = index == (reverse ? low : high);
        if (chunk_ends || within == 0) {
            block.load_states(p.checkpoints + (static_cast<Index>(block.b) * a.chunks + chunk) * N * a.dim + block.e0,
                              h);
        } else {
#pragma unroll
            for (int k = 0; k < C; k++) get(h[k], device::load<S>(start_at(within, k)));
        }
#pragma unroll 1
        for (int j = chunk_ends ? 0 : within;; j++) {
            block.prepare(block.rows_of(reverse ? high - j : low + j));
            if (j == within) break;
            block.sync();
#pragma unroll 1
            for (int s = 0; s < K; s += step) back_run(tile, s, h, A, thread);
#pragma unroll
            for (int k = 0; k < C; k++) device::store(start_at(j + 1, k), put(h[k]));
        }

        const BackRows rows = block.rows_of(index);
        block.prepare_gy(rows);
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
        block.sync();

        float y[2][Shape::deep];
        const BackPart own = block.part_of(rows);
        back_finish(tile, p.u, p.du, a.rank, own, y);
        // Of two directions, the first to come to this tile; of both at once, the one that the other waits for.
        const bool first = both && (i < left || (i == left && direction == 0));
        if (first) store_part(a.sum + own.place, own.step, own.count, y);
        if (both)
            device::sync_block();
        else
            block.sync();
        if (!first) {
            if (both) {
                float other[2][Shape::deep];
                load_part(a.sum + own.place, own.step, own.count, other);
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int s = 0; s < Shape::deep; s++) y[k][s] += other[k][s];
            }
            const Index gate = block.gate_of(own);
            back_gate<Shape>(a.z + gate, a.dout, a.out, a.dz + gate, a.scale, own, y);
        }
        back_totals(tile, a.rank, thread);
        float* const part_rows = p.part + (static_cast<Index>(block.b) * a.groups + block.group) * a.tokens * a.pitch;
        back_rows_out(tile, part_rows, a.rank, a.pitch, rows, thread);
    }

    block.sync();
    float* const parameters = p.parameters + static_cast<Index>(block.unit) * (N + a.rank + 2) * a.dim + block.e0;
    block.store_states(parameters, dA);
    for (int i = thread; i < (a.rank + 2) * channels; i += back_threads) {
        const int r = i / channels, c = i % channels;
        if (c < block.live()) parameters[static_cast<Index>(N + r) * a.dim + c] = tile.totals[i];
    }
}

}  // namespace vimcore::cuda
