// SPDX-License-Identifier: Apache-2.0
// What happens once per image rather than once per block: patches, class tokens, position table, RoPE.
// Copies and sums; the arithmetic that costs time is in the projections.
#include <cstring>
#include <type_traits>

#include "core/class_places.h"
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index patch_rows = 64;  // patches of a task
constexpr Index token_rows = 64;  // tokens of a task

// Calls f(image pixels, patch pixels) for every run of `patch` pixels of patch j of image b; pixels of type I and T.
template <class I, class T, class F>
void for_each_run(const Patches& a, Index b, Index j, F&& f)
{
    const Index channels = a.images.size(1), height = a.images.size(2), width = a.images.size(3), P = a.patch;
    const Index grid = (width - P) / a.stride + 1, y0 = j / grid * a.stride, x0 = j % grid * a.stride;
    T* cols = a.cols.as<T>() + (b * a.cols.size(1) + j - a.begin) * channels * P * P;
    for (Index c = 0; c < channels; c++)
        for (Index y = 0; y < P; y++)
            f(a.images.as<I>() + ((b * channels + c) * height + y0 + y) * width + x0, cols + (c * P + y) * P);
}

// f with numbers of the types of images and cols.
template <class F>
void dispatch_pixels(const Patches& a, F&& f)
{
    dispatch(a.cols.dtype, [&](auto t) { a.images.dtype == a.cols.dtype ? f(t, t) : f(Wide<decltype(t)>{}, t); });
}

template <class I, class T>
void patches_forward(Context& ctx, const Patches& a)
{
    const Index batch = a.images.size(0), rows = a.cols.size(1), blocks = ceil_div(rows, patch_rows);
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, begin = task % blocks * patch_rows;
        for (Index j = begin; j < std::min(rows, begin + patch_rows); j++)
            for_each_run<I, T>(a, b, a.begin + j, [&](const I* pixels, T* patch) {
                if constexpr (std::is_same_v<I, T>)
                    std::memcpy(patch, pixels, sizeof(T) * static_cast<std::size_t>(a.patch));
                else
                    for (Index i = 0; i < a.patch; i++) patch[i] = T(pixels[i]);
            });
    });
}

template <class I, class T>
void patches_backward(Context& ctx, const Patches& a)  // patches may overlap: one task per image
{
    parallel_for(ctx, a.images.size(0), [&](Index b) {
        for (Index j = a.begin; j < a.begin + a.cols.size(1); j++)
            for_each_run<I, T>(a, b, j, [&](I* pixels, const T* patch) {
                for (Index i = 0; i < a.patch; i++) pixels[i] = I(Wide<T>(pixels[i]) + Wide<T>(patch[i]));
            });
    });
}

// Row k of class tokens, or of their gradients, in up to two tensors; null where it is in none.
template <class T>
T* class_row(const Tensor (&tokens)[2], Index k, Index dim)
{
    const Index first = held_by_first(tokens);
    const Tensor& holder = tokens[k < first ? 0 : 1];
    return holder ? holder.as<T>() + (k < first ? k * dim : 0) : nullptr;
}

template <class T>
void tokens_forward(Context& ctx, const TokensForward& a)
{
    using W = Wide<T>;
    const Index batch = a.out.size(0), len = a.out.size(1), dim = a.out.size(2), blocks = ceil_div(len, token_rows);
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, begin = task % blocks * token_rows;
        for (Index t = begin; t < std::min(len, begin + token_rows); t++) {
            const Index token = class_token_at(a.places, t);
            T* out = a.out.as<T>() + (b * len + t) * dim;
            const W* pos = a.pos_embed ? a.pos_embed.as<W>() + t * dim : nullptr;
            const W* dropout = a.dropout ? a.dropout.as<W>() + (b * len + t) * dim : nullptr;
            const auto place = [&](const auto* in) {
                for (Index d = 0; d < dim; d++)
                    out[d] = T((W(in[d]) + (pos ? pos[d] : W(0))) * (dropout ? dropout[d] : W(1)));
            };
            if (token >= 0)
                place(class_row<W>(a.class_token, token, dim));
            else
                place(a.patches.as<T>() + (b * a.patches.size(1) + patch_at(a.places, t)) * dim);
        }
    });
}

template <class T>
void tokens_backward(Context& ctx, const TokensBackward& a)
{
    using W = Wide<T>;
    const Index batch = a.dout.size(0), len = a.dout.size(1), dim = a.dout.size(2);
    parallel_for(ctx, len, [&](Index t) {  // one task per token: sums over images stay in order
        const Index token = class_token_at(a.places, t), patch = token < 0 ? patch_at(a.places, t) : -1;
        W* dpos = a.dpos_embed ? a.dpos_embed.as<W>() + t * dim : nullptr;
        W* dclass = token >= 0 ? class_row<W>(a.dclass_token, token, dim) : nullptr;
        for (Index b = 0; b < batch; b++) {
            const T* dout = a.dout.as<T>() + (b * len + t) * dim;
            const W* dropout = a.dropout ? a.dropout.as<W>() + (b * len + t) * dim : nullptr;
            T* dpatch = patch >= 0 ? a.dpatches.as<T>() + (b * a.dpatches.size(1) + patch) * dim : nullptr;
            for (Index d = 0; d < dim; d++) {
                const W g = W(dout[d]) * (dropout ? dropout[d] : W(1));
                if (dpos) dpos[d] += g;
                if (dclass) dclass[d] += g;
                if (dpatch) dpatch[d] = T(g);
            }
        }
    });
}

template <class T>
void rope(Context& ctx, const Rope& a)
{
    const Index batch = a.x.size(0), len = a.x.size(1), dim = a.x.size(2);
    using W = Wide<T>;
    const W sign = a.inverse ? W(-1) : W(1);
    parallel_for(ctx, batch * (len - a.skip), [&](Index task) {
        const Index b = task / (len - a.skip), t = task % (len - a.skip);
        T* x = a.x.as<T>() + (b * len + a.skip + t) * dim;
        const W *cosine = a.cos.as<W>() + t * dim, *sine = a.sin.as<W>() + t * dim;
        for (Index d = 0; d + 1 < dim; d += 2) {
            const W x0 = W(x[d]), x1 = W(x[d + 1]);
            x[d] = T(x0 * cosine[d] - sign * x1 * sine[d]);
            x[d + 1] = T(x1 * cosine[d + 1] + sign * x0 * sine[d + 1]);
        }
    });
}

}  // namespace

void CpuBackend::patches_forward(Context& ctx, const Patches& args)
{
    dispatch_pixels(args, [&](auto i, auto t) { cpu::patches_forward<decltype(i), decltype(t)>(ctx, args); });
}

void CpuBackend::patches_backward(Context& ctx, const Patches& args)
{
    dispatch_pixels(args, [&](auto i, auto t) { cpu::patches_backward<decltype(i), decltype(t)>(ctx, args); });
}

void CpuBackend::tokens_forward(Context& ctx, const TokensForward& args)
{
    dispatch(args.out.dtype, [&](auto t) { cpu::tokens_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::tokens_backward(Context& ctx, const TokensBackward& args)
{
    dispatch(args.dout.dtype, [&](auto t) { cpu::tokens_backward<decltype(t)>(ctx, args); });
}

void CpuBackend::rope(Context& ctx, const Rope& args)
{
    dispatch(args.x.dtype, [&](auto t) { cpu::rope<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
