// SPDX-License-Identifier: Apache-2.0
// Matrix products of bf16 on units that multiply blocks (block_units-inl.h), float32 sums. Weights are packed once,
// [ceil(n / columns)][ceil(k / depth)][depth / group][columns][group], zero-padded. A block's sums run over k in
// ascending steps, whatever rows and panels a call computes; what a step lacks at the edges of x is zero.
#pragma once

#include "block_units-inl.h"
#include "gemm-inl.h"

namespace vimcore::cpu::VIM_ISA {

VIM_INLINE Index whole_steps(Index k) { return (k + BlockUnit::depth - 1) / BlockUnit::depth * BlockUnit::depth; }

// A packed panel: out(p, c) = at(p, c) for p < k and c < width, else zero.
template <class At>
VIM_INLINE void pack_panel(Index k, Index width, bf16* out, At at)
{
    constexpr Index group = BlockUnit::group, columns = BlockUnit::columns;
    for (Index p = 0; p < whole_steps(k); p += group, out += group * columns)
        for (Index c = 0; c < columns; c++)
            for (Index g = 0; g < group; g++) out[c * group + g] = p + g < k && c < width ? at(p + g, c) : bf16(0.0f);
}

// A block of sums: `rows` rows of a, one panel, into y.
template <class Y>
struct BlockArgs {
    const bf16* a;
    Index row_stride, rows;
    const bf16* b;
    Index k;
    Y* y;
    Index ldy;
    Index columns;      // of the panel that exist
    const float* bias;  // of these columns, or null
    bool add;
};

template <class Y>
VIM_INLINE void run_block(BlockUnit& unit, const BlockArgs<Y>& args)
{
    constexpr Index rows = BlockUnit::rows, depth = BlockUnit::depth, columns = BlockUnit::columns;
    alignas(64) bf16 edge[rows * depth];
    alignas(64) float sums[rows * columns];
    const bf16* b = args.b;
    unit.zero();
    for (Index p = 0; p < args.k; p += depth, b += depth * columns) {
        const Index live = args.k - p < depth ? args.k - p : depth;
        if (args.rows == rows && live == depth) {
            unit.add(args.a + p, args.row_stride, b);
            continue;
        }
        __builtin_memset(edge, 0, sizeof edge);
        for (Index i = 0; i < args.rows; i++)
            __builtin_memcpy(edge + i * depth, args.a + i * args.row_stride + p, sizeof(bf16) * live);
        unit.add(edge, depth, b);
    }
    unit.store(sums);
    constexpr Index L = lanes<float>;
    for (Index c = 0; c < args.columns; c += L) {
        const Index n = args.columns - c < L ? args.columns - c : L;
        const Vec<float> bias = args.bias ? load_upto<float>(args.bias + c, n) : Vec<float>{};
        for (Index i = 0; i < args.rows; i++) {
            Y* y = args.y + i * args.ldy + c;
            Vec<float> value = load<float>(sums + i * columns + c) + bias;
            if (args.add) value += load_upto<Y>(y, n);
            store_upto<Y>(y, value, n);
        }
    }
}

template <>
void pack<bf16>(const PackArgs<bf16>& args)
{
    bf16* out = args.out;
    for (Index j = 0; j < args.n; j += BlockUnit::columns, out += whole_steps(args.k) * BlockUnit::columns) {
        const float* w = args.w + j * (args.transposed ? 1 : args.ldw);
        pack_panel(args.k, args.n - j, out, [&](Index p, Index c) VIM_INLINE_LAMBDA {
            return bf16(args.transposed ? w[p * args.ldw + c] : w[c * args.ldw + p]);
        });
    }
}

template <>
void gemm<bf16>(const GemmArgs<bf16>& args)
{
    constexpr Index rows = BlockUnit::rows, columns = BlockUnit::columns;
    BlockUnit unit;
    for (Index begin = 0; begin < args.m; begin += gemm_block_rows)
        for (Index panel = args.panel_begin; panel < args.panel_end; panel++) {
            const Index j = panel * columns, end = args.m - begin < gemm_block_rows ? args.m : begin + gemm_block_rows;
            for (Index i = begin; i < end; i += rows)
                run_block<bf16>(
                    unit, {args.x + i * args.ldx, args.ldx, end - i < rows ? end - i : rows,
                           args.packed + j * whole_steps(args.k), args.k, args.y + i * args.ldy + j, args.ldy,
                           args.n - j < columns ? args.n - j : columns, args.bias ? args.bias + j : nullptr, args.add});
        }
}

// Rows of the transposed dy, a cache line apart from what would fall into the same cache sets.
inline constexpr Index block_tn_row = gemm_tn_block + 32;

template <>
Index gemm_tn_scratch<bf16>(Index m, Index k)
{
    constexpr Index columns = BlockUnit::columns;
    const Index count = whole_steps(m < gemm_tn_block ? m : gemm_tn_block);
    return gemm_tn_group * block_tn_row + count * ((k + columns - 1) / columns * columns);
}

template <>
void gemm_tn<bf16>(const GemmTnArgs<bf16>& args)
{
    constexpr Index rows = BlockUnit::rows, columns = BlockUnit::columns;
    BlockUnit unit;
    for (Index begin = 0; begin < args.m; begin += gemm_tn_block) {
        const Index count = args.m - begin < gemm_tn_block ? args.m - begin : gemm_tn_block;
        bf16* const turned = args.scratch;
        bf16* const panels = turned + gemm_tn_group * block_tn_row;
        for (Index p = 0; p < args.k; p += columns) {
            const bf16* x = args.x + begin * args.ldx + p;
            pack_panel(count, args.k - p, panels + p * whole_steps(count),
                       [&](Index i, Index c) VIM_INLINE_LAMBDA { return x[i * args.ldx + c]; });
        }
        for (Index group = args.j_begin; group < args.j_end; group += gemm_tn_group) {
            const Index width = args.j_end - group < gemm_tn_group ? args.j_end - group : gemm_tn_group;
            for (Index i = 0; i < count; i++) {
                const bf16* dy = args.dy + (begin + i) * args.lddy + group;
                for (Index j = 0; j < width; j++) turned[j * block_tn_row + i] = dy[j];
            }
            for (Index p = 0; p < args.k; p += columns)
                for (Index j = 0; j < width; j += rows)
                    run_block<float>(
                        unit, {turned + j * block_tn_row, block_tn_row, width - j < rows ? width - j : rows,
                               panels + p * whole_steps(count), count, args.dw + (group + j) * args.lddw + p, args.lddw,
                               args.k - p < columns ? args.k - p : columns, nullptr, true});
        }
    }
}

// As fma_peak in gemm-inl.h, of the unit.
static constexpr Index dot_per_round = 2 * BlockUnit::rows * BlockUnit::columns * BlockUnit::depth;

static float dot_peak(Index rounds)
{
    constexpr Index rows = BlockUnit::rows, columns = BlockUnit::columns, depth = BlockUnit::depth;
    alignas(64) bf16 a[rows * depth], b[depth * columns];
    alignas(64) float sums[rows * columns];
    for (Index i = 0; i < rows * depth; i++) a[i] = bf16(0.5f);
    for (Index i = 0; i < depth * columns; i++) b[i] = bf16(i % 2 ? 0.5f : -0.5f);
    BlockUnit unit;
    unit.zero();
    for (Index i = 0; i < rounds; i++) unit.add(a, depth, b);
    unit.store(sums);
    return sums[0];
}

}  // namespace vimcore::cpu::VIM_ISA
