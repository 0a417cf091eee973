// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias. Weights and biases are float32; beside 16-bit activations they are cast once and kept in the weight
// cache. Two problems of one size at a fixed distance from each other (x_proj of both directions) run as one batch.
#include <cstdint>
#include <optional>

#include "arena.h"
#include "cublaslt.h"
#include "weight_cache.h"

namespace vimcore::cuda {

namespace {

// Keys of what is cached for a weight or bias, plus its DType. Other files of this folder use other keys.
enum CacheKind : int { cache_weight = 100, cache_pair = 120, cache_bias = 140 };

template <class F>
const void* packed(Context& ctx, const Tensor& weight, int kind, DType dtype, Index count, F&& fill)
{
    const auto bytes = static_cast<std::size_t>(count) * size_of(dtype);
    if (ctx.cache) return ctx.cache->get(ctx, weight.data, kind + static_cast<int>(dtype), bytes, fill);
    void* memory = ctx.arena().take({count}, dtype).data;
    fill(memory);
    return memory;
}

const void* cast(Context& ctx, const Tensor& weight, CacheKind kind, DType dtype)
{
    if (!weight || weight.dtype == dtype) return weight.data;
    return packed(ctx, weight, kind, dtype, weight.numel(),
                  [&](void* to) { copy(ctx, weight, {to, weight.shape, dtype, ctx.device()}); });
}

// Both weights, the second `stride` elements behind the first.
const void* cast_pair(Context& ctx, const Tensor& first, const Tensor& second, DType dtype, Index stride)
{
    const auto offset = static_cast<std::size_t>(stride) * size_of(dtype);
    return packed(ctx, first, cache_pair, dtype, 2 * stride, [&](void* to) {
        copy(ctx, first, {to, first.shape, dtype, ctx.device()});
        copy(ctx, second, {static_cast<char*>(to) + offset, second.shape, dtype, ctx.device()});
    });
}

GemmArgs problem(const LinearForward& a)
{
    GemmArgs g;
    g.dtype = a.x.dtype;
    g.x = a.x.data;
    g.bias = a.bias.as<float>();
    g.y = a.y.data;
    g.n = a.weight.size(0);
    g.k = a.weight.size(1);
    g.m = g.n ? a.y.numel() / g.n : 0;
    g.ldx = g.ldw = g.k;
    g.ldy = g.n;
    return g;
}

// Elements from a to b, if b lies behind a and no farther than a batch of matrices may.
std::optional<Index> distance(const Tensor& a, const Tensor& b)
{
    const auto bytes =
        static_cast<Index>(reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data));
    const auto size = static_cast<Index>(size_of(a.dtype));
    if (bytes < static_cast<Index>(a.bytes()) || bytes % size != 0) return {};
    return bytes / size;
}

// Both as one batch of two, where they are of one size and lie in the same order.
std::optional<GemmArgs> pair(const LinearForward& a, const LinearForward& b)
{
    if (a.bias || b.bias || a.weight.shape != b.weight.shape || a.x.dtype != b.x.dtype || a.x.numel() != b.x.numel())
        return {};
    const std::optional<Index> x = distance(a.x, b.x), y = distance(a.y, b.y);
    if (!x || !y) return {};
    GemmArgs g = problem(a);
    g.count = 2;
    g.stride_x = *x;
    g.stride_y = *y;
    g.stride_w = round_up(a.weight.numel(), 64);
    return g;
}

void multiply(Context& ctx, const GemmArgs& g, const Tensor& bias)
{
    if (g.m == 0 || g.n == 0) return;
    if (g.k > 0 && has_cublaslt() && matmul(ctx, g, cast(ctx, bias, cache_bias, g.dtype))) return;
    gemm(ctx, g);
}

}  // namespace

void linear_forward(Context& ctx, std::span<const LinearForward> args)
{
    Arena::Scope scope(ctx.arena());
    for (std::size_t i = 0; i < args.size(); i++) {
        const LinearForward& a = args[i];
        if (i + 1 < args.size()) {
            if (std::optional<GemmArgs> both = pair(a, args[i + 1])) {
                both->w = cast_pair(ctx, a.weight, args[i + 1].weight, both->dtype, both->stride_w);
                multiply(ctx, *both, {});
                i++;
                continue;
            }
        }
        GemmArgs g = problem(a);
        g.w = cast(ctx, a.weight, cache_weight, g.dtype);
        multiply(ctx, g, a.bias);
    }
}

}  // namespace vimcore::cuda
