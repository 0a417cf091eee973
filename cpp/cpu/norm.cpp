// SPDX-License-Identifier: Apache-2.0
// Residual add and normalisation.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index norm_rows = 16;  // rows of a forward task
constexpr Index sum_rows = 256;  // rows of one partial sum of weight gradients

template <class T>
T* at(const Tensor& tensor, Index offset)
{
    return tensor ? tensor.as<T>() + offset : nullptr;
}

template <class T>
void norm_forward(Context& ctx, const NormForward& a)
{
    const Index batch = a.out.size(0), len = a.out.size(1), dim = a.out.size(2), blocks = ceil_div(len, norm_rows);
    const Kernels<T>& kernel = kernels<T>();
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, row = task % blocks * norm_rows, offset = (b * len + row) * dim;
        kernel.norm_forward({.h = at<T>(a.h, offset),
                             .residual = at<Wide<T>>(a.residual, offset),
                             .weight = a.weight.as<Wide<T>>(),
                             .bias = a.bias.as<Wide<T>>(),
                             .residual_out = at<Wide<T>>(a.residual_out, offset),
                             .out = at<T>(a.out, offset),
                             .row_scale = a.row_scale ? a.row_scale.as<Wide<T>>()[b] : Wide<T>(1),
                             .eps = static_cast<Wide<T>>(a.eps),
                             .layer = a.kind == Norm::layer,
                             .len = std::min(norm_rows, len - row),
                             .dim = dim});
    });
}

// Partial sums of dweight and dbias per block of rows, added up in order of the blocks.
template <class T>
void norm_backward(Context& ctx, const NormBackward& a)
{
    const Index batch = a.x.size(0), len = a.x.size(1), dim = a.x.size(2), blocks = ceil_div(len, sum_rows);
    const Kernels<T>& kernel = kernels<T>();
    Arena::Scope scope(arena_of(ctx));
    Wide<T>* sums = scratch<Wide<T>>(ctx, batch * blocks * 2 * dim).template as<Wide<T>>();
    if (counts(ctx)) return;
    std::fill_n(sums, batch * blocks * 2 * dim, Wide<T>(0));
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, row = task % blocks * sum_rows, offset = (b * len + row) * dim;
        Wide<T>* own = sums + task * 2 * dim;
        kernel.norm_backward({.x = at<Wide<T>>(a.x, offset),
                              .weight = a.weight.as<Wide<T>>(),
                              .row_scale = a.row_scale ? a.row_scale.as<Wide<T>>()[b] : Wide<T>(1),
                              .eps = static_cast<Wide<T>>(a.eps),
                              .layer = a.kind == Norm::layer,
                              .len = std::min(sum_rows, len - row),
                              .dim = dim,
                              .dout = at<T>(a.dout, offset),
                              .dresidual_out = at<Wide<T>>(a.dresidual_out, offset),
                              .dresidual = at<Wide<T>>(a.dresidual, offset),
                              .dh = at<T>(a.dh, offset),
                              .dweight = own,
                              .dbias = own + dim});
    });
    for (Index task = 0; task < batch * blocks; task++)
        for (Index j = 0; j < dim; j++) {
            if (a.dweight) a.dweight.as<Wide<T>>()[j] += sums[task * 2 * dim + j];
            if (a.dbias) a.dbias.as<Wide<T>>()[j] += sums[task * 2 * dim + dim + j];
        }
}

}  // namespace

void CpuBackend::norm_forward(Context& ctx, const NormForward& args)
{
    dispatch(args.out.dtype, [&](auto t) { cpu::norm_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::norm_backward(Context& ctx, const NormBackward& args)
{
    dispatch(args.dout.dtype, [&](auto t) { cpu::norm_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
