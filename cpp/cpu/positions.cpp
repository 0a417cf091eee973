// SPDX-License-Identifier: Apache-2.0
// A position table for another grid of patches, and the gradient of its resize, which is the transpose. Sums are of
// float64, in an order that depends on the grids alone.
#include <algorithm>
#include <type_traits>

#include "core/bicubic.h"
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

using bicubic::row_of;
using bicubic::Taps;
using bicubic::taps;

constexpr Index columns_at_a_time = 32;                         // whose sums are kept
using full = std::integral_constant<Index, columns_at_a_time>;  // a known count is computed in vectors

template <class T>
const T* table_row(const Tensor& table, Index row)
{
    return table.as<T>() + row * table.size(2);
}

// A task is a row of patches: out[y, x] = sum over 4 x 4 cells.
template <class T>
void positions_forward(Context& ctx, const PositionsForward& a)
{
    const TableResize& r = a.resize;
    const Index dim = a.out.size(2);
    parallel_for(ctx, r.to.rows, [&](Index y) {
        const Taps rows = taps(y, r.from.rows, r.to.rows);
        for (Index x = 0; x < r.to.columns; x++) {
            const Taps columns = taps(x, r.from.columns, r.to.columns);
            T* out = a.out.as<T>() + row_of(y * r.to.columns + x, r.to_class) * dim;
            for (Index begin = 0; begin < dim; begin += columns_at_a_time) {
                double sum[columns_at_a_time] = {};
                const Index count = std::min(columns_at_a_time, dim - begin);
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) {
                        const Index cell = rows.cell[i] * r.from.columns + columns.cell[j];
                        const T* in = table_row<T>(a.table, row_of(cell, r.from_class)) + begin;
                        const double weight = rows.weight[i] * columns.weight[j];
                        auto add = [&](auto n) {
                            for (Index d = 0; d < n; d++) sum[d] += weight * static_cast<double>(in[d]);
                        };
                        count == columns_at_a_time ? add(full{}) : add(count);
                    }
                for (Index d = 0; d < count; d++) out[begin + d] = static_cast<T>(sum[d]);
            }
        }
    });
    for (int k = 0; k < 2 && !counts(ctx); k++)
        if (r.to_class[k] >= 0)
            std::copy_n(table_row<T>(a.table, r.from_class[k]), dim, a.out.as<T>() + r.to_class[k] * dim);
}

// Along rows first, a task a row of patches; then along columns, a task a column of the table.
template <class T>
void positions_backward(Context& ctx, const PositionsBackward& a)
{
    const TableResize& r = a.resize;
    const Index dim = a.dout.size(2);
    Arena::Scope scope(arena_of(ctx));
    double* const along = scratch<double>(ctx, r.to.rows * r.from.columns * dim).template as<double>();
    double* const sums = scratch<double>(ctx, r.from.count() * dim).template as<double>();
    parallel_for(ctx, r.to.rows, [&](Index y) {
        double* const row = along + y * r.from.columns * dim;
        std::fill_n(row, r.from.columns * dim, 0.0);
        for (Index x = 0; x < r.to.columns; x++) {
            const Taps columns = taps(x, r.from.columns, r.to.columns);
            const T* dout = table_row<T>(a.dout, row_of(y * r.to.columns + x, r.to_class));
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
            T* const dtable = a.dtable.as<T>() + row_of(row * r.from.columns + c, r.from_class) * dim;
            for (Index d = 0; d < dim; d++) dtable[d] += static_cast<T>(sum(row)[d]);
        }
    });
    for (int k = 0; k < 2 && !counts(ctx); k++) {
        if (r.to_class[k] < 0) continue;
        const T* const dout = table_row<T>(a.dout, r.to_class[k]);
        T* const dtable = a.dtable.as<T>() + r.from_class[k] * dim;
        for (Index d = 0; d < dim; d++) dtable[d] += dout[d];
    }
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
