// SPDX-License-Identifier: Apache-2.0
// Kernels of bf16 against sums in float64: on every instruction set of this machine, and the matrix kernels of units
// that it lacks with their instruction emulated. How far the shortened exponential lets a long memory drift.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"

namespace vimcore::cpu {
void fill_amx(Kernels<bf16>& table);
void fill_bfmmla(Kernels<bf16>& table);
}  // namespace vimcore::cpu

using namespace vimcore::cpu;

namespace {

template <class T>
std::vector<T> draw(Index count, float scale = 1)
{
    static std::mt19937 rng(11);
    std::normal_distribution<float> normal;
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& v : values) v = T(scale * normal(rng));
    return values;
}
template <class T>
std::vector<double> doubles(const std::vector<T>& v)
{
    return {v.begin(), v.end()};
}

void test_rounding()
{
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(float(bf16(1.0f + 0x1p-8f)) == 1.0f);                // a tie goes to the even one
    CHECK(float(bf16(1.0f + 0x3p-8f)) == 1.0f + 0x1p-6f);      // up as well
    CHECK(float(bf16(1.0f + 0x1.002p-8f)) == 1.0f + 0x1p-7f);  // beyond one
    CHECK(float(bf16(0x1.ffp127f)) == inf && float(bf16(-inf)) == -inf);
    CHECK(std::isnan(float(bf16(std::nanf("")))) && std::signbit(float(bf16(-0.0f))));
}

// y = x w^T, in parts that must not change a bit.
void test_gemm(const Kernels<bf16>& k, Index m, Index n, Index depth, bool transposed, bool add)
{
    const auto x = draw<bf16>(m * (depth + 3));
    const auto w = draw<float>(n * depth), bias = draw<float>(n);
    const auto before = draw<bf16>(m * n);
    const Index panels = (n + k.nr - 1) / k.nr, padded = (depth + k.depth - 1) / k.depth * k.depth;
    std::vector<bf16> packed(static_cast<std::size_t>(panels * k.nr * padded + 32)), y = before, parts = before;
    bf16* aligned = packed.data();
    k.pack({w.data(), transposed ? n : depth, n, depth, transposed, aligned});
    GemmArgs<bf16> args{x.data(), depth + 3, aligned, bias.data(), y.data(), n, m, n, depth, 0, panels, add};
    k.gemm(args);
    for (Index row = 0; row < m; row += 2 * k.mr)  // other rows around each, and panels one by one
        for (Index panel = 0; panel < panels; panel++) {
            args.x = x.data() + row * (depth + 3);
            args.y = parts.data() + row * n;
            args.m = std::min(2 * k.mr, m - row);
            args.panel_begin = panel;
            args.panel_end = panel + 1;
            k.gemm(args);
        }
    CHECK(doubles(parts) == doubles(y));
    for (Index i = 0; i < m; i++)
        for (Index j = 0; j < n; j++) {
            double sum = bias[j], size = 1;
            for (Index p = 0; p < depth; p++) {
                const double term =
                    double(x[i * (depth + 3) + p]) * double(float(bf16(transposed ? w[p * n + j] : w[j * depth + p])));
                sum += term;
                size += std::abs(term);
            }
            if (add) sum += double(before[i * n + j]);
            CHECK_CLOSE(double(y[i * n + j]), sum, 0x1p-8 * std::abs(sum) + 1e-6 * size);
        }
}

void test_gemm_tn(const Kernels<bf16>& k, Index m, Index n, Index depth)
{
    const auto dy = draw<bf16>(m * n), x = draw<bf16>(m * depth);
    const auto before = draw<float>(n * depth);
    std::vector<float> dw = before, parts = before;
    std::vector<bf16> scratch(static_cast<std::size_t>(k.gemm_tn_scratch(m, depth)));
    GemmTnArgs<bf16> args{dy.data(), n, x.data(), depth, dw.data(), depth, m, depth, 0, n, scratch.data()};
    k.gemm_tn(args);
    args.dw = parts.data();
    for (Index j = 0; j < n; j += k.mr) {
        args.j_begin = j;
        args.j_end = std::min(n, j + k.mr);
        k.gemm_tn(args);
    }
    CHECK(parts == dw);
    for (Index j = 0; j < n; j++)
        for (Index p = 0; p < depth; p++) {
            double sum = before[j * depth + p], size = std::abs(sum);
            for (Index i = 0; i < m; i++) {
                const double term = double(dy[i * n + j]) * double(x[i * depth + p]);
                sum += term;
                size += std::abs(term);
            }
            CHECK_CLOSE(dw[j * depth + p], sum, 1e-6 * size);
        }
}

void test_products(const Kernels<bf16>& k)
{
    for (Index m : {Index(1), k.mr - 1, k.mr, 2 * k.mr + 3})
        for (Index n : {Index(1), k.nr, k.nr + 5})
            for (Index depth : {1, 2, 12, 33, 64}) test_gemm(k, m, n, depth, (m + n) % 2 != 0, depth % 2 != 0);
    test_gemm(k, 150, 44, 96, false, false);
    for (Index m : {1, 2, 31, 256, 261})
        for (Index n : {Index(1), k.mr, k.mr + 3}) test_gemm_tn(k, m, n, n % 2 ? 12 : k.nr + 1);
    test_gemm_tn(k, 40, 203, 50);
}

struct Memory {
    double after, steady;
};

// A state of 1 after `tokens` tokens of decay exp(-delta), and the one that a constant input settles at.
template <class T>
Memory remember(const Kernels<T>& k, Index tokens, float delta)
{
    using W = Wide<T>;
    const Index dim = k.lanes;
    const std::vector<T> dt(static_cast<std::size_t>(tokens * dim), T(delta));
    const std::vector<W> A(static_cast<std::size_t>(dim), W(-1.4426950408889634)),
        B(static_cast<std::size_t>(tokens), 1);
    std::vector<T> y(dt.size());
    const auto run = [&](T input, W start) {
        const std::vector<T> u(dt.size(), input);
        std::vector<W> h(static_cast<std::size_t>(dim), start);
        ScanArgs<T> f{};
        f.len = tokens;
        f.dim = f.e1 = f.lddt = f.ldu = f.ldy = dim;
        f.state = f.ldb = 1;
        f.u = u.data();
        f.dt = dt.data();
        f.A = A.data();
        f.B = f.C = B.data();
        f.h = h.data();
        f.y = y.data();
        f.scale = 1;
        f.finish = true;
        k.scan_forward(f);
        return double(h[0]);
    };
    return {run(T(0.0f), W(1)), run(T(1.0f), W(0))};
}

// What may be lost: 2e-7 of a decay in every token, as float32 rounds it, and nothing where nothing decays.
void test_memory(const std::string& isa)
{
    const float delta = 0x1p-10f;  // about 1e-3
    const Kernels<bf16>& k = kernels<bf16>(isa);
    for (Index tokens : {1024, 65536}) {
        const double exact = std::exp(-double(delta) * double(tokens)), steady = delta / -std::expm1(-double(delta));
        const Memory narrow = remember(k, tokens, delta), full = remember(kernels<float>(isa), tokens, delta);
        const double drift = std::abs(narrow.after / exact - 1);
        std::printf("%s: after %lld tokens a memory is off by %.1e (float32: %.1e), a steady state by %.1e (%.1e)\n",
                    isa.c_str(), tokens, drift, std::abs(full.after / exact - 1),
                    std::abs(narrow.steady / (steady * (1 - exact)) - 1),
                    std::abs(full.steady / (steady * (1 - exact)) - 1));
        CHECK(drift < 2e-7 * double(tokens));
        CHECK(std::abs(narrow.steady / (steady * (1 - exact)) - 1) < 2e-4);
    }
    CHECK(remember(k, 65536, 0.0f).after == 1.0);
    for (float wanted : {0.0107f, 0.0216f, 0.065f, 0.7f}) {  // where a table's steps meet, among others
        const double d = float(bf16(wanted)), steady = d / -std::expm1(-d);
        CHECK_CLOSE(remember(k, 8192, wanted).steady, steady, 2e-4 * steady);
    }
    for (float fast : {0.25f, 3.0f, 20.0f, 85.0f})
        CHECK_CLOSE(remember(k, 1, fast).after, std::exp(-double(fast)), 1e-5 * std::exp(-double(fast)));
    CHECK(remember(k, 1, 200.0f).after < 1e-37 && remember(k, 1, 1e30f).after < 1e-37);
}

}  // namespace

int main()
{
    test_rounding();
    for (const std::string& isa : isas_available()) {
        test_products(kernels<bf16>(isa));
        test_memory(isa);
    }
    Kernels<bf16> emulated{};
    fill_amx(emulated);
    test_products(emulated);
    fill_bfmmla(emulated);
    test_products(emulated);
    return check_failures();
}
