// SPDX-License-Identifier: Apache-2.0
// Normalisation, convolution, sums, copies and the plain matrix product on the device against the CPU in float64: all
// types and optional arguments, sizes around every limit of the kernels, outputs over inputs, unaligned addresses. An
// image by itself must give the bits that it gives in a batch.
#include "check_cuda.h"
#include "cuda_operators.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

using Index = std::int64_t;

// ---- normalisation -------------------------------------------------------------------------------------------------
struct NormCase {
    Index dim;
    bool h = true, residual = true, scale = false, layer = false, bias = false;
    int residual_out = 1;  // 0 none, 1 its own memory, 2 over residual
    bool over_h = false;
    Index shift = 0, batch = 2, len = 3;
};

void test_norm(DType dtype, const NormCase& c)
{
    const Shape shape{c.batch, c.len, c.dim};
    const Floats h = normal(1, dtype, shape.numel()), residual = normal(2, DType::f32, shape.numel());
    const Floats scale = normal(3, DType::f32, c.batch), weight = normal(4, DType::f32, c.dim);
    Floats bias = normal(5, DType::f32, c.dim), moved = residual;
    for (float& x : moved) x += 3;
    auto run = [&](Side&& side, bool apart) {
        NormForward a;
        if (c.h) a.h = side.make(shape, side.dtype, h, c.shift);
        if (c.residual) a.residual = side.make(shape, wide(side.dtype), c.layer ? moved : residual, c.shift);
        if (c.scale) a.row_scale = side.parameter({c.batch}, scale);
        if (c.bias) a.bias = side.parameter({c.dim}, bias);
        a.weight = side.parameter({c.dim}, weight);
        a.kind = c.layer ? Norm::layer : Norm::rms;
        a.eps = 1e-3;
        a.out = c.over_h ? a.h : side.result(shape);
        if (c.residual_out) a.residual_out = c.residual_out == 2 ? a.residual : side.wide_result(shape);
        each_image(apart, c.batch, [&](auto part) {
            NormForward p = a;
            for (Tensor* t : {&p.h, &p.residual, &p.row_scale, &p.out, &p.residual_out}) *t = part(*t);
            norm_forward(side.ctx, p);
        });
        Outputs outputs{{"out", side.values(a.out)}};
        if (a.residual_out) outputs.push_back({"residual_out", side.values(a.residual_out), true});
        return outputs;
    };
    compare(dtype, text("norm", c.dim, c.h, c.residual, c.scale, c.layer, c.bias, c.residual_out, c.over_h, c.shift),
            run);
}

void test_norms(DType dtype)
{
    for (Index dim : {7, 192})
        for (int i = 0; i < 64; i++) {
            NormCase c{dim, (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0, (i & 16) != 0};
            c.over_h = (i & 32) != 0;
            if ((!c.h && (!c.residual || c.over_h || c.scale))) continue;
            for (c.residual_out = 0; c.residual_out < (c.residual ? 3 : 2); c.residual_out++) test_norm(dtype, c);
        }
    for (Index dim : {1, 8, 33, 200, 256, 264, 384, 512, 520, 768, 776, 1000, 1024, 1032, 1536})
        for (bool layer : {false, true})
            for (int residual_out : {0, 2})
                test_norm(dtype, {.dim = dim, .layer = layer, .bias = layer, .residual_out = residual_out});
    test_norm(dtype, {.dim = 384, .layer = true, .residual_out = 2, .shift = 1});
    test_norm(dtype, {.dim = 192, .scale = true, .batch = 3, .len = 33});
}

// ---- convolution ---------------------------------------------------------------------------------------------------
struct ConvCase {
    Index dim, stride, width, len;
    struct Range {
        bool reverse;
        Index begin, tokens;
    };
    std::vector<Range> passes;
    bool silu = true, bias = true;
    Index shift = 0, batch = 2;
};

Outputs run_conv(const ConvCase& c, Side& side, bool apart, const Floats& x)
{
    const Tensor in = side.make({c.batch, c.len, c.stride}, side.dtype, x, c.shift);
    std::vector<ConvForwardPass> passes(c.passes.size());
    for (std::size_t i = 0; i < passes.size(); i++) {
        passes[i].reverse = c.passes[i].reverse;
        passes[i].weight = side.parameter({c.dim, 1, c.width}, normal(20 + i, DType::f32, c.dim * c.width));
        if (c.bias) passes[i].bias = side.parameter({c.dim}, normal(30 + i, DType::f32, c.dim));
        passes[i].begin = c.passes[i].begin;
        passes[i].u = side.result({c.batch, c.passes[i].tokens, c.dim});
    }
    each_image(apart, c.batch, [&](auto part) {
        std::vector<ConvForwardPass> parts = passes;
        for (ConvForwardPass& p : parts) p.u = part(p.u);
        conv1d_forward(side.ctx, {.x = part(in), .passes = parts, .silu = c.silu});
    });
    Outputs outputs;
    for (const ConvForwardPass& p : passes) outputs.push_back({p.reverse ? "reverse u" : "u", side.values(p.u)});
    return outputs;
}

void test_conv(DType dtype, const ConvCase& c)
{
    const Floats x = normal(10, dtype, c.batch * c.len * c.stride);
    std::string name = text("conv", c.dim, c.stride, c.width, c.len, c.silu, c.bias, c.shift);
    for (const ConvCase::Range& r : c.passes) name += text(" pass", r.reverse, r.begin, r.tokens);
    compare(dtype, name, [&](Side&& side, bool apart) { return run_conv(c, side, apart, x); });
}

// Both ways at once must give the bits of each way alone, long chunks those of short ones.
void test_conv_cuts(DType dtype)
{
    const Index dim = 1024, len = 4100, begin = 2041, tokens = 70;
    ConvCase c{dim, dim, 4, len, {{false, 0, len}, {true, 0, len}}, true, true, 0, 1};
    const Floats x = normal(11, dtype, len * dim);
    const Outputs whole = run_conv(c, *std::make_unique<Side>(cuda_context(), dtype), false, x);
    for (bool reverse : {false, true}) {
        // run_conv gives weights by position
        c.passes = {{false, begin, reverse ? 1 : tokens}, {true, begin, reverse ? tokens : 1}};
        const Outputs part = run_conv(c, *std::make_unique<Side>(cuda_context(), dtype), false, x);
        const Floats& all = whole[reverse].values;
        CHECK(same_bits(part[reverse].values, Floats(all.begin() + begin * dim, all.begin() + (begin + tokens) * dim)));
    }
}

void test_convs(DType dtype)
{
    int turn = 0;
    for (Index width : {1, 2, 3, 4, 5, 7})
        for (Index dim : {1, 4, 7, 12, 520})
            for (Index len : {1, 2, 3, 31, 33}) {
                if (dim == 520 && len != 3) continue;
                const std::vector<std::vector<ConvCase::Range>> ways = {
                    {{false, 0, len}},
                    {{true, 0, len}},
                    {{false, 0, len}, {true, 0, len}},
                    {{false, len / 3, len - len / 3}, {true, len / 3, len - len / 3}},
                    {{false, 0, len / 2 + 1}, {true, len / 2, len - len / 2}},
                    {{true, len / 2, 1}, {false, len / 3, len / 3}},
                    {{false, 0, len}, {false, 0, len}}};
                for (const auto& passes : ways) {
                    turn++;
                    ConvCase c{dim, dim + turn % 3 * 4, width, len, passes, turn % 5 != 0, turn % 4 != 0};
                    if (turn % 7 == 0) c.shift = 1;
                    if (turn % 11 == 0) c.stride++;
                    test_conv(dtype, c);
                }
            }
}

// ---- element by element --------------------------------------------------------------------------------------------
// over: 0 out has its own memory, 1 over a, 2 over b. wide: which of a, b, out are.
void test_add(DType dtype, Index dim, int wides, int over, bool scaled, Index shift)
{
    const Shape shape{3, 5, dim};
    const bool wide_a = wides & 1, wide_b = wides & 2, wide_out = wides & 4;
    auto run = [&](Side&& side, bool apart) {
        auto type = [&](bool is_wide) { return is_wide ? wide(side.dtype) : side.dtype; };
        auto held = [&](bool is_wide) { return is_wide ? DType::f32 : dtype; };
        const Tensor a = side.make(shape, type(wide_a), normal(80, held(wide_a), shape.numel()), shift);
        const Tensor b = side.make(shape, type(wide_b), normal(81, held(wide_b), shape.numel()), shift);
        const Tensor out = over == 1 ? a : over == 2 ? b : wide_out ? side.wide_result(shape) : side.result(shape);
        const Tensor scale = scaled ? side.parameter({3}, normal(82, DType::f32, 3)) : Tensor{};
        each_image(apart, 3, [&](auto part) {
            add(side.ctx, {.a = part(a), .b = part(b), .out = part(out), .row_scale = part(scale)});
        });
        return Outputs{{"out", side.values(out), wide_out}};
    };
    compare(dtype, text("add", dim, wides, over, scaled, shift), run);
}

void test_adds(DType dtype)
{
    for (Index dim : {1, 7, 64})
        for (int wides = 0; wides < 8; wides++)
            for (int over = 0; over < 3; over++) {
                if (wides == 6) continue;  // b or out names the type of activations
                const int own = over == 1 ? wides & 1 : (wides & 2) / 2;
                if (over > 0 && own != wides / 4) continue;  // out is of the type of what it lies over
                for (bool scaled : {false, true}) test_add(dtype, dim, wides, over, scaled, 0);
            }
    test_add(dtype, 64, 2, 0, true, 1);
}

void test_copy(DType from, DType to)
{
    Floats values = Random(90).normal(1003);
    const float special[] = {0.0f,     -0.0f,       1e-8f,       -2.9e-8f,    3e-8f,     6e-8f,
                             8.9e-8f,  6.1e-5f,     65504.0f,    65519.0f,    65520.0f,  3.3e38f,
                             -3.3e38f, 1.00390625f, 1.01171875f, 1.00048828f, HUGE_VALF, -HUGE_VALF};
    std::copy(std::begin(special), std::end(special), values.begin());
    values = rounded(from, values);
    Context& ctx = cuda_context();
    for (Index count : {Index{1}, Index{992}, Index{1003}})
        for (Index shift : {0, 1}) {
            Side side(ctx, from);
            const Floats some(values.begin(), values.begin() + count);
            const Tensor in = side.make({count}, from, some, shift), out = side.make({count}, to, Floats(some.size()));
            backend_of(ctx).copy(ctx, in, out);
            CHECK(same_bits(side.values(out), rounded(to, some)));
        }
}

void test_fill_and_scale()
{
    Side side(cuda_context(), DType::f32);
    Context& ctx = side.ctx;
    const Tensor zero = side.wide_result({3, 7});
    backend_of(ctx).fill_zero(ctx, zero);
    CHECK(same_bits(side.values(zero), Floats(21)));

    const Floats matrix = Random(91).normal(5 * 33), factor = Random(92).normal(5);
    const Tensor m = side.parameter({5, 33}, matrix), f = side.parameter({5}, factor), out = side.wide_result({5, 33});
    Floats want = matrix;
    for (std::size_t i = 0; i < want.size(); i++) want[i] *= factor[i / 33];
    for (const Tensor& to : {out, m}) {
        backend_of(ctx).scale_rows(ctx, {.matrix = m, .factor = f, .out = to});
        CHECK(same_bits(side.values(to), want));
    }
}

// ---- the plain matrix product --------------------------------------------------------------------------------------
void test_gemm(DType dtype, Index m, Index n, Index k, Index count, bool bias, Index gap)
{
    cuda::GemmArgs g;
    g.dtype = g.y_dtype = dtype;
    g.m = m;
    g.n = n;
    g.k = k;
    g.ldx = k + gap;
    g.ldw = k + 2 * gap;
    g.ldy = n + gap;
    g.count = count;
    g.stride_x = m * g.ldx + gap;
    g.stride_w = n * g.ldw;
    g.stride_y = m * g.ldy + 3 * gap;
    const Floats x = normal(100, dtype, count * g.stride_x), w = normal(101, dtype, count * g.stride_w);
    const Floats offset = normal(102, DType::f32, n);
    Side side(cuda_context(), dtype);
    const Tensor xs = side.activation({count * g.stride_x}, x), ws = side.activation({count * g.stride_w}, w);
    const Tensor offsets = side.parameter({n}, offset), ys = side.result({count * g.stride_y});
    g.x = xs.data;
    g.w = ws.data;
    g.bias = bias ? offsets.as<float>() : nullptr;
    g.y = ys.data;
    cuda::gemm(side.ctx, g);
    const Floats y = side.values(ys);
    Floats got, want;
    std::size_t written = 0;
    for (Index p = 0; p < count; p++)
        for (Index i = 0; i < m; i++)
            for (Index j = 0; j < n; j++) {
                double sum = bias ? offset[static_cast<std::size_t>(j)] : 0.0;
                for (Index c = 0; c < k; c++)
                    sum += static_cast<double>(x[static_cast<std::size_t>(p * g.stride_x + i * g.ldx + c)]) *
                           w[static_cast<std::size_t>(p * g.stride_w + j * g.ldw + c)];
                want.push_back(static_cast<float>(sum));
                got.push_back(y[static_cast<std::size_t>(p * g.stride_y + i * g.ldy + j)]);
            }
    for (float value : y) written += value == value;
    const std::string name = text("gemm", m, n, k, count, bias, gap) + " " + name_of(dtype);
    check_agree(got, want, tolerance(dtype), __FILE__, __LINE__, name);
    check_report(written == want.size(), __FILE__, __LINE__, (name + ": wrote between the rows").c_str());
}

void test_gemms(DType dtype)
{
    for (Index gap : {0, 3})
        for (bool bias : {false, true}) {
            test_gemm(dtype, 1, 1, 1, 1, bias, gap);
            test_gemm(dtype, 64, 64, 16, 2, bias, gap);
            test_gemm(dtype, 65, 3, 33, 3, bias, gap);
            test_gemm(dtype, 7, 130, 47, 1, bias, gap);
            test_gemm(dtype, 5, 9, 0, 2, bias, gap);
        }
}

// None may launch a kernel: a grid without blocks is an error.
void test_empty(DType dtype)
{
    Side side(cuda_context(), dtype);
    Context& ctx = side.ctx;
    const Tensor x = side.result({0, 5, 8}), weight = side.parameter({8}, normal(1, DType::f32, 8));
    norm_forward(ctx, {.h = x, .weight = weight, .out = x});
    const ConvForwardPass pass{.weight = side.parameter({8, 1, 4}, normal(2, DType::f32, 32)), .u = x};
    conv1d_forward(ctx, {.x = x, .passes = {&pass, 1}});
    patches_forward(ctx, {side.result({0, 3, 16, 16}), 4, 4, 0, side.result({0, 16, 48})});
    TokensForward tokens;
    tokens.patches = tokens.out = x;
    tokens_forward(ctx, tokens);
    const Tensor table = side.parameter({5, 8}, normal(3, DType::f32, 40));
    rope(ctx, {x, table, table});
    ReadoutForward readout;
    readout.x = x;
    readout.out = side.result({0, 8});
    readout_forward(ctx, readout);
    add(ctx, {.a = x, .b = x, .out = x});
    backend_of(ctx).copy(ctx, x, x);
    backend_of(ctx).fill_zero(ctx, x);
}

}  // namespace

int main()
{
    for (DType dtype : device_types) {
        test_norms(dtype);
        test_convs(dtype);
        test_adds(dtype);
        for (DType to : device_types) test_copy(dtype, to);
        test_gemms(dtype);
        test_empty(dtype);
    }
    test_conv_cuts(DType::bf16);
    test_fill_and_scale();
    return check_failures();
}
