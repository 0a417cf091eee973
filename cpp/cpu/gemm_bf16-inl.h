// SPDX-License-Identifier: Apache-2.0
// Matrix products of bf16 with float32 sums, as in gemm-inl.h. Neighbours along the sum go in pairs, a pair in a 32-bit
// word (pairs-inl.h), and one instruction adds both products of every word. Weights are packed in pairs once,
// [ceil(n / nr)][ceil(k / 2)][nr], zero-padded. A sum runs over its pairs in ascending order in one accumulator,
// whatever tile it falls into.
#pragma once

#include "gemm-inl.h"
#include "pairs-inl.h"

namespace vimcore::cpu::VIM_ISA {

// One tile: the pair (r, p) of the left side is at a[r * row_stride + p * step]; b is a panel; y is the tile's corner.
template <class Y>
struct PairTile {
    const bf16* a;
    Index row_stride, step;
    const Word* b;
    Index pairs;  // whole ones
    bool odd;     // one more of the left side has only its even half
    Y* y;
    Index ldy;
    Index columns;      // of the panel that exist
    const float* bias;  // of these columns, or null
    bool add;
};

template <class Y, int R, int V>
static __attribute__((noinline)) void pair_tile(const PairTile<Y>& args)
{
    constexpr int L = lanes<float>;
    constexpr Index nr = GemmTile<float>::columns;
    Vec<float> sum[R][V] = {};
    const bf16* a = args.a;
    const Word* b = args.b;
    const Index row_stride = args.row_stride, step = args.step;
    const auto add_pair = [&](auto left) VIM_INLINE_LAMBDA {
        PairWords row[V];
        for (int v = 0; v < V; v++) row[v] = *reinterpret_cast<const UnalignedPairs*>(b + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const PairWords pair = left(a + r * row_stride) - PairWords{};
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = dot(sum[r][v], pair, row[v]);
        }
        a += step;
        b += nr;
    };
#pragma GCC unroll 2
    for (Index p = args.pairs; p > 0; p--) add_pair([](const bf16* p) VIM_INLINE_LAMBDA { return pair_at(p); });
    if (args.odd) add_pair([](const bf16* p) VIM_INLINE_LAMBDA { return unsigned(p->bits); });
    const Index last = args.columns - (V - 1) * L;  // elements of the last vector
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
        const Index n = v < V - 1 ? L : last;
        Vec<float> bias = {};
        if (args.bias) bias = load_upto<float>(args.bias + v * L, n);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Y* y = args.y + r * args.ldy + v * L;
            Vec<float> value = sum[r][v] + bias;
            if (args.add) value += load_upto<Y>(y, n);
            store_upto<Y>(y, value, n);
        }
    }
}

template <class Y, int R, int V>
VIM_INLINE void pair_tile_rows(Index rows, const PairTile<Y>& args)
{
    if constexpr (R > 1) {
        if (rows < R) return pair_tile_rows<Y, R - 1, V>(rows, args);
    }
    pair_tile<Y, R, V>(args);
}
template <class Y, int V>
VIM_INLINE void pair_tile_vectors(Index rows, const PairTile<Y>& args)
{
    if constexpr (V > 1) {
        if (args.columns <= (V - 1) * lanes<float>) return pair_tile_vectors<Y, V - 1>(rows, args);
    }
    pair_tile_rows<Y, GemmTile<float>::rows, V>(rows, args);
}

template <>
void pack<bf16>(const PackArgs<bf16>& args)
{
    constexpr Index nr = GemmTile<float>::columns;
    Word* out = reinterpret_cast<Word*>(args.out);
    const Index step = args.transposed ? args.ldw : 1, column = args.transposed ? 1 : args.ldw;
    for (Index j = 0; j < args.n; j += nr) {
        const Index columns = args.n - j < nr ? args.n - j : nr;
        for (Index p = 0; p < args.k; p += 2, out += nr) {
            const float* w = args.w + j * column + p * step;
            const Index odd = p + 1 < args.k ? step : 0;
            for (Index c = 0; c < columns; c++)
                out[c] = pair_of(bf16(w[c * column]), odd ? bf16(w[c * column + odd]) : bf16(0.0f));
            for (Index c = columns; c < nr; c++) out[c] = 0;
        }
    }
}

template <>
void gemm<bf16>(const GemmArgs<bf16>& args)
{
    constexpr Index mr = GemmTile<float>::rows, nr = GemmTile<float>::columns;
    const Word* packed = reinterpret_cast<const Word*>(args.packed);
    const Index blocks = (args.m + gemm_block_rows - 1) / gemm_block_rows;
    const Index block = blocks ? ((args.m + blocks - 1) / blocks + mr - 1) / mr * mr : 0;
    for (Index begin = 0; begin < args.m; begin += block) {
        const Index end = args.m - begin < block ? args.m : begin + block;
        for (Index panel = args.panel_begin; panel < args.panel_end; panel++) {
            const Index j = panel * nr;
            PairTile<bf16> t = {args.x + begin * args.ldx,           args.ldx,   2,
                                packed + j * pairs_of(args.k),       args.k / 2, args.k % 2 != 0,
                                args.y + begin * args.ldy + j,       args.ldy,   args.n - j < nr ? args.n - j : nr,
                                args.bias ? args.bias + j : nullptr, args.add};
            for (Index i = begin; i < end; i += mr) {
                pair_tile_vectors<bf16, GemmTile<float>::vectors>(end - i, t);
                t.a += mr * args.ldx;
                t.y += mr * args.ldy;
            }
        }
    }
}

// Packed columns of dy: tiles [pairs][rows] of words, with a gap so that they do not all fall into the same cache sets.
VIM_INLINE Index pair_tn_tile(Index pairs) { return pairs * GemmTile<float>::rows + 16; }

template <>
Index gemm_tn_scratch<bf16>(Index m, Index k)
{
    constexpr Index mr = GemmTile<float>::rows, nr = GemmTile<float>::columns;
    const Index pairs = pairs_of(m < gemm_tn_block ? m : gemm_tn_block);
    return 2 * (gemm_tn_group / mr * pair_tn_tile(pairs) + pairs * ((k + nr - 1) / nr * nr));
}

// Pairs of rows: out[c] for the columns [0, width), zero beyond; `odd` is null behind the last row.
template <Index size>
VIM_INLINE void pack_pairs(const bf16* even, const bf16* odd, Index width, Word* out)
{
    if (width >= size && odd) {
        for (Index c = 0; c < size; c++) out[c] = pair_of(even[c], odd[c]);
        return;
    }
    for (Index c = 0; c < size; c++) out[c] = c < width ? even[c].bits | (odd ? unsigned(odd[c].bits) << 16 : 0) : 0;
}

template <>
void gemm_tn<bf16>(const GemmTnArgs<bf16>& args)
{
    constexpr Index mr = GemmTile<float>::rows, nr = GemmTile<float>::columns;
    for (Index begin = 0; begin < args.m; begin += gemm_tn_block) {
        const Index count = args.m - begin < gemm_tn_block ? args.m - begin : gemm_tn_block, pairs = pairs_of(count);
        const Index tile_size = pair_tn_tile(pairs);
        Word* const columns = reinterpret_cast<Word*>(args.scratch);
        Word* const panels = columns + gemm_tn_group / mr * tile_size;
        for (Index p = 0; p < pairs; p++) {
            const bf16* x = args.x + (begin + 2 * p) * args.ldx;
            const bf16* odd = 2 * p + 1 < count ? x + args.ldx : nullptr;
            for (Index c = 0; c < args.k; c += nr)
                pack_pairs<nr>(x + c, odd ? odd + c : nullptr, args.k - c, panels + c * pairs + p * nr);
        }
        for (Index group = args.j_begin; group < args.j_end; group += gemm_tn_group) {
            const Index width = args.j_end - group < gemm_tn_group ? args.j_end - group : gemm_tn_group;
            for (Index p = 0; p < pairs; p++) {
                const bf16* dy = args.dy + (begin + 2 * p) * args.lddy + group;
                const bf16* odd = 2 * p + 1 < count ? dy + args.lddy : nullptr;
                Word* out = columns + p * mr;
                for (Index j = 0; j < width; j += mr, out += tile_size)
                    pack_pairs<mr>(dy + j, odd ? odd + j : nullptr, width - j, out);
            }
            for (Index p = 0; p < args.k; p += nr) {
                PairTile<float> t = {reinterpret_cast<const bf16*>(columns),
                                     2,
                                     2 * mr,
                                     panels + p * pairs,
                                     pairs,
                                     false,
                                     args.dw + group * args.lddw + p,
                                     args.lddw,
                                     args.k - p < nr ? args.k - p : nr,
                                     nullptr,
                                     true};
                for (Index j = 0; j < width; j += mr) {
                    pair_tile_vectors<float, GemmTile<float>::vectors>(width - j, t);
                    t.a += 2 * tile_size;
                    t.y += mr * args.lddw;
                }
            }
        }
    }
}

// As fma_peak in gemm-inl.h, of dot.
static constexpr Index dot_per_round = Index(fma_chains) * lanes<float> * 4;

static float dot_peak(Index rounds)
{
    Vec<float> chain[fma_chains] = {};
    const PairWords a = pair_of(bf16(0.75f), bf16(0.5f)) - PairWords{},
                    b = pair_of(bf16(0.5f), bf16(-0.5f)) - PairWords{};
    for (Index i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < fma_chains; c++) chain[c] = dot(chain[c], a, b);
    }
    Vec<float> total = chain[0];
    for (int c = 1; c < fma_chains; c++) total += chain[c];
    return sum<float>(total);
}

}  // namespace vimcore::cpu::VIM_ISA
