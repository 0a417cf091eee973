// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution and SiLU.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index conv_tokens = 32;    // tokens of a forward task
constexpr Index conv_channels = 64;  // channels of a backward task

// What forward and backward share, for image 0 and all channels.
template <class T, class Pass>
Conv<T> conv_of(Context& ctx, const Tensor& x, const Pass& p, Index dim, bool silu)
{
    const Index width = p.weight.numel() / std::max<Index>(dim, 1);
    return {.x = x.as<T>(),
            .ldx = x.size(2),
            .weight = packed_transpose<Wide<T>>(ctx, p.weight, dim, width),
            .bias = p.bias.template as<Wide<T>>(),
            .total = x.size(1),
            .dim = dim,
            .e0 = 0,
            .e1 = dim,
            .width = width,
            .reverse = p.reverse,
            .silu = silu};
}

template <class T>
void conv_forward(Context& ctx, const Conv1dForward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.x.size(0), passes = static_cast<Index>(a.passes.size());
    Index tokens = 0;
    for (const ConvForwardPass& p : a.passes) tokens = std::max<Index>(tokens, p.u.size(1));
    const Index blocks = ceil_div(tokens, conv_tokens);
    Arena::Scope scope(arena_of(ctx));
    ConvForwardArgs<T> first[2];
    for (Index p = 0; p < passes; p++) {
        const ConvForwardPass& pass = a.passes[static_cast<std::size_t>(p)];
        const Index dim = pass.u.size(2);
        first[p] = {.f = conv_of<T>(ctx, a.x, pass, dim, a.silu),
                    .u = pass.u.as<T>(),
                    .ldu = dim,
                    .begin = pass.begin,
                    .len = pass.u.size(1)};
    }
    parallel_for(ctx, passes * batch * blocks, [&](Index task) {
        const Index p = task % passes, b = task / passes % batch, begin = task / passes / batch * conv_tokens;
        ConvForwardArgs<T> args = first[p];
        if (begin >= args.len) return;
        args.f.x += b * a.x.size(1) * args.f.ldx;
        args.u += (b * args.len + begin) * args.f.dim;
        args.begin += begin;
        args.len = std::min(conv_tokens, args.len - begin);
        kernel.conv_forward(args);
    });
}

// One task per image and channel block, both passes in order; weight gradients are partial sums per image.
template <class T>
void conv_backward(Context& ctx, const Conv1dBackward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.x.size(0), len = a.x.size(1), passes = static_cast<Index>(a.passes.size());
    const Index dim = a.passes[0].du.size(2), blocks = ceil_div(dim, conv_channels);
    Arena::Scope scope(arena_of(ctx));
    Conv<T> first[2];
    Wide<T>* sums[2];
    for (Index p = 0; p < passes; p++) {
        first[p] = conv_of<T>(ctx, a.x, a.passes[static_cast<std::size_t>(p)], dim, a.silu);
        sums[p] = scratch<Wide<T>>(ctx, batch * (first[p].width + 1) * dim).template as<Wide<T>>();
    }
    if (counts(ctx)) return;
    for (Index p = 0; p < passes; p++) std::fill_n(sums[p], batch * (first[p].width + 1) * dim, Wide<T>(0));
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, e0 = task % blocks * conv_channels;
        for (Index p = 0; p < passes; p++) {
            Conv<T> f = first[p];
            f.x += b * len * f.ldx;
            f.e0 = e0;
            f.e1 = std::min(dim, e0 + conv_channels);
            Wide<T>* own = sums[p] + b * (f.width + 1) * dim;
            kernel.conv_backward({.f = f,
                                  .du = a.passes[static_cast<std::size_t>(p)].du.template as<T>() + b * len * dim,
                                  .lddu = dim,
                                  .dx = a.dx.as<T>() + b * len * f.ldx,
                                  .lddx = f.ldx,
                                  .add_dx = p > 0,
                                  .dweight = own,
                                  .dbias = own + f.width * dim});
        }
    });
    for (Index p = 0; p < passes; p++) {
        const ConvBackwardPass& pass = a.passes[static_cast<std::size_t>(p)];
        const Index width = first[p].width;
        for (Index b = 0; b < batch; b++) {
            const Wide<T>* own = sums[p] + b * (width + 1) * dim;
            for (Index e = 0; e < dim; e++) {
                if (pass.dweight)
                    for (Index k = 0; k < width; k++) pass.dweight.as<Wide<T>>()[e * width + k] += own[k * dim + e];
                if (pass.dbias) pass.dbias.as<Wide<T>>()[e] += own[width * dim + e];
            }
        }
    }
}

}  // namespace

void CpuBackend::conv1d_forward(Context& ctx, const Conv1dForward& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::conv1d_backward(Context& ctx, const Conv1dBackward& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
