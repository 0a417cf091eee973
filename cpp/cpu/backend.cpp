// SPDX-License-Identifier: Apache-2.0
// Normalisation and convolution on the CPU.
#include "backend.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "vimcore/error.h"

namespace vimcore {

Backend& cpu_backend()
{
    static auto& backend = *new cpu::CpuBackend;  // never destroyed: memory may be given back at any time
    return backend;
}

namespace cpu {

namespace {

constexpr Index norm_rows = 16;      // rows of a forward task
constexpr Index sum_rows = 256;      // rows of one partial sum of weight gradients
constexpr Index conv_tokens = 32;    // tokens of a forward task
constexpr Index conv_channels = 64;  // channels of a backward task

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
    parallel_for(ctx.threads(), batch * blocks, [&](Index task) {
        const Index b = task / blocks, row = task % blocks * norm_rows, offset = (b * len + row) * dim;
        kernel.norm_forward({.h = at<T>(a.h, offset),
                             .residual = at<T>(a.residual, offset),
                             .weight = a.weight.as<T>(),
                             .bias = a.bias.as<T>(),
                             .residual_out = at<T>(a.residual_out, offset),
                             .out = at<T>(a.out, offset),
                             .row_scale = a.row_scale ? a.row_scale.as<T>()[b] : T(1),
                             .eps = static_cast<T>(a.eps),
                             .layer = a.kind == Norm::layer,
                             .len = std::min(norm_rows, len - row),
                             .dim = dim,
                             .dout = nullptr,
                             .dresidual_out = nullptr,
                             .dresidual = nullptr,
                             .dh = nullptr,
                             .dweight = nullptr,
                             .dbias = nullptr});
    });
}

// Partial sums of dweight and dbias per block of rows, added up in order of the blocks.
template <class T>
void norm_backward(Context& ctx, const NormBackward& a)
{
    const Index batch = a.x.size(0), len = a.x.size(1), dim = a.x.size(2), blocks = ceil_div(len, sum_rows);
    const Kernels<T>& kernel = kernels<T>();
    Arena::Scope scope(ctx.arena());
    T* sums = scratch<T>(ctx, batch * blocks * 2 * dim).template as<T>();
    std::fill_n(sums, batch * blocks * 2 * dim, T(0));
    parallel_for(ctx.threads(), batch * blocks, [&](Index task) {
        const Index b = task / blocks, row = task % blocks * sum_rows, offset = (b * len + row) * dim;
        T* own = sums + task * 2 * dim;
        kernel.norm_backward({.h = nullptr,
                              .residual = at<T>(a.x, offset),
                              .weight = a.weight.as<T>(),
                              .bias = nullptr,
                              .residual_out = nullptr,
                              .out = nullptr,
                              .row_scale = a.row_scale ? a.row_scale.as<T>()[b] : T(1),
                              .eps = static_cast<T>(a.eps),
                              .layer = a.kind == Norm::layer,
                              .len = std::min(sum_rows, len - row),
                              .dim = dim,
                              .dout = at<T>(a.dout, offset),
                              .dresidual_out = at<T>(a.dresidual_out, offset),
                              .dresidual = at<T>(a.dresidual, offset),
                              .dh = at<T>(a.dh, offset),
                              .dweight = own,
                              .dbias = own + dim});
    });
    for (Index task = 0; task < batch * blocks; task++)
        for (Index j = 0; j < dim; j++) {
            if (a.dweight) a.dweight.as<T>()[j] += sums[task * 2 * dim + j];
            if (a.dbias) a.dbias.as<T>()[j] += sums[task * 2 * dim + dim + j];
        }
}

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

void* CpuBackend::allocate(std::size_t bytes, int)
{
    // Large blocks in huge pages: a small page costs microseconds at its first use, and a TLB entry ever after.
    constexpr std::size_t huge = std::size_t{2} << 20;
    const std::size_t alignment = bytes < huge ? 64 : huge;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (!memory) throw OutOfMemory("[buffer] out of memory: " + std::to_string(bytes) + " bytes");
#ifdef MADV_HUGEPAGE
    if (alignment == huge) (void)::madvise(memory, bytes, MADV_HUGEPAGE);  // only advice
#endif
    return memory;
}

void CpuBackend::copy(Context&, const Tensor& from, const Tensor& to)
{
    if (from.dtype != to.dtype)
        throw std::invalid_argument("[copy] to: expected " + describe(from) + ", got " + describe(to));
    std::memcpy(to.data, from.data, to.bytes());
}

void CpuBackend::scale_rows(Context&, const Tensor& matrix, const Tensor& factor, const Tensor& out)
{
    dispatch(out.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Index columns = matrix.size(1);
        for (Index i = 0; i < matrix.numel(); i++) out.as<T>()[i] = matrix.as<T>()[i] * factor.as<T>()[i / columns];
    });
}

void CpuBackend::scale_rows_backward(Context&, const Tensor& matrix, const Tensor& factor, const Tensor& dout,
                                     const Tensor& dmatrix, const Tensor& dfactor)
{
    dispatch(matrix.dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *d = dout.as<T>(), *w = matrix.as<T>(), *f = factor.as<T>();
        const Index columns = matrix.size(1);
        for (Index i = 0; i < matrix.size(0); i++) {
            T sum = 0;
            for (Index j = i * columns; j < (i + 1) * columns; j++) {
                if (dmatrix) dmatrix.as<T>()[j] += f[i] * d[j];
                sum += w[j] * d[j];
            }
            if (dfactor) dfactor.as<T>()[i] += sum;
        }
    });
}

// Every thread takes its share of every tensor.
void CpuBackend::accumulate(Context& ctx, std::span<const Tensor> to, std::span<const Tensor> from)
{
    const Index workers = ctx.threads();
    parallel_for(ctx.threads(), workers, [&](Index worker) {
        for (std::size_t i = 0; i < to.size(); i++) {
            if (!to[i]) continue;
            const Index n = to[i].numel(), begin = n * worker / workers, end = n * (worker + 1) / workers;
            dispatch(to[i].dtype, [&](auto zero) {
                using T = decltype(zero);
                T* sum = to[i].as<T>();
                const T* part = from[i].as<T>();
                for (Index j = begin; j < end; j++) sum[j] += part[j];
            });
        }
    });
}

void CpuBackend::change_stream(Context&, void*, void*)
{
    throw std::invalid_argument("[context] stream: the cpu has none");
}

std::shared_ptr<void> CpuBackend::record(Context&, void (*)(void*), void*)
{
    throw std::invalid_argument("[context] record: the cpu has no streams to record");
}

void CpuBackend::replay(Context&, void*) { throw std::invalid_argument("[context] replay: the cpu has no streams"); }

void CpuBackend::norm_forward(Context& ctx, const NormForward& args)
{
    dispatch(args.out.dtype, [&](auto t) { cpu::norm_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::norm_backward(Context& ctx, const NormBackward& args)
{
    dispatch(args.x.dtype, [&](auto t) { cpu::norm_backward<decltype(t)>(ctx, args); });
}

void CpuBackend::conv1d_forward(Context& ctx, const Conv1d& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::conv1d_backward(Context& ctx, const Conv1d& args)
{
    if (args.x.numel()) dispatch(args.x.dtype, [&](auto t) { conv_backward<decltype(t)>(ctx, args); });
}

}  // namespace cpu
}  // namespace vimcore
