// SPDX-License-Identifier: Apache-2.0
// Positions of a sequence, made of a table for another grid of patches, of rows of frames and of class tokens, and
// their gradients, which are the transpose. Sums are of float64, in an order that depends on the sizes alone.
#include <algorithm>
#include <type_traits>

#include "core/bicubic.h"
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

using bicubic::Taps;
using bicubic::taps;

constexpr Index columns_at_a_time = 32;                         // whose sums are kept
using full = std::integral_constant<Index, columns_at_a_time>;  // a known count is computed in vectors

template <class T>
T* row_of(const Tensor& table, Index row)
{
    return table.as<T>() + row * table.size(2);
}

// A task is a row of patches, of all frames: out[f, y, x] = sum over 4 x 4 cells + frame[f].
template <class T>
void positions_forward(Context& ctx, const PositionsForward& a)
{
    const TableResize& r = a.resize;
    const Index dim = a.out.size(2);
    parallel_for(ctx, r.to.rows, [&](Index y) {
        const Taps rows = taps(y, r.from.rows, r.to.rows);
        for (Index x = 0; x < r.to.columns; x++) {
            const Taps columns = taps(x, r.from.columns, r.to.columns);
            auto out = [&](Index frame) {
                return row_of<T>(a.out, place_of(r.to_class, (frame * r.to.rows + y) * r.to.columns + x));
            };
            for (Index begin = 0; begin < dim; begin += columns_at_a_time) {
                double sum[columns_at_a_time] = {};
                const Index count = std::min(columns_at_a_time, dim - begin);
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) {
                        const Index cell = rows.cell[i] * r.from.columns + columns.cell[j];
                        const T* in = row_of<T>(a.table, place_of(r.from_class, cell)) + begin;
                        const double weight = rows.weight[i] * columns.weight[j];
                        auto add = [&](auto n) {
                            for (Index d = 0; d < n; d++) sum[d] += weight * static_cast<double>(in[d]);
                        };
                        count == columns_at_a_time ? add(full{}) : add(count);
                    }
                for (Index d = 0; d < count; d++) out(0)[begin + d] = static_cast<T>(sum[d]);
            }
            for (Index frame = r.frames - 1; frame >= 0; frame--) {  // the first one last: the others are made of it
                const T* own = a.frame_rows ? row_of<T>(a.frame_rows, frame) : nullptr;
                for (Index d = 0; d < dim; d++) out(frame)[d] = out(0)[d] + (own ? own[d] : T(0));
            }
        }
    });
    for (Index k = 0; k < r.to_class.count && !counts(ctx); k++)
        std::copy_n(a.class_rows ? row_of<T>(a.class_rows, k) : row_of<T>(a.table, r.from_class.at(k)), dim,
                    row_of<T>(a.out, r.to_class.at(k)));
}

// Adds dout's rows of class tokens and frames.
template <class T>
void class_and_frame_rows(Context& ctx, const PositionsBackward& a)
{
    const TableResize& r = a.resize;
    const Index dim = a.dout.size(2), patches = r.to.count();
    auto add = [&](Index from, T* to) {
        const T* const dout = row_of<T>(a.dout, from);
        for (Index d = 0; d < dim; d++) to[d] += dout[d];
    };
    for (Index k = 0; k < r.to_class.count && !counts(ctx); k++)
        if (a.dclass_rows)
            add(r.to_class.at(k), row_of<T>(a.dclass_rows, k));
        else if (a.dtable && r.from_class.count > 0)
            add(r.to_class.at(k), row_of<T>(a.dtable, r.from_class.at(k)));
    if (!a.dframe_rows) return;
    parallel_for(ctx, r.frames, [&](Index frame) {
        for (Index j = 0; j < patches; j++)
            add(place_of(r.to_class, frame * patches + j), row_of<T>(a.dframe_rows, frame));
    });
}

// Along rows first, a task a row of patches; then along columns, a task a column of the table.
template <class T>
void positions_backward(Context& ctx, const PositionsBackward& a)
{
    const TableResize& r = a.resize;
    const Index dim = a.dout.size(2);
    class_and_frame_rows<T>(ctx, a);
    if (!a.dtable) return;
    Arena::Scope scope(arena_of(ctx));
    double* const along = scratch<double>(ctx, r.to.rows * r.from.columns * dim).template as<double>();
    double* const sums = scratch<double>(ctx, r.from.count() * dim).template as<double>();
    parallel_for(ctx, r.to.rows, [&](Index y) {
        double* const row = along + y * r.from.columns * dim;
        std::fill_n(row, r.from.columns * dim, 0.0);
        for (Index frame = 0; frame < r.frames; frame++)
            for (Index x = 0; x < r.to.columns; x++) {
                const Taps columns = taps(x, r.from.columns, r.to.columns);
                const Index patch = (frame * r.to.rows + y) * r.to.columns + x;
                const T* dout = row_of<T>(a.dout, place_of(r.to_class, patch));
                for (int j = 0; j < 4; j++) {
                    double* const to = row + columns.cell[j] * dim;
                    for (Index d = 0; d < dim; d++) to[d] += columns.weight[j] * static_cast<double>(dout[d]);
                }
            }
    });
    parallel_for(ctx, r.from.columns, [&](Index c) {
        auto sum = [&](Index row) { return sums + (row * r.from.columns + c) * dim; };
        for (Index row = 0; row < r.from.rows; row++) std::fill_n(sum(row), dim, 0.0);
        for (Index y = 0; y < r.to.rows; y++) {
            const Taps rows = taps(y, r.from.rows, r.to.rows);
            const double* const from = along + (y * r.from.columns + c) * dim;
            for (int i = 0; i < 4; i++) {
                double* const to = sum(rows.cell[i]);
                for (Index d = 0; d < dim; d++) to[d] += rows.weight[i] * from[d];
            }
        }
        for (Index row = 0; row < r.from.rows; row++) {
            T* const dtable = row_of<T>(a.dtable, place_of(r.from_class, row * r.from.columns + c));
            for (Index d = 0; d < dim; d++) dtable[d] += static_cast<T>(sum(row)[d]);
        }
    });
}

}  // namespace

void CpuBackend::positions_forward(Context& ctx, const PositionsForward& args)
{
    dispatch_wide(args.out.dtype, [&](auto t) { cpu::positions_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::positions_backward(Context& ctx, const PositionsBackward& args)
{
    dispatch_wide(args.dout.dtype, [&](auto t) { cpu::positions_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
