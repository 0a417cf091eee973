// SPDX-License-Identifier: Apache-2.0
// Projections on the device against float64 on the CPU: types, sizes, bias, pairs, cached weights, repeated runs.
#include <array>
#include <memory>
#include <string>

#include "check_cuda.h"
#include "core/context_internals.h"
#include "core/weight_cache.h"
#include "vimcore/ops.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

Random random_numbers(1);

// Weights and biases that every activation type holds exactly, so that only results are rounded.
struct Problem {
    Problem(DType dtype, Shape rows, std::int64_t k, std::int64_t n)
        : rows(rows.numel()),
          k(k),
          n(n),
          x(rounded(dtype, random_numbers.normal(rows.numel() * k))),
          w(rounded(dtype, random_numbers.normal(n * k, 0.1f))),
          bias(rounded(dtype, random_numbers.normal(n)))
    {
    }
    std::int64_t rows, k, n;
    Floats x, w, bias;
};

Floats run(Side& side, const Problem& p, bool bias)
{
    const Tensor y = side.result({1, p.rows, p.n});
    const LinearForward args{.x = side.activation({1, p.rows, p.k}, p.x),
                             .weight = side.parameter({p.n, p.k}, p.w),
                             .bias = bias ? side.parameter({p.n}, p.bias) : Tensor{},
                             .y = y};
    linear_forward(side.ctx, {&args, 1});
    return side.values(y);
}

void check_sizes()
{
    constexpr std::array<std::int64_t, 3> sizes[] = {{1, 1, 1},     {1, 192, 300}, {7, 3, 5},    {67, 192, 200},
                                                     {66, 384, 44}, {65, 12, 384}, {33, 31, 29}, {70, 768, 33},
                                                     {2, 100, 257}, {64, 64, 64},  {150, 1, 1}};
    for (DType dtype : device_types)
        for (const auto& [m, k, n] : sizes)
            for (bool bias : {false, true}) {
                const Problem p(dtype, {m}, k, n);
                Side cuda = Side::cuda(dtype), again = Side::cuda(dtype), cpu = Side::cpu();
                const Floats got = run(cuda, p, bias);
                CHECK_AGREE(got, run(cpu, p, bias), tolerance(dtype));
                if (bias) CHECK(got == run(again, p, bias));
            }
}

// A row has the same bits whatever the rows around it, also where an image's rows begin at an odd address.
void check_rows()
{
    for (DType dtype : device_types)
        for (const auto& [k, n] : {std::pair<std::int64_t, std::int64_t>{192, 200}, {384, 44}, {31, 29}, {64, 1000}}) {
            const std::int64_t most = brief ? 70 : 300;
            const Problem p(dtype, {most}, k, n);
            Side side = Side::cuda(dtype);
            const Tensor x = side.activation({most, k}, p.x), y = side.result({most, n});
            const Tensor w = side.parameter({n, k}, p.w), bias = side.parameter({n}, p.bias);
            auto rows = [&](std::int64_t begin, std::int64_t end) {
                const LinearForward args{.x = x.slice(begin, end), .weight = w, .bias = bias, .y = y.slice(begin, end)};
                linear_forward(side.ctx, {&args, 1});
                return side.values(y);
            };
            const Floats whole = rows(0, most);
            for (const std::int64_t count : {1, 2, 7, 64, 69})
                for (std::int64_t begin = 0; begin + count <= most; begin += std::max<std::int64_t>(count, 40))
                    CHECK(same_bits(rows(begin, begin + count), whole));
        }
}

// Parameters that are views of one flat tensor begin anywhere.
void check_unaligned_parameters()
{
    for (DType dtype : device_types)
        for (bool cached : {false, true}) {
            const Problem p(dtype, {9}, 40, 24);
            WeightCache cache;
            Side side = Side::cuda(dtype), cpu = Side::cpu();
            const Tensor y = side.result({9, 24});
            const LinearForward args{.x = side.activation({9, 40}, p.x),
                                     .weight = side.make({24, 40}, DType::f32, p.w, 3),
                                     .bias = side.make({24}, DType::f32, p.bias, 1),
                                     .y = y};
            internals(side.ctx).cache = cached ? &cache : nullptr;
            for (int i = 0; i < 2; i++) {
                linear_forward(side.ctx, {&args, 1});
                CHECK_AGREE(side.values(y), run(cpu, p, true), tolerance(dtype));
            }
            internals(side.ctx).cache = nullptr;
        }
}

// Rows of y and dy padded to 16 bytes: zeros behind, the same values and gradients before; alone and in pairs.
void check_padded()
{
    for (DType dtype : {DType::f16, DType::bf16})
        for (bool cached : {false, true}) {
            const std::int64_t m = 37, k = 24, n = 44, row = 48;
            const Problem p[2] = {{dtype, {m}, k, n}, {dtype, {m}, k, n}};
            WeightCache cache;
            Side side = Side::cuda(dtype), cpu = Side::cpu();
            const Tensor x = side.result({2, m, k}), y = side.result({2, m, row}), narrow = side.result({2, m, n});
            const Tensor dx = side.result({2, m, k}), narrow_dx = side.result({2, m, k});
            const Tensor dw = side.parameter({2, n, k}, Floats(2 * n * k)),
                         narrow_dw = side.parameter({2, n, k}, Floats(2 * n * k));
            LinearForward args[2], plain[2];
            LinearBackward back[2], plain_back[2];
            for (int i = 0; i < 2; i++) {
                assign(side.ctx, x[i], p[i].x);
                args[i] = {.x = x[i], .weight = side.parameter({n, k}, p[i].w), .y = y[i]};
                plain[i] = {.x = x[i], .weight = args[i].weight, .y = narrow[i]};
                back[i] = {.x = x[i], .weight = args[i].weight, .dy = y[i], .dx = dx[i], .dweight = dw[i]};
                plain_back[i] = {
                    .x = x[i], .weight = args[i].weight, .dy = narrow[i], .dx = narrow_dx[i], .dweight = narrow_dw[i]};
            }
            internals(side.ctx).cache = cached ? &cache : nullptr;
            linear_forward(side.ctx, args);
            linear_backward(side.ctx, back);
            internals(side.ctx).cache = nullptr;
            linear_forward(side.ctx, plain);
            linear_backward(side.ctx, plain_back);
            const Floats padded = side.values(y), values = side.values(narrow);
            for (std::int64_t r = 0; r < 2 * m; r++)
                for (std::int64_t c = 0; c < row; c++)
                    CHECK(padded[static_cast<std::size_t>(r * row + c)] ==
                          (c < n ? values[static_cast<std::size_t>(r * n + c)] : 0));
            CHECK_AGREE(side.values(dx), side.values(narrow_dx), tolerance(dtype));
            CHECK_AGREE(side.values(dw), side.values(narrow_dw), 1e-6);
            for (int i = 0; i < 2; i++) CHECK_AGREE(side.values(narrow[i]), run(cpu, p[i], false), tolerance(dtype));
        }
    Side side = Side::cuda(DType::f32);
    const LinearForward wide{
        .x = side.result({3, 8}), .weight = side.parameter({6, 8}, Floats(48)), .y = side.result({3, 8})};
    CHECK_THROWS(linear_forward(side.ctx, {&wide, 1}), std::invalid_argument);  // float32 is not padded
}

// No rows, no columns; nothing to sum up leaves the bias.
void check_empty()
{
    for (const auto& [m, k, n] : {std::array<std::int64_t, 3>{0, 8, 8}, {8, 8, 0}, {5, 0, 3}}) {
        const Problem p(DType::f32, {m}, k, n);
        Side cuda = Side::cuda(DType::f32), cpu = Side::cpu();
        CHECK_AGREE(run(cuda, p, true), run(cpu, p, true), 0);
    }
}

// Two problems of one size in one call, their tensors `gap` elements apart, or in no order.
void check_pairs()
{
    for (DType dtype : device_types)
        for (std::int64_t gap : {0, 8, 3})
            for (bool swapped : {false, true}) {
                const std::int64_t m = 37, k = 24, n = 20;
                const Problem p[2] = {{dtype, {m}, k, n}, {dtype, {m}, k, n}};
                Side cuda = Side::cuda(dtype), cpu = Side::cpu();
                auto both = [&](std::int64_t columns) {
                    return cuda.activation({2 * (m * columns + gap)}, Floats(2 * (m * columns + gap)));
                };
                const Tensor x = both(k), y = both(n);
                LinearForward args[2];
                for (int i = 0; i < 2; i++) {
                    const int place = swapped ? 1 - i : i;
                    args[i] = {.x = x.slice(place * (m * k + gap), place * (m * k + gap) + m * k).view({m, k}),
                               .weight = cuda.parameter({n, k}, p[i].w),
                               .y = y.slice(place * (m * n + gap), place * (m * n + gap) + m * n).view({m, n})};
                    assign(cuda.ctx, args[i].x, p[i].x);
                }
                linear_forward(cuda.ctx, args);
                for (int i = 0; i < 2; i++)
                    CHECK_AGREE(cuda.values(args[i].y), run(cpu, p[i], false), tolerance(dtype));
                const Floats all = cuda.values(y);  // what lies between and behind them is as it was
                for (std::int64_t i = 0; i < gap; i++) {
                    CHECK(all[static_cast<std::size_t>(m * n + i)] == 0);
                    CHECK(all[static_cast<std::size_t>(2 * m * n + gap + i)] == 0);
                }
            }
}

// Casts of weights are kept while they are valid: for each type on its own, and pairs apart from single weights.
void check_cache()
{
    const std::int64_t m = 19, k = 40, n = 24;
    constexpr double close = 4.5e-3;  // of the coarsest type
    WeightCache cache;
    Side side(cuda_context(), DType::f32), reference = Side::cpu();
    Problem p[2] = {{DType::bf16, {m}, k, n}, {DType::bf16, {m}, k, n}};
    const Tensor w[2] = {side.parameter({n, k}, p[0].w), side.parameter({n, k}, p[1].w)};
    const Tensor bias = side.parameter({n}, p[0].bias);
    for (bool changed : {false, true}) {
        if (changed) {  // other values in the same memory
            std::swap(p[0].w, p[1].w);
            std::swap(p[0].bias, p[1].bias);
            for (int i = 0; i < 2; i++) assign(side.ctx, w[i], p[i].w);
            assign(side.ctx, bias, p[0].bias);
            cache.invalidate();
        }
        Problem single = p[0];
        single.x = p[1].x;
        for (DType dtype : {DType::bf16, DType::f16, DType::f32, DType::bf16}) {
            const Tensor x = side.make({2, m, k}, dtype, Floats(2 * m * k));
            const Tensor y = side.make({3, m, n}, dtype, Floats(3 * m * n));
            for (int i = 0; i < 2; i++) assign(side.ctx, x[i], p[i].x);
            internals(side.ctx).cache = &cache;
            const LinearForward args[3] = {{.x = x[0], .weight = w[0], .y = y[0]},
                                           {.x = x[1], .weight = w[1], .y = y[1]},
                                           {.x = x[1], .weight = w[0], .bias = bias, .y = y[2]}};
            linear_forward(side.ctx, args);
            internals(side.ctx).cache = nullptr;
            CHECK_AGREE(side.values(y[0]), run(reference, p[0], false), close);
            CHECK_AGREE(side.values(y[1]), run(reference, p[1], false), close);
            CHECK_AGREE(side.values(y[2]), run(reference, single, true), close);
        }
    }
}

// A cast that one stream makes and another one uses.
void check_streams()
{
    const std::int64_t m = 19, k = 40, n = 24;
    const Problem p(DType::bf16, {m}, k, n);
    Side side = Side::cuda(DType::bf16), cpu = Side::cpu();
    const Floats want = run(cpu, p, false);
    for (int turn = 0; turn < 10; turn++) {
        WeightCache cache;
        Context first(Device::cuda()), second(Device::cuda());
        const std::shared_ptr<void> streams[] = {backend_of(first).make_stream(0), backend_of(first).make_stream(0)};
        first.set_stream(streams[0].get());
        second.set_stream(streams[1].get());
        const Tensor x = side.activation({m, k}, p.x), w = side.parameter({n, k}, p.w), y = side.result({m, n});
        for (Context* ctx : {&first, &second}) {
            const LinearForward args{.x = x, .weight = w, .y = ctx == &first ? side.result({m, n}) : y};
            internals(*ctx).cache = &cache;
            linear_forward(*ctx, {&args, 1});
        }
        const Floats got = values_of(second, y);
        CHECK_AGREE(got, want, tolerance(DType::bf16));
    }
}

// After the first call of a size, scratch memory neither grows nor moves.
void check_allocations()
{
    for (DType dtype : device_types) {
        const Problem p(dtype, {50}, 64, 72);
        Side side = Side::cuda(dtype);
        run(side, p, true);
        const std::size_t warm = arena_of(side.ctx).allocations();
        for (int i = 0; i < 3; i++) run(side, p, true);
        CHECK(arena_of(side.ctx).allocations() == warm);
    }
}

}  // namespace

int main()
{
    check_sizes();
    check_rows();
    check_unaligned_parameters();
    check_padded();
    check_empty();
    check_pairs();
    check_cache();
    check_streams();
    check_allocations();
    return check_failures();
}
