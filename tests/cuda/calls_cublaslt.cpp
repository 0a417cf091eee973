// SPDX-License-Identifier: Apache-2.0
// What cuda/cublaslt.cpp asks of the library, seen by tests/cuda/fake_cublaslt.cpp, the only argument: how often it
// asks for an algorithm, which problems run as one batch, what goes to our own kernels.
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "check_cuda.h"
#include "cublaslt.h"
#include "vimcore/build_info.h"
#include "vimcore/error.h"
#include "vimcore/ops.h"

using namespace vimcore;
using namespace vimcore::test;
using Index = std::int64_t;

namespace {

struct Counts {
    int heuristics, matmuls, batches;
    bool operator==(const Counts&) const = default;
};

Counts counts(const char* library)
{
    static void* const handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    int values[3] = {-1, -1, -1};
    if (handle) reinterpret_cast<void (*)(int*)>(dlsym(handle, "fakeCounts"))(values);
    return {values[0], values[1], values[2]};
}

}  // namespace

int main(int, char** arguments)
{
    const char* library = arguments[1];
    setenv("VIMCORE_CUBLASLT", library, 1);
    CHECK(cuda::has_cublaslt());
    CHECK(cuda::blas_name() == std::string("cuBLASLt 13.1.2 (") + library + ")");

    constexpr std::int64_t m = 10, k = 24, n = 16;
    Side side = Side::cuda(DType::bf16);
    const Floats ones(static_cast<std::size_t>(2 * m * k), 1);
    const Tensor x = side.activation({2, m, k}, ones), y = side.result({2, m, n}), odd = side.result({m, 13});
    const Tensor w = side.parameter({2, n, k}, Floats(static_cast<std::size_t>(2 * n * k), 1));
    const Tensor bias = side.parameter({n}, Floats(n, 1));
    const LinearForward single = {.x = x[0], .weight = w[0], .y = y[0]};
    const LinearForward biased = {.x = x[0], .weight = w[0], .bias = bias, .y = y[0]};
    const LinearForward pair[2] = {single, {.x = x[1], .weight = w[1], .y = y[1]}};

    // One algorithm for each kind of problem, however often it comes.
    for (int i = 0; i < 3; i++) linear_forward(side.ctx, {&single, 1});
    CHECK((counts(library) == Counts{1, 3, 0}));
    CHECK(side.values(y[0]) == Floats(m * n, k));
    for (int i = 0; i < 2; i++) linear_forward(side.ctx, {&biased, 1});
    CHECK((counts(library) == Counts{2, 5, 0}));
    CHECK(side.values(y[0]) == Floats(m * n, k + 1));
    for (int i = 0; i < 2; i++) linear_forward(side.ctx, pair);
    CHECK((counts(library) == Counts{3, 7, 2}));
    CHECK(side.values(y) == Floats(2 * m * n, k));
    const LinearForward rest = {.x = x[0].slice(1, m), .weight = w[0], .y = y[0].slice(1, m)};
    linear_forward(side.ctx, {&rest, 1});  // the algorithm of other numbers of rows
    CHECK((counts(library) == Counts{3, 8, 2}));

    // A batch goes forward in memory.
    const LinearForward reversed[2] = {pair[1], pair[0]};
    linear_forward(side.ctx, reversed);
    CHECK((counts(library) == Counts{3, 10, 2}));

    // Without an algorithm our own kernel multiplies, and the library is not asked again.
    const LinearForward none = {.x = x[0], .weight = w.view({2 * n, k}).slice(0, 13), .y = odd};
    for (int i = 0; i < 2; i++) linear_forward(side.ctx, {&none, 1});
    CHECK((counts(library) == Counts{4, 10, 2}));
    CHECK(side.values(odd) == Floats(13 * m, k));
    CudaProducts products = cuda_products();
    CHECK(products.library == 10 && products.built_in == 2 && products.other_algorithm == 0);
    CHECK(products.first_built_in == "m 10, n 13, k 24 bf16");
    CHECK(cuda_description(0).ends_with(", but 2 products by slow built-in kernels, the first m 10, n 13, k 24 bf16"));

    // float32 by its own rules, which VIMCORE_TF32 changes.
    const Tensor wide = side.parameter({2, 4}, {1, 2, 3, 4, 5, 6, 7, 8}), product = side.wide_result({2, 2});
    const LinearForward full = {.x = wide, .weight = wide, .y = product};
    linear_forward(side.ctx, {&full, 1});
    CHECK((counts(library) == Counts{5, 11, 2}));
    CHECK(side.values(product) == (Floats{30, 70, 70, 174}));

    // An algorithm expects no more of a bias than that 16 divides its address, wherever the first one was.
    Side other = Side::cuda(DType::f32);
    const Tensor biases = other.parameter({68}, Floats(68, 1)), row = other.parameter({1, 4}, Floats(4, 1));
    const Tensor square = other.parameter({4, 4}, Floats(16, 1)), sum = other.wide_result({1, 4});
    CHECK(reinterpret_cast<std::uintptr_t>(biases.data) % 256 == 0);
    const Counts before_biases = counts(library);
    for (Index first : {0, 4, 64}) {
        const LinearForward at = {.x = row, .weight = square, .bias = biases.slice(first, first + 4), .y = sum};
        linear_forward(other.ctx, {&at, 1});
        CHECK(other.values(sum) == Floats(4, 5));
    }
    CHECK((counts(library) == Counts{before_biases.heuristics + 1, before_biases.matmuls + 3, before_biases.batches}));

    // Backward: both gradients of both projections in two batches; those of the weights are added to, in float32.
    const Tensor dw = side.parameter({2, n, k}, Floats(static_cast<std::size_t>(2 * n * k), 0.5f));
    const Tensor dy = side.activation({2, m, n}, Floats(2 * m * n, 1));
    const Tensor dx = side.result({2, m, k});
    LinearBackward gradients[2];
    for (int i = 0; i < 2; i++) gradients[i] = {.x = x[i], .weight = w[i], .dy = dy[i], .dx = dx[i], .dweight = dw[i]};
    for (int i = 0; i < 2; i++) linear_backward(side.ctx, gradients);
    CHECK((counts(library) == Counts{8, 18, 6}));
    CHECK(side.values(dx) == Floats(2 * m * k, n));
    CHECK(side.values(dw) == Floats(2 * n * k, 2 * m + 0.5f));
    gradients[0].accumulate_dx = true;  // not alike: one after the other
    linear_backward(side.ctx, gradients);
    CHECK((counts(library) == Counts{11, 22, 6}));
    CHECK(side.values(dx[0]) == Floats(m * k, 2 * n) && side.values(dx[1]) == Floats(m * k, n));

    // Sums over tokens are cut where whole slices are summed; the rest is another product.
    const Index tokens = 333;
    const Tensor long_x = side.activation({tokens, k}, Floats(tokens * k, 1));
    const Tensor long_dy = side.activation({tokens, n}, Floats(tokens * n, 1));
    const LinearBackward over_tokens = {.x = long_x, .dy = long_dy, .dweight = dw[0]};
    const Floats before = side.values(dw[0]);
    linear_backward(side.ctx, {&over_tokens, 1});
    CHECK((counts(library) == Counts{13, 24, 6}));
    CHECK(side.values(dw[0])[0] == before[0] + tokens);

    // An algorithm that does not take this many rows gives way to the next best, which is counted.
    products = cuda_products();
    const Tensor many = side.activation({400, k}, Floats(400 * k, 1)), eleven = side.result({400, 11});
    const LinearForward odd_one = {.x = many, .weight = w.view({2 * n, k}).slice(0, 11), .y = eleven};
    for (int i = 0; i < 2; i++) linear_forward(side.ctx, {&odd_one, 1});
    CHECK(side.values(eleven) == Floats(400 * 11, k));
    CHECK(cuda_products().other_algorithm == 2 && cuda_products().built_in == products.built_in);

    // What the library answers is in the error.
    std::string error;
    cuda::GemmArgs wrong;
    wrong.dtype = DType::f32;
    wrong.x = wrong.w = static_cast<const char*>(x.data) + 2;  // no float lies there
    wrong.y = y.data;
    wrong.m = wrong.n = wrong.k = wrong.ldx = wrong.ldw = wrong.ldy = 4;
    try {
        cuda::matmul(side.ctx, wrong, nullptr);
    } catch (const Error& e) {
        error = e.what();
    }
    CHECK(error.find("FAKE_STATUS for m 4, n 4, k 4 f32") != std::string::npos);
    return check_failures();
}
