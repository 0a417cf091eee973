// SPDX-License-Identifier: Apache-2.0
// The gradient of the scan of d_state 8, 16 or 32, both directions in one launch (formulas: scan/backward_generic.cuh).
// u, du, out, z, dout, dz (B, len, E); q (B, len, row); checkpoints (B, chunks, N, E).
// A block takes 64 channels of one image (32 of d_state 32), with two warps for each direction, and walks through time
// in tiles of 16 tokens from where the scan ended, so that the two directions meet in the middle. Whichever comes first
// to a tile leaves its y as float in `sum`; the other one adds, gates, and stores `out` and dz. A warp has 32 channels
// to itself, a thread 4 channels x 4 states; four lanes share channels. At the end of a chunk of several tiles, a run
// from the checkpoint keeps the states before each of them. One tile:
//   prepare  q to float; delta (a product of matrices, as are the projection's gradients), delta u, gy of the tile,
//   once
//            per token and channel. Tokens beyond the end get zeros, which leave states and lambda as they are
//   run      the states before every fourth token
//   walk     from the last four tokens to the first: their decays and states again, kept in registers, and y; then
//            back through them with lambda. Sums over the lanes of a channel, and over channels for dB and dC, are
//            products by ones; what follows of a token and channel is computed by the lane that has the sums
//   finish   du, draw, y with its skip, gate; the tile's share in ddt_weight, ddt_bias, dD and in dq
// Long sequences are cut into segments, a block each: a launch before finds lambda and the sum of delta of every
// segment as if nothing came after it, from which a block has lambda of its own end. How they are cut depends on the
// length only. What channels add to a row of dq meets in shared memory, the sums of both warps; blocks leave float rows
// (`part`), scan/sums.h adds them up. So it does with dA, ddt_weight, ddt_bias, dD of every image and segment.
#pragma once

#include "scan/backward_block.cuh"

namespace vimcore::cuda {

inline constexpr int back_blocks = 2;  // of a multiprocessor, that registers must be left for

// lambda and the sum of delta of every segment alone.
template <class Shape>
__global__ void __launch_bounds__(2 * back_threads, back_blocks) scan_backward_ahead(TunedBack<typename Shape::T> a)
{
    constexpr int C = Shape::C, S = Shape::S, K = Shape::tile, step = Shape::step;
    const BackBlock<Shape> block(a);
    float A[C][S], lambda[C][S] = {}, steps[C] = {};
    block.begin_tiles();
    block.load_A(A);
    for (int i = 0; i < block.count(); i++) {
        const BackRows rows = block.rows_of(block.begin + (block.reverse ? i : block.count() - 1 - i));
        const BackPart own = block.part_of(rows);
        float u[2][Shape::wide], gate[2][Shape::wide], dout[2][Shape::wide], delta[2][Shape::wide];
        block.load_u(own, u);
        block.load_gate(own, gate, dout);
        device::sync_warp();  // all have left the tile before
        block.load_BC(rows);
        block.compute_delta(rows, delta);
        block.store_delta(delta, u);
        back_gy(block.tile, gate, dout, u, a.scale, block.lane);
        device::sync_warp();
#pragma unroll 1
        for (int s = K - step; s >= 0; s -= step) back_ahead(block.tile, s, A, lambda, steps, block.lane);
    }
    const Index unit = block.unit;
    block.store_states(block.p.lambda + unit * Shape::states * a.dim + block.e0, lambda);
    if (block.lane % 4 != 0) return;
#pragma unroll
    for (int k = 0; k < C; k++) {
        const int c = block.lane / 4 * C + k;
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
            const int c = block.lane / 4 * C + k;
            const float steps = c < block.live() ? block.p.steps[unit * a.dim + block.e0 + c] : 0.0f;
#pragma unroll
            for (int n = 0; n < S; n++) lambda[k][n] = fmaf(device::exp2(steps * A[k][n]), lambda[k][n], own[k][n]);
        }
    }
}

// The tile's rows [dB | dC | ddt] of the block's share in dq, from both warps of the direction.
template <class Shape>
__device__ __forceinline__ void back_rows_out(const BackBlock<Shape>& block, const BackRows& rows)
{
    constexpr int N = Shape::states, K = Shape::tile, parts = N / 2;
    static_assert(back_warps == 2 && K * parts % back_threads == 0);
    const auto& a = block.a;
    const BackTile<Shape> one = block.tile_of(0), two = block.tile_of(1);
    float* const to = block.p.part + (static_cast<Index>(block.b) * a.groups + block.group) * a.tokens * a.pitch;
    auto add = [](device::Vec<float, 4> x, const device::Vec<float, 4>& y) {
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] += y[k];
        return x;
    };
#pragma unroll
    for (int k = 0; k < K * parts / back_threads; k++) {
        const int i = block.thread + k * back_threads, s = i / parts, n = i % parts * 4,
                  at = n < N ? one.B_of(s) + n : one.C_of(s) + n - N;
        const auto sum = add(one.BC.template load<4>(at), two.BC.template load<4>(at));
        if (s < rows.count) device::store(to + static_cast<Index>(rows.natural(s)) * a.pitch + n, sum);
    }
    const int s = block.thread / 4;
    if (s >= rows.count) return;
#pragma unroll 1
    for (int r = block.thread % 4 * 4; r < a.rank; r += 16) {
        const int at = s * one.padded + r;
        device::store(to + static_cast<Index>(rows.natural(s)) * a.pitch + 2 * N + r,
                      add(one.ddt.template load<4>(at), two.ddt.template load<4>(at)));
    }
}

// What tiles added up for the parameters.
template <class Shape>
__device__ __forceinline__ void back_parameters(const BackBlock<Shape>& block)
{
    constexpr int N = Shape::states, C = Shape::C, wide = Shape::wide;
    const auto& a = block.a;
    const int lane = block.lane, live = block.live();
    float* const to = block.p.parameters + static_cast<Index>(block.unit) * (N + a.rank + 2) * a.dim + block.e0;
    float dA[C][Shape::S];
    get_states<Shape>(dA, block.tile.dA, lane);
    block.store_states(to, dA);
    for (int r0 = 0; r0 < a.rank; r0 += 16)
        for (int j = 0; j < C; j++)
            for (int i = 0; i < 4; i++) {
                const int r = r0 + lane / 4 * 2 + i / 2, c = 8 * j + lane % 4 * 2 + i % 2;
                if (r < a.rank && c < live)
                    to[static_cast<Index>(N + r) * a.dim + c] =
                        block.tile.totals[((r0 / 16 * C + j) * device::warp_size + lane) * 4 + i];
            }
    device::sync_warp();
    for (int c = lane; c < live; c += device::warp_size) {
        const int k = c % wide;
        float sum = 0.0f;
        for (int g = 0; g < 8; g++) sum += block.tile.dD[(k / 4 * device::warp_size + 4 * g + c / wide) * 4 + k % 4];
        to[static_cast<Index>(N + a.rank) * a.dim + c] = block.tile.delta[block.tile.dbias_of(c)];
        to[static_cast<Index>(N + a.rank + 1) * a.dim + c] = sum;
    }
}

// From the checkpoint on through n tiles, what kept_of says of each; the last one's delta, du and BC stay.
template <class Shape>
__device__ __forceinline__ void back_run_chunk(const BackBlock<Shape>& block, int origin, int way, int n,
                                               const float* checkpoint, const float (&A)[Shape::C][Shape::S])
{
    constexpr int wide = Shape::wide, steps = Shape::tile / Shape::step, kept = Shape::kept / 4;
    float h[Shape::C][Shape::S];
    block.load_states(checkpoint, h);
#pragma unroll 1
    for (int j = 0; j < n; j++) {
        const BackRows rows = block.rows_of(origin + way * j);
        float* const to = block.kept_of(j);
        float u[2][wide], delta[2][wide];
        block.load_u(block.part_of(rows), u);
        device::sync_warp();  // all have left the tile before
        block.load_BC(rows);
        block.compute_delta(rows, delta);
        block.store_delta(delta, u);
#pragma unroll
        for (int v = 0; v < 2 * wide; v += 4)
            device::store(to + kept_at(steps * kept + v / 4),
                          device::Vec<float, 4>{{delta[v / wide][v % wide], delta[v / wide][v % wide + 1],
                                                 delta[v / wide][v % wide + 2], delta[v / wide][v % wide + 3]}});
        device::sync_warp();
#pragma unroll 1
        for (int s = 0; s < steps; s++) {
            put_states<Shape>(h, [&](int v, auto x) { device::store(to + kept_at(s * kept + v), x); });
            if (s < steps - 1 || j < n - 1) back_run(block.tile, s * Shape::step, h, A, block.lane);
        }
    }
}

// After the walk: all that follows, but what needs the other direction or the other warp. y gets its skip.
template <class Shape>
__device__ __forceinline__ void back_finish_tile(const BackBlock<Shape>& block, const BackRows& rows,
                                                 const BackPart& own, float (&y)[2][Shape::wide])
{
    constexpr int wide = Shape::wide;
    float u[2][wide], draw[2][wide], du[2][wide];
    block.load_u(own, u);
    back_finish(block.tile, u, du, draw, y, block.lane);
    store_part<Shape>(block.p.du + own.place, own.other, own, du);
#pragma unroll
    for (int k = 0; k < 2; k++) store_shared(block.tile.delta, part_at<Shape>(block.lane, k), draw[k]);
    device::sync_warp();  // draw is there; du and gy have been read
    back_ddt(block.tile, block.projection(), draw, block.lane);
    back_totals(block.tile, block.projection(), rows, block.lane);
}

// The output and the gradient of the gate, from y of this direction and of the other one, if there is one.
template <class Shape>
__device__ __forceinline__ void back_gate_tile(const BackBlock<Shape>& block, const BackPart& own, bool both,
                                               float (&y)[2][Shape::wide])
{
    constexpr int wide = Shape::wide;
    const auto& a = block.a;
    float gate[2][wide], dout[2][wide];
    block.load_gate(own, gate, dout);
    if (both) {
        float other[2][wide];
        load_part<Shape>(a.sum + own.place, own.other, own, other);
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int c = 0; c < wide; c++) y[k][c] += other[k][c];
    }
    back_gate<Shape>(gate, dout, a.scale, y);
    store_part<Shape>(a.out + own.place, own.other, own, y);
    store_part<Shape>(a.dz + block.gate_of(own), 2 * own.other, own, gate);
}

template <class Shape>
__global__ void __launch_bounds__(2 * back_threads, back_blocks) scan_backward_tuned(TunedBack<typename Shape::T> a)
{
    constexpr int N = Shape::states, C = Shape::C, S = Shape::S, wide = Shape::wide;
    constexpr int steps = Shape::tile / Shape::step, kept = Shape::kept / 4;
    BackBlock<Shape> block(a);
    const BackTile<Shape>& tile = block.tile;
    const bool both = a.directions == 2, reverse = block.reverse;
    float A[C][S];
    block.begin_tiles();
    block.load_A(A);
    {
        float lambda[C][S] = {}, dA[C][S] = {};
        back_arrive(block, A, lambda);
        put_states<Shape>(lambda, tile.lambda, block.lane);
        put_states<Shape>(dA, tile.dA, block.lane);
    }

    int within = -1;  // the tile's place in its chunk
#pragma unroll 1
    for (int done = 0; done < block.count(); done++, within--) {
        const bool fresh = within < 0;
        if (fresh) {
            // A chunk of n tiles from `low` on. Only the sequence's last one, the first or last here, may be shorter.
            const int left_tiles = block.count() - done, over = left_tiles % a.chunk_tiles;
            const int n = left_tiles < a.chunk_tiles ? left_tiles : over > 0 && !reverse ? over : a.chunk_tiles;
            const int low = block.begin + (reverse ? done : left_tiles - n), way = reverse ? -1 : 1;
            const Index chunk = static_cast<Index>(block.b) * a.chunks + low / a.chunk_tiles;
            back_run_chunk(block, reverse ? low + n - 1 : low, way, n,
                           block.p.checkpoints + chunk * N * a.dim + block.e0, A);
            within = n - 1;
        }
        {
            const BackRows rows = block.rows_of(block.begin + (reverse ? done : block.count() - 1 - done));
            const float* from = block.kept_of(within);
            auto fetch = [&](int j) {
#pragma unroll
                for (int v = 0; v < kept; v++)
                    device::cp_async<16>(tile.h, tile.state_of(v, block.lane), from + kept_at(j * kept + v), true);
                device::cp_async_commit();
            };
            fetch(steps - 1);
            {
                const BackPart own = block.part_of(rows);
                float u[2][wide], gate[2][wide], dout[2][wide], delta[2][wide];
                block.load_u(own, u);
                block.load_gate(own, gate, dout);
                if (!fresh) {
#pragma unroll
                    for (int v = 0; v < 2 * wide; v += 4) {
                        const auto x = device::load<4>(from + kept_at(steps * kept + v / 4));
#pragma unroll
                        for (int k = 0; k < 4; k++) delta[v / wide][v % wide + k] = x[k];
                    }
                    block.load_BC(rows);
                    block.store_delta(delta, u);
                }
                back_gy(tile, gate, dout, u, a.scale, block.lane);
                device::sync_warp();
            }
            block.renew();
#pragma unroll 1
            for (int j = steps - 1; j >= 0; j--) {
                float h[C][S];
                device::cp_async_wait<0>();
                get_states<Shape>(h, tile.h, block.lane);
                if constexpr (!Shape::aligned) {  // which takes more registers
                    device::renew(within);
                    from = block.kept_of(within);
                }
                if (j > 0) fetch(j - 1);
                back_walk(tile, j, h, A, block.lane);
            }
            device::sync_warp();
        }
        {
            block.renew();
            const BackRows rows = block.rows_of(block.begin + (reverse ? done : block.count() - 1 - done));
            float y[2][wide];
            const BackPart own = block.part_of(rows);
            back_finish_tile(block, rows, own, y);
            // Of two directions, the first to come to this tile; of both at once, the one that the other waits for.
            const int left = block.count() - 1 - done;
            const bool first = both && (done < left || (done == left && block.direction == 0));
            if (first) store_part<Shape>(a.sum + own.place, own.other, own, y);
            if (both)
                device::sync_block();
            else
                block.sync();
            if (!first) back_gate_tile(block, own, both, y);
            back_rows_out(block, rows);
            block.sync();
            block.renew();
        }
    }
    back_parameters(block);
}

}  // namespace vimcore::cuda
