// SPDX-License-Identifier: Apache-2.0
// A position table for another grid of patches, and the gradient of its resize, which is the transpose. Tables float,
// sums double.
//   forward   out[y, x] = sum over 4 x 4 cells (r, c) of wy[y, r] wx[x, c] table[r, c]
//   backward  along[y, c] = sum_x wx[x, c] dout[y, x];  dtable[r, c] += sum_y wy[y, r] along[y, c]
// Rows of class tokens are carried over. Parallel mapping: a thread per element of the result, consecutive threads
// along the width; sums go up in x and y, so that results do not depend on the launch.
#include "core/arena.h"
#include "core/bicubic.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using namespace bicubic;

struct Params {
    TableResize r;
    Index rows, dim;  // rows of the result
};

__global__ void positions_kernel(Params p, const float* table, float* out)
{
    const Index i = device::flat_index(), row = i / p.dim, d = i % p.dim;
    const TableResize& r = p.r;
    if (row >= p.rows) return;
    for (int k = 0; k < 2; k++)
        if (row == r.to_class[k]) {
            out[i] = table[r.from_class[k] * p.dim + d];
            return;
        }
    const Index patch = patch_of(row, r.to_class);
    const Taps rows = taps(patch / r.to.columns, r.from.rows, r.to.rows);
    const Taps columns = taps(patch % r.to.columns, r.from.columns, r.to.columns);
    double sum = 0;
    for (int y = 0; y < 4; y++)
        for (int x = 0; x < 4; x++) {
            const Index cell = row_of(rows.cell[y] * r.from.columns + columns.cell[x], r.from_class);
            sum += rows.weight[y] * columns.weight[x] * static_cast<double>(table[cell * p.dim + d]);
        }
    out[i] = static_cast<float>(sum);
}

__global__ void along_rows_kernel(Params p, const float* dout, double* along)
{
    const Index i = device::flat_index(), d = i % p.dim, c = i / p.dim % p.r.from.columns;
    const Index y = i / p.dim / p.r.from.columns;
    const TableResize& r = p.r;
    if (y >= r.to.rows) return;
    const Reach near = reach(c, r.from.columns, r.to.columns);
    double sum = 0;
    for (Index x = near.begin; x < near.end; x++)
        sum += share(c, x, r.from.columns, r.to.columns) *
               static_cast<double>(dout[row_of(y * r.to.columns + x, r.to_class) * p.dim + d]);
    along[i] = sum;
}

__global__ void along_columns_kernel(Params p, const float* dout, const double* along, float* dtable)
{
    const Index i = device::flat_index(), row = i / p.dim, d = i % p.dim;
    const TableResize& r = p.r;
    if (row >= p.rows) return;
    for (int k = 0; k < 2; k++)
        if (row == r.from_class[k]) {
            dtable[i] += dout[r.to_class[k] * p.dim + d];
            return;
        }
    const Index patch = patch_of(row, r.from_class), cell = patch / r.from.columns, c = patch % r.from.columns;
    const Reach near = reach(cell, r.from.rows, r.to.rows);
    double sum = 0;
    for (Index y = near.begin; y < near.end; y++)
        sum += share(cell, y, r.from.rows, r.to.rows) * along[(y * r.from.columns + c) * p.dim + d];
    dtable[i] += static_cast<float>(sum);
}

}  // namespace

void positions_forward(Context& ctx, const PositionsForward& args)
{
    const Params p{args.resize, args.out.size(1), args.out.size(2)};
    VIM_LAUNCH((positions_kernel), flat_grid(args.out.numel()), flat_block, 0, stream_of(ctx), p,
               args.table.as<float>(), args.out.as<float>());
}

void positions_backward(Context& ctx, const PositionsBackward& args)
{
    const Params p{args.resize, args.dtable.size(1), args.dtable.size(2)};
    Arena::Scope scope(arena_of(ctx));
    const Tensor along = device_scratch::positions_along_rows(ctx, args);
    VIM_LAUNCH((along_rows_kernel), flat_grid(along.numel()), flat_block, 0, stream_of(ctx), p, args.dout.as<float>(),
               along.as<double>());
    VIM_LAUNCH((along_columns_kernel), flat_grid(args.dtable.numel()), flat_block, 0, stream_of(ctx), p,
               args.dout.as<float>(), along.as<double>(), args.dtable.as<float>());
}

}  // namespace vimcore::cuda
