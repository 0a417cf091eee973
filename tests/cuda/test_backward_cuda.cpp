// SPDX-License-Identifier: Apache-2.0
// Backward of normalisation, convolution, projections, patches, tokens and read-out on the device against the CPU in
// float64: all types and optional arguments, sizes around every limit of the kernels, gradients that are added to,
// outputs over inputs, unaligned addresses. Two runs must give the same bits. The argument "linear" picks the
// projections.
#include <memory>

#include "check_cuda.h"
#include "core/context_internals.h"
#include "cuda_operators.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

using Index = std::int64_t;

// A gradient of a parameter that is added to: it starts with these values.
Tensor gradient(Side& side, std::uint64_t seed, const Shape& shape)
{
    return side.parameter(shape, normal(seed, DType::f32, shape.numel()));
}

// Sums over rows may cancel: their error is that of their terms.
constexpr double sum_tolerance = 5e-5;

// run(side) -> Outputs, on the CPU, and twice on the device.
template <class F>
void compare_twice(DType dtype, const std::string& what, F&& run)
{
    const Outputs want = run(Side::cpu()), got = run(Side::cuda(dtype)), again = run(Side::cuda(dtype));
    for (std::size_t i = 0; i < want.size(); i++) {
        const std::string name = what + " " + name_of(dtype) + " " + want[i].name;
        check_agree(got[i].values, want[i].values, want[i].wide ? sum_tolerance : tolerance(dtype), __FILE__, __LINE__,
                    name);
        check_report(same_bits(got[i].values, again[i].values), __FILE__, __LINE__, (name + ": two runs").c_str());
    }
}

// ---- normalisation -------------------------------------------------------------------------------------------------
struct NormCase {
    Index dim;
    bool layer = false, scale = false, arriving = true, dh = true, dweight = true, over = false;
    Index shift = 0, batch = 2, len = 3;
};

void test_norm(DType dtype, const NormCase& c)
{
    const Shape shape{c.batch, c.len, c.dim};
    Floats x = normal(2, DType::f32, shape.numel());
    for (float& value : x) value += c.layer ? 3.0f : 0.0f;
    compare_twice(dtype, text("norm", c.dim, c.layer, c.scale, c.arriving, c.dh, c.dweight, c.over, c.shift, c.len),
                  [&](Side&& side) {
                      NormBackward a;
                      a.kind = c.layer ? Norm::layer : Norm::rms;
                      a.eps = 1e-3;
                      a.x = side.make(shape, wide(side.dtype), x, c.shift);
                      a.weight = side.parameter({c.dim}, normal(4, DType::f32, c.dim));
                      a.dout = side.make(shape, side.dtype, normal(5, dtype, shape.numel()), c.shift);
                      if (c.scale) a.row_scale = side.parameter({c.batch}, normal(3, DType::f32, c.batch));
                      if (c.arriving) a.dresidual_out = side.parameter(shape, normal(6, DType::f32, shape.numel()));
                      a.dresidual = c.over ? a.dresidual_out : side.wide_result(shape);
                      if (c.dh) a.dh = side.result(shape);
                      if (c.dweight) a.dweight = gradient(side, 7, {c.dim});
                      if (c.dweight && c.layer) a.dbias = gradient(side, 8, {c.dim});
                      norm_backward(side.ctx, a);
                      Outputs out{{"dresidual", side.values(a.dresidual), true}};
                      if (a.dh) out.push_back({"dh", side.values(a.dh)});
                      if (a.dweight) out.push_back({"dweight", side.values(a.dweight), true});
                      if (a.dbias) out.push_back({"dbias", side.values(a.dbias), true});
                      return out;
                  });
}

void test_norms(DType dtype)
{
    for (Index dim : {7, 192})
        for (int i = 0; i < 64; i++) {
            const NormCase c{dim, (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0, (i & 16) != 0, (i & 32) != 0};
            if (c.arriving || !c.over) test_norm(dtype, c);
        }
    for (Index dim : {1, 8, 33, 200, 256, 264, 384, 512, 520, 768, 776, 1000, 1024, 1032, 1536})
        for (bool layer : {false, true}) test_norm(dtype, {.dim = dim, .layer = layer, .over = true});
    test_norm(dtype, {.dim = 384, .layer = true, .shift = 1});
    test_norm(dtype, {.dim = 16, .scale = true, .batch = 3, .len = 1500});  // more rows than parts
    test_norm(dtype, {.dim = 5, .layer = true, .batch = 3, .len = 1500});
}

// ---- convolution ---------------------------------------------------------------------------------------------------
struct ConvCase {
    Index dim, stride, width, len;
    std::vector<bool> reverse;
    bool silu = true, bias = true, gradients = true;
    Index shift = 0, batch = 2;
};

void test_conv(DType dtype, const ConvCase& c)
{
    std::string name = text("conv", c.dim, c.stride, c.width, c.len, c.silu, c.bias, c.gradients, c.shift, c.batch);
    for (const bool reverse : c.reverse) name += reverse ? " reverse" : " forward";
    const Shape in{c.batch, c.len, c.stride}, u{c.batch, c.len, c.dim};
    compare_twice(dtype, name, [&](Side&& side) {
        std::vector<ConvBackwardPass> passes(c.reverse.size());
        Conv1dBackward a;
        a.x = side.make(in, side.dtype, normal(10, dtype, in.numel()), c.shift);
        a.dx = side.make(in, side.dtype, normal(11, dtype, in.numel()), c.shift);
        a.silu = c.silu;
        a.passes = passes;
        Outputs out;
        for (std::size_t i = 0; i < passes.size(); i++) {
            ConvBackwardPass& p = passes[i];
            p.reverse = c.reverse[i];
            p.weight = side.parameter({c.dim, 1, c.width}, normal(20 + i, DType::f32, c.dim * c.width));
            if (c.bias) p.bias = side.parameter({c.dim}, normal(30 + i, DType::f32, c.dim));
            p.du = side.activation(u, normal(40 + i, dtype, u.numel()));
            if (c.gradients) p.dweight = gradient(side, 50 + i, p.weight.shape);
            if (c.gradients && c.bias) p.dbias = gradient(side, 60 + i, {c.dim});
        }
        conv1d_backward(side.ctx, a);
        // Two directions without a window add to dx in the type of activations: that it keeps other columns is exact.
        out.push_back({"dx", side.values(a.dx)});
        for (const ConvBackwardPass& p : passes) {
            if (p.dweight) out.push_back({"dweight", side.values(p.dweight), true});
            if (p.dbias) out.push_back({"dbias", side.values(p.dbias), true});
        }
        return out;
    });
}

void test_convs(DType dtype)
{
    int turn = 0;
    for (Index width : {1, 2, 3, 4, 5, 7})
        for (Index dim : {1, 2, 7, 12, 260})
            for (Index len : {1, 2, 3, 17, 33}) {
                if (dim == 260 && len != 3) continue;
                for (const std::vector<bool>& reverse :
                     {std::vector<bool>{false}, std::vector<bool>{true}, std::vector<bool>{false, true}}) {
                    turn++;
                    // outside the windows the second direction adds to dx in the type of activations: float32 only
                    const bool window = width >= 2 && width <= 4 && dim % 2 == 0;
                    if (reverse.size() == 2 && !window && dtype != DType::f32) continue;
                    ConvCase c{dim,     dim + turn % 3 * 4, width,         len,
                               reverse, turn % 5 != 0,      turn % 4 != 0, turn % 6 != 0};
                    if (turn % 7 == 0 && (window ? reverse.size() == 1 : true)) c.shift = 1;
                    test_conv(dtype, c);
                }
            }
    test_conv(dtype, {.dim = 4, .stride = 8, .width = 4, .len = 40, .reverse = {false, true}, .batch = 200});
    test_conv(dtype, {.dim = 2, .stride = 2, .width = 5, .len = 40, .reverse = {true}, .batch = 30});
}

// An image by itself gives the dx that it gives in a batch, long chunks that of short ones.
void test_conv_cuts(DType dtype)
{
    const Index dim = 1024, len = 600, batch = 9;  // more than 2^22 elements
    Side side(cuda_context(), dtype);
    const Shape shape{batch, len, dim};
    const Tensor x = side.activation(shape, normal(12, dtype, shape.numel())), dx = side.result(shape);
    const Tensor alone = side.result({1, len, dim});
    ConvBackwardPass passes[2];
    for (int i = 0; i < 2; i++) {
        passes[i].reverse = i == 1;
        passes[i].weight = side.parameter({dim, 4}, normal(13, DType::f32, 4 * dim));
        passes[i].du = side.activation(shape, normal(14, dtype, shape.numel()));
    }
    conv1d_backward(side.ctx, {.x = x, .passes = passes, .silu = true, .dx = dx});
    const Index last = batch - 1;
    for (ConvBackwardPass& p : passes) {
        p.du = p.du.slice(last, batch);
    }
    conv1d_backward(side.ctx, {.x = x.slice(last, batch), .passes = passes, .silu = true, .dx = alone});
    const Floats all = side.values(dx);
    CHECK(same_bits(side.values(alone), Floats(all.end() - len * dim, all.end())));
}

// ---- projections ---------------------------------------------------------------------------------------------------
struct LinearCase {
    Index rows, k, n;
    bool dx = true, accumulate = false, dweight = true, dbias = false;
};

void test_linear(DType dtype, const LinearCase& c)
{
    compare_twice(dtype, text("linear", c.rows, c.k, c.n, c.dx, c.accumulate, c.dweight, c.dbias), [&](Side&& side) {
        LinearBackward a;
        a.x = side.activation({1, c.rows, c.k}, normal(70, dtype, c.rows * c.k));
        a.dy = side.activation({1, c.rows, c.n}, normal(71, dtype, c.rows * c.n));
        a.weight = side.parameter({c.n, c.k}, normal(72, dtype, c.n * c.k));
        if (c.dx) a.dx = side.activation(a.x.shape, normal(73, dtype, c.rows * c.k));
        a.accumulate_dx = c.accumulate;
        if (c.dweight) a.dweight = gradient(side, 74, {c.n, c.k});
        if (c.dbias) a.dbias = gradient(side, 75, {c.n});
        linear_backward(side.ctx, {&a, 1});
        Outputs out;
        if (a.dx) out.push_back({"dx", side.values(a.dx)});
        if (a.dweight) out.push_back({"dweight", side.values(a.dweight), true});
        if (a.dbias) out.push_back({"dbias", side.values(a.dbias), true});
        return out;
    });
}

// x_proj of both directions in one call, `gap` elements between their tensors.
void test_linear_pair(DType dtype, Index gap, bool swapped)
{
    const Index rows = 37, k = 24, n = 20;
    compare_twice(dtype, text("linear pair", gap, swapped), [&](Side&& side) {
        auto both = [&](Index columns, std::uint64_t seed) {
            return side.activation({2 * (rows * columns + gap)}, normal(seed, dtype, 2 * (rows * columns + gap)));
        };
        const Tensor x = both(k, 80), dy = both(n, 81), dx = both(k, 82);
        const Tensor weight = side.parameter({2, n, k}, normal(83, dtype, 2 * n * k));
        const Tensor dweight = gradient(side, 84, {2, n, k});
        LinearBackward args[2];
        for (Index i = 0; i < 2; i++) {
            const Index place = swapped ? 1 - i : i;
            auto part = [&](const Tensor& t, Index columns) {
                const Index begin = place * (rows * columns + gap);
                return t.slice(begin, begin + rows * columns).view({rows, columns});
            };
            args[i] = {.x = part(x, k),
                       .weight = weight[place],
                       .dy = part(dy, n),
                       .dx = part(dx, k),
                       .accumulate_dx = true,
                       .dweight = dweight[place],
                       .dbias = {}};
        }
        linear_backward(side.ctx, args);
        return Outputs{{"dx", side.values(dx)}, {"dweight", side.values(dweight), true}};
    });
}

void test_linears(DType dtype)
{
    for (const auto& [rows, k, n] : {std::array<Index, 3>{1, 1, 1},
                                     {7, 3, 5},
                                     {67, 192, 20},
                                     {66, 38, 44},
                                     {33, 31, 13},
                                     {64, 64, 64},
                                     {300, 12, 9}})
        for (int i = 0; i < 16; i++)
            test_linear(dtype, {rows, k, n, (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0});
    test_linear(dtype, {.rows = 70000, .k = 2, .n = 3, .dx = false, .dweight = false, .dbias = true});  // three stages
    test_linear(dtype, {.rows = 0, .k = 4, .n = 3, .dbias = true});
    for (Index gap : {0, 8, 3})
        for (bool swapped : {false, true}) test_linear_pair(dtype, gap, swapped);
}

// ---- front and read-out --------------------------------------------------------------------------------------------
void test_patches(DType dtype, Index height, Index width, Index patch, Index stride, Index begin, Index count)
{
    const Index batch = 2, channels = 3;
    compare_twice(dtype, text("patches", height, width, patch, stride, begin, count), [&](Side&& side) {
        const Shape images{batch, channels, height, width}, cols{batch, count, channels * patch * patch};
        Patches a;
        a.images = side.activation(images, normal(90, dtype, images.numel()));
        a.cols = side.activation(cols, normal(91, dtype, cols.numel()));
        a.patch = patch;
        a.stride = stride;
        a.begin = begin;
        patches_backward(side.ctx, a);
        return Outputs{{"images", side.values(a.images)}};
    });
}

// tail: whether the last class token is a tensor of its own.
void test_tokens(DType dtype, Index dim, ClassPlaces places, bool tail, bool pos, bool dropout, bool gradients)
{
    const Index batch = 3, len = 9, count = places.count;
    const std::string name = text("tokens", dim, places.first, places.step, count, pos, dropout, gradients);
    compare_twice(dtype, name, [&](Side&& side) {
        const Shape x{batch, len, dim};
        TokensBackward a;
        a.dpatches = side.result({batch, len - count, dim});
        a.dout = side.activation(x, normal(92, dtype, x.numel()));
        a.places = places;
        if (dropout) a.dropout = side.parameter(x, normal(93, DType::f32, x.numel()));
        if (pos && gradients) a.dpos_embed = gradient(side, 94, {1, len, dim});
        if (count - tail > 0 && gradients) a.dclass_token[0] = gradient(side, 95, {1, count - tail, dim});
        if (tail && gradients) a.dclass_token[1] = gradient(side, 96, {1, 1, dim});
        tokens_backward(side.ctx, a);
        Outputs out{{"dpatches", side.values(a.dpatches)}};
        for (const Tensor& t : {a.dpos_embed, a.dclass_token[0], a.dclass_token[1]})
            if (t) out.push_back({"gradient", side.values(t), true});
        return out;
    });
}

void test_readout(DType dtype, Reduce reduce, Index dim, Index len, ClassPlaces places)
{
    const Index batch = 3, rows = reduce == Reduce::join ? places.count : 1;
    const std::string name =
        text("readout", static_cast<Index>(reduce), dim, len, places.first, places.step, places.count);
    compare_twice(dtype, name, [&](Side&& side) {
        const Shape x{batch, len, dim};
        Floats values = normal(97, dtype, x.numel());
        for (float& value : values) value = std::round(value);  // many equal maxima
        ReadoutBackward a;
        a.reduce = reduce;
        a.places = places;
        a.x = side.activation(x, values);
        a.dout = side.activation({batch, rows * dim}, normal(98, dtype, batch * rows * dim));
        a.dx = side.result(x);
        readout_backward(side.ctx, a);
        return Outputs{{"dx", side.values(a.dx)}};
    });
}

void test_ends(DType dtype)
{
    test_patches(dtype, 16, 24, 4, 4, 0, 24);
    test_patches(dtype, 17, 25, 4, 2, 0, 77);  // overlapping, and a border without patches
    test_patches(dtype, 17, 25, 4, 2, 5, 30);
    test_patches(dtype, 16, 16, 3, 5, 0, 9);  // with gaps
    for (Index dim : {1, 7, 24})
        for (bool pos : {false, true}) {
            test_tokens(dtype, dim, {}, false, pos, true, true);
            test_tokens(dtype, dim, {4, 1, 1}, false, pos, false, true);
            test_tokens(dtype, dim, {0, 8, 2}, true, pos, true, true);
            test_tokens(dtype, dim, {0, 8, 2}, true, pos, true, false);
            test_tokens(dtype, dim, {1, 2, 3}, false, pos, true, true);
        }
    for (Index dim : {1, 7, 40})
        for (Index len : {1, 5, 70}) {
            test_readout(dtype, Reduce::mean, dim, len, {});
            test_readout(dtype, Reduce::max, dim, len, {});
            test_readout(dtype, Reduce::select, dim, len, {len / 2, 1, 1});
            if (len > 1) test_readout(dtype, Reduce::select, dim, len, {0, len - 1, 2});
            if (len > 4) test_readout(dtype, Reduce::join, dim, len, {1, 2, len / 2});
        }
}

// ---- parameters ----------------------------------------------------------------------------------------------------
void test_scale_rows(bool matrix, bool factor)
{
    compare_twice(DType::f32, text("scale_rows", matrix, factor), [&](Side&& side) {
        const Shape shape{9, 70};
        const Tensor m = gradient(side, 1, shape), f = gradient(side, 2, {9}), d = gradient(side, 3, shape);
        const Tensor dm = gradient(side, 4, shape), df = gradient(side, 5, {9});
        backend_of(side.ctx).scale_rows_backward(side.ctx, {.matrix = m,
                                                            .factor = f,
                                                            .dout = d,
                                                            .dmatrix = matrix ? dm : Tensor{},
                                                            .dfactor = factor ? df : Tensor{}});
        return Outputs{{"dmatrix", side.values(dm), true}, {"dfactor", side.values(df), true}};
    });
}

void test_accumulate()
{
    compare_twice(DType::f32, "accumulate", [&](Side&& side) {
        const Tensor to[] = {gradient(side, 1, {3, 7}), {}, gradient(side, 2, {129})};
        const Tensor from[] = {gradient(side, 3, {3, 7}), {}, gradient(side, 4, {129})};
        backend_of(side.ctx).accumulate(side.ctx, {.to = to, .from = from});
        return Outputs{{"first", side.values(to[0]), true}, {"last", side.values(to[2]), true}};
    });
}

// None may launch a kernel: a grid without blocks is an error.
void test_empty(DType dtype)
{
    Side side(cuda_context(), dtype);
    Context& ctx = side.ctx;
    const Tensor none = side.result({0, 5, 8}), wide_none = side.wide_result({0, 5, 8});
    const Tensor weight = gradient(side, 1, {8}), kernel = gradient(side, 2, {8, 1, 4});
    NormBackward norm;
    norm.x = norm.dresidual = wide_none;
    norm.dout = none;
    norm.weight = norm.dweight = weight;
    norm_backward(ctx, norm);
    ConvBackwardPass pass;
    pass.weight = pass.dweight = kernel;
    pass.du = none;
    conv1d_backward(ctx, {.x = none, .passes = {&pass, 1}, .silu = true, .dx = none});
    patches_backward(ctx, {side.result({0, 3, 16, 16}), 4, 4, 0, side.result({0, 16, 48})});
    TokensBackward tokens;
    tokens.dpatches = tokens.dout = none;
    tokens_backward(ctx, tokens);
    ReadoutBackward readout;
    readout.x = readout.dx = none;
    readout.dout = side.result({0, 8});
    readout_backward(ctx, readout);
    CHECK(same_bits(side.values(weight), normal(1, DType::f32, 8)));
}

// After the first call of a size, scratch memory neither grows nor moves.
void test_allocations()
{
    Context& ctx = cuda_context();
    std::size_t warm = 0;
    for (int i = 0; i < 4; i++) {
        test_norm(DType::bf16, {.dim = 192, .layer = true});
        test_linear(DType::bf16, {.rows = 700, .k = 12, .n = 9, .dbias = true});
        if (i == 1) warm = arena_of(ctx).allocations();
    }
    CHECK(arena_of(ctx).allocations() == warm);
}

}  // namespace

int main(int count, char** arguments)
{
    const bool linear_only = count > 1 && std::string(arguments[1]) == "linear";
    for (DType dtype : device_types) {
        test_linears(dtype);
        if (linear_only) continue;
        test_norms(dtype);
        test_convs(dtype);
        test_ends(dtype);
        test_empty(dtype);
    }
    if (linear_only) return check_failures();
    test_conv_cuts(DType::bf16);
    for (int i = 0; i < 4; i++) test_scale_rows((i & 1) != 0, (i & 2) != 0);
    test_accumulate();
    test_allocations();
    return check_failures();
}
