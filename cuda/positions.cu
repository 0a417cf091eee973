// SPDX-License-Identifier: Apache-2.0
// Positions of a sequence, made of a table for another grid of patches, of rows of frames and of class tokens, and
// their gradients, which are the transpose. Tables float, sums double.
//   forward   out[f, y, x] = sum over 4 x 4 cells (r, c) of wy[y, r] wx[x, c] table[r, c], + frame[f]
//   backward  along[y, c] = sum_x wx[x, c] sum_f dout[f, y, x];  dtable[r, c] += sum_y wy[y, r] along[y, c];
//             dframe[f] += sum over y, x of dout[f, y, x]
// Rows of class tokens are carried over. Parallel mapping: a thread per element of the result, consecutive threads
// along the width; sums go up in f, x and y, so that results do not depend on the launch.
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

// class_rows, frame_rows: null where there are none.
__global__ void positions_kernel(Params p, const float* table, const float* class_rows, const float* frame_rows,
                                 float* out)
{
    const Index i = device::flat_index(), row = i / p.dim, d = i % p.dim;
    const TableResize& r = p.r;
    if (row >= p.rows) return;
    const Index token = class_token_at(r.to_class, row);
    if (token >= 0) {
        out[i] = class_rows ? class_rows[token * p.dim + d]
                            : table[(r.from_class.first + token * r.from_class.step) * p.dim + d];
        return;
    }
    const Index place = patch_at(r.to_class, row), patches = r.to.rows * r.to.columns;
    const Index frame = place / patches, patch = place % patches;
    const Taps rows = taps(patch / r.to.columns, r.from.rows, r.to.rows);
    const Taps columns = taps(patch % r.to.columns, r.from.columns, r.to.columns);
    double sum = 0;
    for (int y = 0; y < 4; y++)
        for (int x = 0; x < 4; x++) {
            const Index cell = place_of(r.from_class, rows.cell[y] * r.from.columns + columns.cell[x]);
            sum += rows.weight[y] * columns.weight[x] * static_cast<double>(table[cell * p.dim + d]);
        }
    out[i] = static_cast<float>(sum) + (frame_rows ? frame_rows[frame * p.dim + d] : 0.0f);
}

__global__ void frames_kernel(Params p, const float* dout, float* dframe_rows)
{
    const Index i = device::flat_index(), frame = i / p.dim, d = i % p.dim, patches = p.r.to.rows * p.r.to.columns;
    if (frame >= p.rows) return;
    float sum = 0;
    for (Index j = frame * patches; j < (frame + 1) * patches; j++) sum += dout[place_of(p.r.to_class, j) * p.dim + d];
    dframe_rows[i] += sum;
}

__global__ void class_rows_kernel(Params p, const float* dout, float* dclass_rows)
{
    const Index i = device::flat_index(), token = i / p.dim, d = i % p.dim;
    if (token >= p.rows) return;
    dclass_rows[i] += dout[(p.r.to_class.first + token * p.r.to_class.step) * p.dim + d];
}

__global__ void along_rows_kernel(Params p, const float* dout, double* along)
{
    const Index i = device::flat_index(), d = i % p.dim, c = i / p.dim % p.r.from.columns;
    const Index y = i / p.dim / p.r.from.columns;
    const TableResize& r = p.r;
    if (y >= r.to.rows) return;
    const Reach near = reach(c, r.from.columns, r.to.columns);
    double sum = 0;
    for (Index x = near.begin; x < near.end; x++) {
        double of_frames = 0;
        for (Index f = 0; f < r.frames; f++)
            of_frames +=
                static_cast<double>(dout[place_of(r.to_class, (f * r.to.rows + y) * r.to.columns + x) * p.dim + d]);
        sum += share(c, x, r.from.columns, r.to.columns) * of_frames;
    }
    along[i] = sum;
}

__global__ void along_columns_kernel(Params p, const float* dout, const double* along, float* dtable)
{
    const Index i = device::flat_index(), row = i / p.dim, d = i % p.dim;
    const TableResize& r = p.r;
    if (row >= p.rows) return;
    const Index token = class_token_at(r.from_class, row);
    if (token >= 0) {
        dtable[i] += dout[(r.to_class.first + token * r.to_class.step) * p.dim + d];
        return;
    }
    const Index patch = patch_at(r.from_class, row), cell = patch / r.from.columns, c = patch % r.from.columns;
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
               args.table.as<float>(), args.class_rows.as<float>(), args.frame_rows.as<float>(), args.out.as<float>());
}

void positions_backward(Context& ctx, const PositionsBackward& args)
{
    const Index dim = args.dout.size(2);
    if (const Tensor& rows = args.dclass_rows) {
        const Params own{args.resize, rows.size(1), dim};
        VIM_LAUNCH((class_rows_kernel), flat_grid(rows.numel()), flat_block, 0, stream_of(ctx), own,
                   args.dout.as<float>(), rows.as<float>());
    }
    if (const Tensor& rows = args.dframe_rows) {
        const Params own{args.resize, rows.size(1), dim};
        VIM_LAUNCH((frames_kernel), flat_grid(rows.numel()), flat_block, 0, stream_of(ctx), own, args.dout.as<float>(),
                   rows.as<float>());
    }
    if (!args.dtable) return;
    const Params p{args.resize, args.dtable.size(1), dim};
    Arena::Scope scope(arena_of(ctx));
    const Tensor along = device_scratch::positions_along_rows(ctx, args);
    VIM_LAUNCH((along_rows_kernel), flat_grid(along.numel()), flat_block, 0, stream_of(ctx), p, args.dout.as<float>(),
               along.as<double>());
    VIM_LAUNCH((along_columns_kernel), flat_grid(args.dtable.numel()), flat_block, 0, stream_of(ctx), p,
               args.dout.as<float>(), along.as<double>(), args.dtable.as<float>());
}

}  // namespace vimcore::cuda
