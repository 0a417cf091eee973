// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias; backward dx = dy W, dW += dy^T x, dbias += the rows of dy. Weights, biases and their gradients are
// float32; beside 16-bit activations weights and biases are cast and kept in the weight cache, which renews all of them
// with one launch when weights have changed (casts.cu), and gradients are accumulated in float32 by the products
// themselves. Two problems of one size at a fixed distance from each other (x_proj of both directions) run as one
// batch.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/context_internals.h"
#include "core/weight_cache.h"
#include "cublaslt.h"

namespace vimcore::cuda {

namespace {

// copies(to): what makes up the packed form at `to`, which has zeros elsewhere.
template <class F>
const void* packed(Context& ctx, const Tensor& weight, WeightForm form, DType dtype, Index count, F&& copies)
{
    const auto bytes = static_cast<std::size_t>(count) * size_of(dtype);
    if (WeightCache* cache = internals(ctx).cache)
        return cache->get_copies(ctx, {weight.data, form, dtype}, bytes, copies);
    const Tensor memory = arena_of(ctx).take({count}, dtype);
    const std::vector<Copy> parts = copies(memory.data);
    if (copied_bytes(parts) < memory.bytes()) fill_zero(ctx, memory);
    for (const Copy& c : parts) copy(ctx, c.from, c.to);
    return memory.data;
}

const void* copied(Context& ctx, const Tensor& weight, DType dtype, Index count)
{
    return packed(ctx, weight, WeightForm::cast, dtype, count,
                  [&](void* to) { return std::vector<Copy>{{weight, {to, weight.shape, dtype, ctx.device()}}}; });
}

// A weight (N, K) as (rows, K), rows >= N.
const void* cast(Context& ctx, const Tensor& weight, DType dtype, Index rows)
{
    if (weight.dtype == dtype) return weight.data;
    return copied(ctx, weight, dtype, rows * weight.size(1));
}

// cuBLASLt reads a bias 16 bytes at a time, and does not ask where it lies.
const void* cast_bias(Context& ctx, const Tensor& bias, DType dtype)
{
    const bool aligned = reinterpret_cast<std::uintptr_t>(bias.data) % 16 == 0;
    if (!bias || (bias.dtype == dtype && aligned)) return bias.data;
    return copied(ctx, bias, dtype, bias.numel());
}

// Both weights, the second `stride` elements behind the first.
const void* cast_pair(Context& ctx, const Tensor& first, const Tensor& second, DType dtype, Index stride)
{
    const auto offset = static_cast<std::size_t>(stride) * size_of(dtype);
    return packed(ctx, first, WeightForm::cast_pair, dtype, 2 * stride, [&](void* to) {
        void* const behind = static_cast<char*>(to) + offset;
        return std::vector<Copy>{{first, {to, first.shape, dtype, ctx.device()}},
                                 {second, {behind, second.shape, dtype, ctx.device()}}};
    });
}

GemmArgs problem(const LinearForward& a)
{
    GemmArgs g;
    g.dtype = g.y_dtype = a.x.dtype;
    g.x = a.x.data;
    g.bias = a.bias.as<float>();
    g.y = a.y.data;
    g.n = g.ldy = a.y.shape[-1];  // rows of the weight, or padded
    g.k = a.weight.size(1);
    g.m = g.n ? a.y.numel() / g.n : 0;
    g.ldx = g.ldw = g.k;
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

// dx (rows, K) = dy (rows, N) W, without W.
GemmArgs input_problem(const LinearBackward& a)
{
    GemmArgs g;
    g.dtype = g.y_dtype = a.dy.dtype;
    g.x = a.dy.data;
    g.w_across = true;
    g.y = a.dx.data;
    g.add = a.accumulate_dx;
    g.k = g.ldx = a.dy.shape[-1];  // rows of the weight, or padded
    g.n = g.ldw = g.ldy = a.weight.size(1);
    g.m = g.n ? a.dx.numel() / g.n : 0;
    return g;
}

// dW (N, K) += dy^T x, sums over rows.
GemmArgs weight_problem(const LinearBackward& a)
{
    GemmArgs g;
    g.dtype = a.dy.dtype;
    g.y_dtype = DType::f32;
    g.x = a.dy.data;
    g.w = a.x.data;
    g.y = a.dweight.data;
    g.x_across = g.w_across = g.add = true;
    g.m = a.dweight.size(0);
    g.n = g.ldw = g.ldy = a.dweight.size(1);
    g.ldx = a.dy.shape[-1];
    g.k = g.ldx ? a.dy.numel() / g.ldx : 0;
    return g;
}

// g and the same problem at these distances from it as one batch; nothing where a distance is missing.
std::optional<GemmArgs> pair(GemmArgs g, std::optional<Index> x, std::optional<Index> w, std::optional<Index> y)
{
    if (!x || !w || !y) return {};
    g.count = 2;
    g.stride_x = *x;
    g.stride_w = *w;
    g.stride_y = *y;
    return g;
}

// Distance of the second weight of `rows` rows in a cast pair.
Index cast_distance(const Tensor& weight, Index rows) { return round_up(rows * weight.size(1), 64); }

// Both as one batch of two, where they are of one size and lie in the same order.
std::optional<GemmArgs> pair(const LinearForward& a, const LinearForward& b)
{
    if (a.bias || b.bias || a.weight.shape != b.weight.shape || a.x.dtype != b.x.dtype || a.x.numel() != b.x.numel() ||
        a.y.shape[-1] != b.y.shape[-1])
        return {};
    return pair(problem(a), distance(a.x, b.x), cast_distance(a.weight, a.y.shape[-1]), distance(a.y, b.y));
}

void multiply(Context& ctx, const GemmArgs& g, const Tensor& bias)
{
    if (g.m == 0 || g.n == 0) return;
    if (g.k > 0 && has_cublaslt() && matmul(ctx, g, cast_bias(ctx, bias, g.y_dtype))) return;
    gemm(ctx, g);
}

// Whether two projections have the same sizes and want their gradients in the same way.
bool alike(const LinearBackward& a, const LinearBackward& b)
{
    return a.dy.dtype == b.dy.dtype && a.dy.shape == b.dy.shape && a.dx.shape == b.dx.shape &&
           a.accumulate_dx == b.accumulate_dx && a.weight.shape == b.weight.shape && a.dweight.shape == b.dweight.shape;
}

void input_gradients(Context& ctx, std::span<const LinearBackward> args)
{
    for (std::size_t i = 0; i < args.size(); i++) {
        const LinearBackward& a = args[i];
        if (!a.dx) continue;
        if (i + 1 < args.size() && alike(a, args[i + 1])) {
            const LinearBackward& b = args[i + 1];
            if (std::optional<GemmArgs> both = pair(input_problem(a), distance(a.dy, b.dy),
                                                    cast_distance(a.weight, a.dy.shape[-1]), distance(a.dx, b.dx))) {
                both->w = cast_pair(ctx, a.weight, b.weight, both->dtype, both->stride_w);
                multiply(ctx, *both, {});
                i++;
                continue;
            }
        }
        GemmArgs g = input_problem(a);
        g.w = cast(ctx, a.weight, g.dtype, g.k);
        multiply(ctx, g, {});
    }
}

void weight_gradients(Context& ctx, std::span<const LinearBackward> args)
{
    for (std::size_t i = 0; i < args.size(); i++) {
        const LinearBackward& a = args[i];
        if (!a.dweight) continue;
        const GemmArgs g = weight_problem(a);
        if (i + 1 < args.size() && alike(a, args[i + 1])) {
            const LinearBackward& b = args[i + 1];
            if (const std::optional<GemmArgs> both =
                    pair(g, distance(a.dy, b.dy), distance(a.x, b.x), distance(a.dweight, b.dweight))) {
                multiply(ctx, *both, {});
                i++;
                continue;
            }
        }
        if (g.k > 0) multiply(ctx, g, {});
    }
}

}  // namespace

void linear_forward(Context& ctx, const std::span<const LinearForward>& args)
{
    Arena::Scope scope(arena_of(ctx));
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
        g.w = cast(ctx, a.weight, g.dtype, g.n);
        multiply(ctx, g, a.bias);
    }
}

void linear_backward(Context& ctx, const std::span<const LinearBackward>& args)
{
    Arena::Scope scope(arena_of(ctx));
    weight_gradients(ctx, args);
    for (const LinearBackward& a : args) {
        if (!a.dbias) continue;
        const Index outputs = a.dy.shape[-1];
        const ColumnSum bias{a.dy.view({a.dy.numel() / std::max<Index>(outputs, 1), outputs}), a.dbias};
        sum_columns(ctx, {&bias, 1});
    }
    input_gradients(ctx, args);
}

}  // namespace vimcore::cuda
