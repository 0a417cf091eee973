// SPDX-License-Identifier: Apache-2.0
// Patches, tokens, RoPE and read-out on the device against the CPU in float64: all types and optional arguments, with
// and without vector accesses. An image by itself must give the bits that it gives in a batch.
#include "check_cuda.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

using Index = std::int64_t;

void test_patches(DType dtype, Index channels, Index height, Index width, Index patch, Index stride, Index begin,
                  Index shift)
{
    const Index batch = 2, rows = ((height - patch) / stride + 1) * ((width - patch) / stride + 1) - begin;
    const Shape shape{batch, channels, height, width};
    const Floats pixels = normal(40, dtype, shape.numel());
    compare(dtype, text("patches", channels, height, width, patch, stride, begin, shift), [&](Side&& side, bool apart) {
        const Tensor images = side.make(shape, side.dtype, pixels, shift);
        const Tensor cols = side.result({batch, rows, channels * patch * patch});
        each_image(apart, batch,
                   [&](auto part) { patches_forward(side.ctx, {part(images), patch, stride, begin, part(cols)}); });
        return Outputs{{"cols", side.values(cols)}};
    });
}

// tail: whether the last class token is a tensor of its own.
void test_tokens(DType dtype, Index dim, Index len, ClassPlaces places, bool tail, bool pos, bool dropout, Index shift)
{
    const Index batch = 3, patches = len - places.count;
    const Shape shape{batch, len, dim};
    const auto& [first, step, count] = places;
    compare(dtype, text("tokens", dim, len, first, step, count, pos, dropout, shift), [&](Side&& side, bool apart) {
        TokensForward a;
        a.patches = side.activation({batch, patches, dim}, normal(50, dtype, batch * patches * dim));
        a.places = places;
        const Index held[] = {places.count - tail, tail};
        for (int i = 0; i < 2; i++)
            if (held[i] > 0)
                a.class_token[i] =
                    side.make({1, held[i], dim}, wide(side.dtype), normal(51 + i, DType::f32, held[i] * dim), shift);
        if (pos) a.pos_embed = side.parameter({1, len, dim}, normal(53, DType::f32, len * dim));
        if (dropout) a.dropout = side.parameter(shape, normal(54, DType::f32, shape.numel()));
        a.out = side.result(shape);
        each_image(apart, batch, [&](auto part) {
            TokensForward p = a;
            for (Tensor* t : {&p.patches, &p.dropout, &p.out}) *t = part(*t);
            tokens_forward(side.ctx, p);
        });
        return Outputs{{"out", side.values(a.out)}};
    });
}

void test_rope(DType dtype, Index dim, Index len, Index skip, bool inverse, Index shift)
{
    const Shape shape{2, len, dim}, table{len - skip, dim};
    compare(dtype, text("rope", dim, len, skip, inverse, shift), [&](Side&& side, bool apart) {
        const Tensor x = side.make(shape, side.dtype, normal(60, dtype, shape.numel()), shift);
        const Tensor cos = side.parameter(table, normal(61, DType::f32, table.numel()));
        const Tensor sin = side.parameter(table, normal(62, DType::f32, table.numel()));
        each_image(apart, 2, [&](auto part) { rope(side.ctx, {part(x), cos, sin, skip, inverse}); });
        return Outputs{{"x", side.values(x)}};
    });
}

void test_readout(DType dtype, Reduce reduce, Index dim, Index len, ClassPlaces places, Index shift)
{
    const Shape shape{2, len, dim};
    const auto& [first, step, count] = places;
    const Index rows = reduce == Reduce::join ? count : 1;
    const std::string name = text("readout", static_cast<int>(reduce), dim, len, first, step, count, shift);
    compare(dtype, name, [&](Side&& side, bool apart) {
        ReadoutForward a;
        a.reduce = reduce;
        a.places = places;
        a.x = side.make(shape, side.dtype, normal(70, dtype, shape.numel()), shift);
        a.out = side.result({2, rows * dim});
        each_image(apart, 2, [&](auto part) {
            ReadoutForward p = a;
            p.x = part(a.x);
            p.out = part(a.out);
            readout_forward(side.ctx, p);
        });
        return Outputs{{"out", side.values(a.out)}};
    });
}

void test_embedding(DType dtype)
{
    test_patches(dtype, 3, 32, 48, 16, 16, 0, 0);
    test_patches(dtype, 3, 32, 48, 16, 8, 2, 0);
    test_patches(dtype, 1, 24, 40, 8, 8, 3, 1);
    test_patches(dtype, 2, 19, 23, 5, 3, 1, 0);
    test_patches(dtype, 3, 15, 14, 14, 7, 0, 0);
    test_patches(dtype, 4, 36, 36, 32, 4, 0, 0);

    for (Index dim : {1, 7, 33, 192})
        for (int i = 0; i < 10; i++) {
            constexpr ClassPlaces places[] = {{}, {0, 1, 1}, {2, 1, 1}, {2, 2, 2}, {1, 2, 2}};
            test_tokens(dtype, dim, 5, places[i / 2], i / 2 == 3, i % 2 == 0, i % 3 == 0, 0);
        }
    test_tokens(dtype, 192, 197, {98, 1, 1}, false, true, false, 1);
    test_tokens(dtype, 192, 208, {15, 16, 12}, false, true, true, 0);

    for (Index dim : {1, 2, 7, 34, 192})
        for (bool inverse : {false, true}) {
            test_rope(dtype, dim, 5, 0, inverse, 0);
            test_rope(dtype, dim, 33, 2, inverse, 0);
        }
    test_rope(dtype, 64, 5, 5, false, 0);  // nothing is turned
    test_rope(dtype, 64, 5, 1, false, 1);

    for (Index dim : {1, 7, 192, 384}) {
        for (Reduce reduce : {Reduce::mean, Reduce::max})
            for (Index len : {1, 5, 197, 256, 257, 700})
                if (len < 200 || dim != 192) test_readout(dtype, reduce, dim, len, {}, 0);
        test_readout(dtype, Reduce::select, dim, 33, {32, 1, 1}, 0);
        test_readout(dtype, Reduce::select, dim, 33, {0, 32, 2}, 0);
        test_readout(dtype, Reduce::join, dim, 33, {2, 3, 10}, 0);
    }
    test_readout(dtype, Reduce::mean, 64, 9, {}, 1);
    test_readout(dtype, Reduce::max, 64, 300, {}, 1);
}

void test_maximum_of_nan(DType dtype)
{
    Side side(cuda_context(), dtype);
    const Index len = 300, dim = 3;
    Floats x(static_cast<std::size_t>(len * dim), -2.0f);
    x[(17 * dim) + 1] = std::numeric_limits<float>::quiet_NaN();
    x[(299 * dim) + 2] = -1;
    ReadoutForward a;
    a.reduce = Reduce::max;
    a.x = side.activation({1, len, dim}, x);
    a.out = side.result({1, dim});
    readout_forward(side.ctx, a);
    const Floats out = side.values(a.out);
    CHECK(out[0] == -2 && out[1] != out[1] && out[2] == -1);
}

}  // namespace

int main()
{
    for (DType dtype : device_types) {
        test_embedding(dtype);
        test_maximum_of_nan(dtype);
    }
    return check_failures();
}
