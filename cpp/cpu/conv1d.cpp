// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution and SiLU.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index conv_tokens = 32;    // tokens of a forward task
constexpr Index conv_channels = 64;  // channels of a backward task

template <class T>
ConvArgs<T> conv_args(Context& ctx, const Conv1d& a, const ConvPass& p, Index b)
{
    const Index len = a.x.size(1), ldx = a.x.size(2), tokens = p.u.size(1), dim = p.u.size(2);
    const Index width = p.weight.numel() / std::max<Index>(dim, 1);
    ConvArgs<T> args{};
    args.x = a.x.as<T>() + b * len * ldx;
    args.ldx = ldx;
    args.weight = packed_transpose<T>(ctx, p.weight, pack_conv, dim, width);
    args.bias = p.bias.as<T>();
    args.u = p.u.as<T>() + b * tokens * dim;
    args.ldu = dim;
    args.begin = p.begin;
    args.len = tokens;
    args.total = len;
    args.dim = args.e1 = dim;
    args.width = width;
    args.reverse = p.reverse;
    args.silu = a.silu;
    return args;
}

template <class T>
void conv_forward(Context& ctx, const Conv1d& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.x.size(0), passes = static_cast<Index>(a.passes.size());
    Index tokens = 0;
    for (const ConvPass& p : a.passes) tokens = std::max<Index>(tokens, p.u.size(1));
    const Index blocks = ceil_div(tokens, conv_tokens);
    Arena::Scope scope(ctx.arena());
    ConvArgs<T> first[2];
    for (Index p = 0; p < passes; p++) first[p] = conv_args<T>(ctx, a, a.passes[static_cast<std::size_t>(p)], 0);
    parallel_for(ctx.threads(), passes * batch * blocks, [&](Index task) {
        const Index p = task % passes, b = task / passes % batch, begin = task / passes / batch * conv_tokens;
        ConvArgs<T> args = first[p];
        if (begin >= args.len) return;
        args.x += b * a.x.size(1) * args.ldx;
        args.u += (b * args.len + begin) * args.dim;
        args.begin += begin;
        args.len = std::min(conv_tokens, args.len - begin);
        kernel.conv_forward(args);
    });
}

// One task per image and channel block, both passes in order; weight gradients are partial sums per image.
template <class T>
void conv_backward(Context& ctx, const Conv1d& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.x.size(0), len = a.x.size(1), passes = static_cast<Index>(a.passes.size());
    const Index dim = a.passes[0].u.size(2), blocks = ceil_div(dim, conv_channels);
    Arena::Scope scope(ctx.arena());
    ConvArgs<T> first[2];
    T* sums[2];
    for (Index p = 0; p < passes; p++) {
        first[p] = conv_args<T>(ctx, a, a.passes[static_cast<std::size_t>(p)], 0);
        const Index count = batch * (first[p].width + 1) * dim;
        sums[p] = scratch<T>(ctx, count).template as<T>();
        std::fill_n(sums[p], count, T(0));
    }
    parallel_for(ctx.threads(), batch * blocks, [&](Index task) {
        const Index b = task / blocks, e0 = task % blocks * conv_channels;
        for (Index p = 0; p < passes; p++) {
            const ConvPass& pass = a.passes[static_cast<std::size_t>(p)];
            ConvArgs<T> args = first[p];
            args.x += b * len * args.ldx;
            args.u = nullptr;
            args.e0 = e0;
            args.e1 = std::min(dim, e0 + conv_channels);
            args.du = pass.du.as<T>() + b * len * dim;
            args.lddu = dim;
            args.dx = a.dx.as<T>() + b * len * args.ldx;
            args.lddx = args.ldx;
            args.add_dx = p > 0;
            args.dweight = sums[p] + b * (args.width + 1) * dim;
            args.dbias = args.dweight + args.width * dim;
            kernel.conv_backward(args);
        }
    });
    for (Index p = 0; p < passes; p++) {
        const ConvPass& pass = a.passes[static_cast<std::size_t>(p)];
        const Index width = first[p].width;
        for (Index b = 0; b < batch; b++) {
            const T* own = sums[p] + b * (width + 1) * dim;
            for (Index e = 0; e < dim; e++) {
                if (pass.dweight)
                    for (Index k = 0; k < width; k++) pass.dweight.as<T>()[e * width + k] += own[k * dim + e];
                if (pass.dbias) pass.dbias.as<T>()[e] += own[width * dim + e];
            }
        }
    }
}

}  // namespace

void CpuBackend::conv1d_forward(Context& ctx, const Conv1d& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::conv1d_backward(Context& ctx, const Conv1d& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
