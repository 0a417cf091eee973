// SPDX-License-Identifier: Apache-2.0
// What the kernels of the tuned scan's gradient share (see scan/backward_tuned.cuh): their arguments, and a thread's
// place in them.
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
    float* starts;  // (blocks, directions, tiles of a chunk, [states of four steps | delta] / 4, 64, 4)
    int groups;     // of channels
    int tokens, dim, rank, row, pitch, directions;  // row: of q; pitch: 2N + R, rounded up to 4
    int chunk_tiles, chunks;
    int segment_tiles, segments;  // a segment is some chunks
    float scale;
};

// A thread, its warp's channels and arrays, its segment; and the steps that do not concern the recurrence.
template <class Shape>
struct BackBlock {
    using T = typename Shape::T;
    static constexpr int N = Shape::states, C = Shape::C, S = Shape::S, K = Shape::tile, wide = Shape::wide;

    const TunedBack<T>& a;
    const int direction = static_cast<int>(threadIdx.x) / back_threads;
    int thread = static_cast<int>(threadIdx.x) % back_threads, lane = thread % device::warp_size;
    const BackPass<T>& p = a.pass[direction];
    const bool reverse = p.reverse;
    int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.groups)), e0 = first_channel();  // of the warp
    const int unit = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.groups));  // image and segment
    const int b = unit / a.segments, segment = unit - b * a.segments;
    const int begin = segment * a.segment_tiles;  // first tile of the segment
    const BackLayout<Shape> layout{a.rank};
    const BackTile<Shape> tile = tile_of(thread / device::warp_size);

    // Cheaper to find again than to keep in registers: channels of the warp, tiles of the image, of the segment.
    __device__ __forceinline__ int live() const
    {
        return a.dim - e0 < Shape::warp_channels ? a.dim - e0 : Shape::warp_channels;
    }
    __device__ __forceinline__ int tiles() const { return (a.tokens + K - 1) / K; }
    __device__ __forceinline__ int count() const
    {
        return tiles() - begin < a.segment_tiles ? tiles() - begin : a.segment_tiles;
    }

    __device__ explicit BackBlock(const TunedBack<T>& args) : a(args) {}

    // Addresses and the like are computed again from here on: the recurrence leaves no registers to keep them in.
    __device__ __forceinline__ void renew()
    {
        device::renew(thread);
        device::renew(group);
        lane = thread % device::warp_size;
        e0 = first_channel();
    }
    __device__ __forceinline__ int first_channel() const
    {
        return group * Shape::channels + thread / device::warp_size * Shape::warp_channels;
    }

    __device__ __forceinline__ BackTile<Shape> tile_of(int warp) const
    {
        return {layout, (direction * back_warps + warp) * layout.floats};
    }
    __device__ __forceinline__ void sync() const  // of the direction
    {
        if (direction == 0)
            device::sync_group(1, back_threads);
        else
            device::sync_group(2, back_threads);
    }

    // What a warp has in shared memory all the time.
    __device__ __forceinline__ void begin_tiles() const
    {
        for (int c = lane; c < Shape::warp_channels; c += device::warp_size) {
            tile.bias[c] = c < live() ? p.dt_bias[e0 + c] : 0.0f;
            tile.D[c] = c < live() ? p.D[e0 + c] : 0.0f;
            tile.delta[tile.dbias_of(c)] = 0.0f;
        }
        const device::Vec<float, 4> zeros{};
        for (int i = 4 * lane; i < layout.padded * layout.channels; i += 4 * device::warp_size)
            tile.totals.template store<4>(i, zeros);
#pragma unroll
        for (int i = 0; i < wide; i += 4) tile.dD.template store<4>(i * device::warp_size + 4 * lane, zeros);
        device::sync_warp();
    }
    __device__ __forceinline__ void load_A(float (&A)[C][S]) const
    {
#pragma unroll
        for (int k = 0; k < C; k++) {
            const int c = lane / 4 * C + k;
#pragma unroll
            for (int n = 0; n < S; n++)
                A[k][n] = c < live() ? -expf(p.A_log[static_cast<Index>(e0 + c) * N + lane % 4 * S + n]) * device::log2e
                                     : 0.0f;
        }
    }
    // A thread's values of (N, E), whose channels begin at the warp's; zeros beyond the last one.
    __device__ __forceinline__ void load_states(const float* from, float (&x)[C][S]) const
    {
        const int c = lane / 4 * C;
        from += static_cast<Index>(lane % 4 * S) * a.dim + c;
#pragma unroll
        for (int n = 0; n < S; n++, from += a.dim)
#pragma unroll
            for (int k = 0; k < C; k += 2) {
                device::Vec<float, 2> two{};
                if (c + k < live()) two = device::load<2>(from + k);
                x[k][n] = two[0];
                x[k + 1][n] = two[1];
            }
    }
    __device__ __forceinline__ void store_states(float* to, const float (&x)[C][S]) const
    {
        const int c = lane / 4 * C;
        to += static_cast<Index>(lane % 4 * S) * a.dim + c;
#pragma unroll
        for (int n = 0; n < S; n++, to += a.dim)
#pragma unroll
            for (int k = 0; k < C; k += 2)
                if (c + k < live()) device::store(to + k, device::Vec<float, 2>{{x[k][n], x[k + 1][n]}});
    }

    __device__ __forceinline__ BackRows rows_of(int index) const { return back_rows(index, K, a.tokens, reverse); }
    __device__ __forceinline__ BackPart part_of(const BackRows& rows) const
    {
        const int s = lane / 4, c = lane % 4 * wide, live_ = live() - c < wide ? live() - c : wide;
        const Index place = (static_cast<Index>(b) * a.tokens + rows.natural(s)) * a.dim + e0 + c;
        return {{s < rows.count ? live_ : 0, s + 8 < rows.count ? live_ : 0},
                place,
                static_cast<Index>(8 * rows.way) * a.dim};
    }
    // Where a thread's part of a tensor (B, len, 2E) begins; its other token is twice as far.
    __device__ __forceinline__ Index gate_of(const BackPart& own) const { return 2 * own.place - e0 - lane % 4 * wide; }
    __device__ __forceinline__ BackProjection<T> projection() const
    {
        return {p.dt_weight + static_cast<Index>(e0) * a.rank, p.q + static_cast<Index>(b) * a.tokens * a.row, a.rank,
                a.row, live()};
    }

    __device__ __forceinline__ void load_BC(const BackRows& rows) const
    {
        back_load_BC(tile, projection().q, a.rank, a.row, rows, lane);
    }
    // delta of this thread's part, from q.
    __device__ __forceinline__ void compute_delta(const BackRows& rows, float (&delta)[2][wide]) const
    {
        float d[C][4], bias[wide];
        load_shared(tile.bias, lane % 4 * wide, bias);
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[j][i] = bias[2 * j + i % 2];
        back_project<Shape>(projection(), rows, lane, d);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int k = 0; k < wide; k++) {
                delta[i][k] = device::softplus(d[k / 2][2 * i + k % 2]);
                if (lane / 4 + 8 * i >= rows.count) delta[i][k] = 0.0f;
            }
    }
    __device__ __forceinline__ void store_delta(const float (&delta)[2][wide], const float (&u)[2][wide]) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float du[wide];
#pragma unroll
            for (int k = 0; k < wide; k++) du[k] = delta[i][k] * u[i][k];
            store_shared(tile.delta, part_at<Shape>(lane, i), delta[i]);
            store_shared(tile.du, part_at<Shape>(lane, i), du);
        }
    }
    __device__ __forceinline__ void load_u(const BackPart& own, float (&u)[2][wide]) const
    {
        load_part<Shape>(p.u + own.place, own.other, own, u);
    }
    __device__ __forceinline__ void load_gate(const BackPart& own, float (&gate)[2][wide], float (&dout)[2][wide]) const
    {
        load_part<Shape>(a.z + gate_of(own), 2 * own.other, own, gate);
        load_part<Shape>(a.dout + own.place, own.other, own, dout);
    }
    // What this thread keeps of tile j of a chunk: four floats at a time.
    __device__ __forceinline__ float* kept_of(int j) const
    {
        const Index chunk = static_cast<Index>(blockIdx.x) * a.directions + direction;
        return a.starts + ((chunk * a.chunk_tiles + j) * Shape::kept_tile / 4 * back_threads + thread) * 4;
    }
};

// Four floats at `v` of what kept_of says.
__device__ __forceinline__ int kept_at(int v) { return v * back_threads * 4; }

}  // namespace vimcore::cuda
