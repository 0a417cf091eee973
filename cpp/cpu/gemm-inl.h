// SPDX-License-Identifier: Apache-2.0
// Matrix products.
//   gemm     y (m, n) = x (m, k) w (n, k)^T [+ bias] [+ y]    w packed once into panels of `columns` rows of w
//   gemm_tn  dw (n, k) += dy (m, n)^T x (m, k)
// Both come down to one register tile: `rows` x `columns` sums, fed by one vector row of a packed panel and one
// broadcast element per row and step. Every sum runs over its terms in ascending order in one accumulator, whatever
// tile it falls into, so results do not depend on how rows or columns are split over calls.
// Parallel mapping: callers split rows and panels (gemm) or rows of dw (gemm_tn).
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

// As many sums as the registers hold beside one panel row and a broadcast element.
template <class T>
struct GemmTile {
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 vector registers
    static constexpr int rows = 8, vectors = 3;
#elif defined(__FMA__)
    static constexpr int rows = 4, vectors = 3;
#else
    static constexpr int rows = 4, vectors = 2;
#endif
    static constexpr int columns = vectors * lanes<T>;
};
template <>
struct GemmTile<bf16> : GemmTile<float> {};

constexpr Index gemm_block_rows = 128;  // rows that share a panel while it is in the first-level cache
constexpr Index gemm_tn_block = 256;    // rows summed before they are added to dw
constexpr Index gemm_tn_group = 96;     // columns of dy packed at a time; a multiple of every tile's rows

// One tile: element (r, p) of the left side is a[r * row_stride + p * step]; b is a panel; y is the tile's corner.
template <class T>
struct TileArgs {
    const T* a;
    Index row_stride, step;
    const T* b;
    Index k;
    T* y;
    Index ldy;
    Index columns;  // of the panel that exist
    const T* bias;  // of these columns, or null
    bool add;
};

template <class T, int R, int V>
static __attribute__((noinline)) void tile(const TileArgs<T>& args)
{
    constexpr int L = lanes<T>;
    constexpr Index nr = GemmTile<T>::columns;
    Vec<T> sum[R][V] = {};
    const char* a = reinterpret_cast<const char*>(args.a);
    const T* b = args.b;
    const Index row_stride = args.row_stride * Index(sizeof(T)), step = args.step * Index(sizeof(T));  // in bytes
    if (args.add) {
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) __builtin_prefetch(args.y + r * args.ldy + v * L, 1);
    }
#pragma GCC unroll 2
    for (Index p = args.k; p > 0; p--) {
        Vec<T> row[V];
        for (int v = 0; v < V; v++) row[v] = load<T>(b + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vec<T> left = splat(*reinterpret_cast<const T*>(a + r * row_stride));
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = fma(left, row[v], sum[r][v]);
        }
        a += step;
        b += nr;
    }
    const Index last = args.columns - (V - 1) * L;  // elements of the last vector
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
        const Index n = v < V - 1 ? L : last;
        Vec<T> bias = {};
        if (args.bias) bias = load_upto<T>(args.bias + v * L, n);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            T* y = args.y + r * args.ldy + v * L;
            Vec<T> value = sum[r][v] + bias;
            if (args.add) value += load_upto<T>(y, n);
            store_upto<T>(y, value, n);
        }
    }
}

template <class T, int R, int V>
VIM_INLINE void tile_rows(Index rows, const TileArgs<T>& args)
{
    if constexpr (R > 1) {
        if (rows < R) return tile_rows<T, R - 1, V>(rows, args);
    }
    tile<T, R, V>(args);
}

template <class T, int V>
VIM_INLINE void tile_vectors(Index rows, const TileArgs<T>& args)
{
    if constexpr (V > 1) {
        if (args.columns <= (V - 1) * lanes<T>) return tile_vectors<T, V - 1>(rows, args);
    }
    tile_rows<T, GemmTile<T>::rows, V>(rows, args);
}

template <class T>
static void pack(const PackArgs<T>& args)
{
    constexpr Index nr = GemmTile<T>::columns;
    const Index whole = args.n / nr * nr, rest = args.n - whole, size = args.k * nr;
    if (args.transposed) {
        for (Index p = 0; p < args.k; p++) {
            const T* w = args.w + p * args.ldw;
            T* out = args.out + p * nr;
            for (Index j = 0; j < whole; j += nr, out += size) __builtin_memcpy(out, w + j, nr * sizeof(T));
            if (!rest) continue;
            for (Index v = 0; v < nr; v += lanes<T>)
                store<T>(out + v, v < rest ? load_upto<T>(w + whole + v, rest - v) : Vec<T>{});
        }
        return;
    }
    T* out = args.out;
    for (Index j = 0; j < args.n; j += nr) {
        const Index columns = j < whole ? nr : rest;
        for (Index p = 0; p < args.k; p++, out += nr) {
            const T* w = args.w + j * args.ldw + p;
            for (Index c = 0; c < columns; c++) out[c] = w[c * args.ldw];
            for (Index c = columns; c < nr; c++) out[c] = 0;
        }
    }
}

template <class T>
static void gemm(const GemmArgs<T>& args)
{
    constexpr Index mr = GemmTile<T>::rows, nr = GemmTile<T>::columns;
    const Index blocks = (args.m + gemm_block_rows - 1) / gemm_block_rows;
    const Index block = blocks ? ((args.m + blocks - 1) / blocks + mr - 1) / mr * mr : 0;
    for (Index begin = 0; begin < args.m; begin += block) {
        const Index end = args.m - begin < block ? args.m : begin + block;
        for (Index panel = args.panel_begin; panel < args.panel_end; panel++) {
            const Index j = panel * nr;
            TileArgs<T> t = {args.x + begin * args.ldx,
                             args.ldx,
                             1,
                             args.packed + j * args.k,
                             args.k,
                             args.y + begin * args.ldy + j,
                             args.ldy,
                             args.n - j < nr ? args.n - j : nr,
                             args.bias ? args.bias + j : nullptr,
                             args.add};
            for (Index i = begin; i < end; i += mr) {
                tile_vectors<T, GemmTile<T>::vectors>(end - i, t);
                t.a += mr * args.ldx;
                t.y += mr * args.ldy;
            }
        }
    }
}

// Packed columns of dy: tiles [count][rows], with a gap so that they do not all fall into the same cache sets.
template <class T>
VIM_INLINE Index gemm_tn_tile(Index count)
{
    return count * GemmTile<T>::rows + 64 / sizeof(T);
}

template <class T>
static Index gemm_tn_scratch(Index m, Index k)
{
    constexpr Index mr = GemmTile<T>::rows, nr = GemmTile<T>::columns;
    const Index count = m < gemm_tn_block ? m : gemm_tn_block;
    return gemm_tn_group / mr * gemm_tn_tile<T>(count) + count * ((k + nr - 1) / nr * nr);
}

template <class T>
static void gemm_tn(const GemmTnArgs<T>& args)
{
    constexpr Index mr = GemmTile<T>::rows, nr = GemmTile<T>::columns;
    const bool direct = args.k <= nr;  // one panel reads every dy once: packing it would not pay
    static_assert(gemm_tn_group % mr == 0);
    for (Index begin = 0; begin < args.m; begin += gemm_tn_block) {
        const Index count = args.m - begin < gemm_tn_block ? args.m - begin : gemm_tn_block;
        const Index tile_size = gemm_tn_tile<T>(count);
        T* const columns = args.scratch;
        T* const panels = columns + gemm_tn_group / mr * tile_size;
        pack<T>({args.x + begin * args.ldx, args.ldx, args.k, count, true, panels});
        for (Index group = args.j_begin; group < args.j_end; group += gemm_tn_group) {
            const Index width = args.j_end - group < gemm_tn_group ? args.j_end - group : gemm_tn_group;
            for (Index i = 0; i < count && !direct; i++) {
                const T* dy = args.dy + (begin + i) * args.lddy + group;
                T* out = columns + i * mr;
                Index j = 0;
                for (; j + mr <= width; j += mr, out += tile_size) __builtin_memcpy(out, dy + j, mr * sizeof(T));
                for (Index c = 0; j + c < width; c++) out[c] = dy[j + c];
            }
            for (Index p = 0; p < args.k; p += nr) {
                TileArgs<T> t = {columns,   1,
                                 mr,        panels + p * count,
                                 count,     args.dw + group * args.lddw + p,
                                 args.lddw, args.k - p < nr ? args.k - p : nr,
                                 nullptr,   true};
                if (direct) {
                    t.a = args.dy + begin * args.lddy + group;
                    t.step = args.lddy;
                }
                for (Index j = 0; j < width; j += mr) {
                    tile_vectors<T, GemmTile<T>::vectors>(width - j, t);
                    t.a += direct ? mr : tile_size;
                    t.y += mr * args.lddw;
                }
            }
        }
    }
}

constexpr int fma_chains = 12;  // enough to hide the latency on two ports, few enough for 16 registers
template <class T>
static constexpr Index fma_per_round = Index(fma_chains) * lanes<T> * 2;

template <class T>
static T fma_peak(Index rounds)
{
    Vec<T> chain[fma_chains];
    for (int c = 0; c < fma_chains; c++) chain[c] = splat(T(c));
    Vec<T> factor = splat(T(1) - T(1) / T(rounds + 2)), term = splat(T(1) / T(rounds + 3));
    for (Index i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < fma_chains; c++) chain[c] = chain[c] * factor + term;
    }
    Vec<T> total = chain[0];
    for (int c = 1; c < fma_chains; c++) total += chain[c];
    return sum<T>(total);
}

}  // namespace vimcore::cpu::VIM_ISA
