// SPDX-License-Identifier: Apache-2.0
// Matrix products, normalisation and convolution of every instruction set this machine can run, float and double,
// against plain loops in double; equal bits however the work is split.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"
#include "vimcore/error.h"

using namespace vimcore::cpu;

namespace {

std::mt19937 generator(7);

template <class T>
std::vector<T> random(Index size, double low = -1, double high = 1)
{
    std::uniform_real_distribution<double> draw(low, high);
    std::vector<T> values(static_cast<std::size_t>(size));
    for (T& value : values) value = static_cast<T>(draw(generator));
    return values;
}

template <class T>
double tolerance()
{
    return sizeof(T) == 4 ? 2e-6 : 4e-15;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
std::vector<T> packed(const Kernels<T>& kernels, const std::vector<T>& w, Index ldw, Index n, Index k, bool transposed)
{
    std::vector<T> out(static_cast<std::size_t>((n + kernels.nr - 1) / kernels.nr * kernels.nr * k + 1), T(99));
    kernels.pack({w.data(), ldw, n, k, transposed, out.data()});
    CHECK(out.back() == T(99));
    return out;
}

template <class T>
void test_gemm(const Kernels<T>& kernels, Index m, Index n, Index k, bool with_bias, bool add, bool transposed)
{
    const Index ldx = k + 3, ldy = n + 5, ldw = (transposed ? n : k) + 2;
    const auto x = random<T>(m * ldx + 1), w = random<T>((transposed ? k : n) * ldw + 1), bias = random<T>(n);
    const auto before = random<T>(m * ldy + 1);
    const auto panels = packed(kernels, w, ldw, n, k, transposed);
    const Index count = (n + kernels.nr - 1) / kernels.nr;
    auto y = before;
    const GemmArgs<T> whole = {
        x.data(), ldx, panels.data(), with_bias ? bias.data() : nullptr, y.data(), ldy, m, n, k, 0, count, add};
    kernels.gemm(whole);
    for (Index i = 0; i < m; i++)
        for (Index j = 0; j < ldy; j++) {
            const T got = y[i * ldy + j];
            if (j >= n) {
                CHECK(got == before[i * ldy + j]);
                continue;
            }
            double sum = (with_bias ? bias[j] : 0) + (add ? before[i * ldy + j] : 0);
            for (Index p = 0; p < k; p++) sum += double(x[i * ldx + p]) * w[transposed ? p * ldw + j : j * ldw + p];
            CHECK_CLOSE(got, sum, tolerance<T>() * (1 + std::sqrt(double(k))));
        }
    CHECK(y.back() == before.back());

    auto split = before;  // every row and every panel on its own
    for (Index i = 0; i < m; i++)
        for (Index panel = 0; panel < count; panel++) {
            GemmArgs<T> part = whole;
            part.x += i * ldx;
            part.y = split.data() + i * ldy;
            part.m = 1;
            part.panel_begin = panel;
            part.panel_end = panel + 1;
            kernels.gemm(part);
        }
    CHECK(same_bits(y, split));
}

template <class T>
void test_gemm_tn(const Kernels<T>& kernels, Index m, Index n, Index k)
{
    const Index lddy = n + 3, ldx = k + 2, lddw = k + 1;
    const auto dy = random<T>(m * lddy + 1), x = random<T>(m * ldx + 1), before = random<T>(n * lddw + 1);
    const Index size = kernels.gemm_tn_scratch(m, k);
    std::vector<T> scratch(static_cast<std::size_t>(size + 1), T(77));
    auto dw = before;
    const GemmTnArgs<T> whole = {dy.data(), lddy, x.data(), ldx, dw.data(), lddw, m, k, 0, n, scratch.data()};
    kernels.gemm_tn(whole);
    CHECK(scratch.back() == T(77));
    for (Index j = 0; j < n; j++)
        for (Index p = 0; p < lddw; p++) {
            double sum = before[j * lddw + p];
            if (p < k)
                for (Index i = 0; i < m; i++) sum += double(dy[i * lddy + j]) * x[i * ldx + p];
            CHECK_CLOSE(dw[j * lddw + p], sum, p < k ? tolerance<T>() * (1 + std::sqrt(double(m))) : 0.0);
        }
    CHECK(dw.back() == before.back());

    auto split = before;
    for (Index j = 0; j < n; j += 5) {
        GemmTnArgs<T> part = whole;
        part.dw = split.data();
        part.j_begin = j;
        part.j_end = std::min(n, j + 5);
        kernels.gemm_tn(part);
    }
    CHECK(same_bits(dw, split));
}

struct NormCase {
    bool h, residual, residual_out, in_place, bias, layer;
};

template <class T>
void test_norm_forward(const Kernels<T>& kernels, Index len, Index dim, const NormCase& c)
{
    const double offset = c.layer ? 100 : 0;  // a mean much larger than the deviation
    const auto h = random<T>(len * dim, offset - 1, offset + 1), weight = random<T>(dim), bias = random<T>(dim);
    const auto residual = random<T>(len * dim);
    auto memory = c.in_place ? residual : std::vector<T>(static_cast<std::size_t>(len * dim), T(55));
    std::vector<T> out(static_cast<std::size_t>(len * dim + 1), T(33));
    NormForwardArgs<T> args = {};
    args.h = c.h ? h.data() : nullptr;
    args.residual = !c.residual ? nullptr : c.in_place ? memory.data() : residual.data();
    args.residual_out = c.residual_out ? memory.data() : nullptr;
    args.weight = weight.data();
    args.bias = c.bias ? bias.data() : nullptr;
    args.out = out.data();
    args.row_scale = T(1.25);
    args.eps = T(1e-5);
    args.layer = c.layer;
    args.len = len;
    args.dim = dim;
    kernels.norm_forward(args);
    CHECK(out.back() == T(33));
    for (Index i = 0; i < len; i++) {
        std::vector<long double> x(static_cast<std::size_t>(dim));
        long double mean = 0, squares = 0;
        for (Index d = 0; d < dim; d++) {
            x[d] = T((c.residual ? residual[i * dim + d] : 0) + (c.h ? 1.25 * h[i * dim + d] : 0));
            if (c.residual_out) CHECK_CLOSE(memory[i * dim + d], double(x[d]), tolerance<T>() * (1 + offset));
            if (c.residual_out) x[d] = memory[i * dim + d];
            mean += x[d] / dim;
        }
        if (!c.layer) mean = 0;
        for (long double value : x) squares += (value - mean) * (value - mean) / dim;
        const long double rstd = 1 / std::sqrt(squares + 1e-5L);
        for (Index d = 0; d < dim; d++) {
            const long double want = (x[d] - mean) * rstd * weight[d] + (c.bias ? bias[d] : 0);
            // the mean and, where it was not stored, x are rounded at the size of the offset
            CHECK_CLOSE(out[i * dim + d], double(want), tolerance<T>() * double(2 + 0.2 * offset * rstd));
        }
    }
}

template <class T>
void test_norm_backward(const Kernels<T>& kernels, Index len, Index dim, bool layer, bool arriving, bool in_place,
                        bool optional)
{
    const auto x = random<T>(len * dim), weight = random<T>(dim), dout = random<T>(len * dim);
    const auto dresidual_out = random<T>(len * dim), dweight_before = random<T>(dim), dbias_before = random<T>(dim);
    auto dx = in_place ? dresidual_out : std::vector<T>(static_cast<std::size_t>(len * dim));
    std::vector<T> dh(static_cast<std::size_t>(len * dim));
    auto dweight = dweight_before, dbias = dbias_before;
    NormBackwardArgs<T> args = {};
    args.x = x.data();
    args.weight = weight.data();
    args.row_scale = T(0.75);
    args.eps = T(1e-5);
    args.layer = layer;
    args.len = len;
    args.dim = dim;
    args.dout = dout.data();
    args.dresidual_out = !arriving ? nullptr : in_place ? dx.data() : dresidual_out.data();
    args.dresidual = dx.data();
    args.dh = optional ? dh.data() : nullptr;
    args.dweight = optional ? dweight.data() : nullptr;
    args.dbias = optional ? dbias.data() : nullptr;
    kernels.norm_backward(args);

    std::vector<double> dw(dweight_before.begin(), dweight_before.end()), db(dbias_before.begin(), dbias_before.end());
    for (Index i = 0; i < len; i++) {
        double mean = 0, squares = 0, slope = 0, shift = 0;
        for (Index d = 0; d < dim; d++) mean += layer ? double(x[i * dim + d]) / dim : 0;
        for (Index d = 0; d < dim; d++) squares += std::pow(x[i * dim + d] - mean, 2) / dim;
        const double rstd = 1 / std::sqrt(squares + 1e-5);
        for (Index d = 0; d < dim; d++) {
            const double xhat = (x[i * dim + d] - mean) * rstd, g = double(weight[d]) * dout[i * dim + d];
            slope += g * xhat / dim;
            shift += layer ? g / dim : 0;
            dw[d] += dout[i * dim + d] * xhat;
            db[d] += dout[i * dim + d];
        }
        for (Index d = 0; d < dim; d++) {
            const double xhat = (x[i * dim + d] - mean) * rstd, g = double(weight[d]) * dout[i * dim + d];
            const double want = rstd * (g - shift - xhat * slope) + (arriving ? dresidual_out[i * dim + d] : 0);
            CHECK_CLOSE(dx[i * dim + d], want, tolerance<T>() * 3 * (1 + rstd));
            if (optional) CHECK_CLOSE(dh[i * dim + d], 0.75 * want, tolerance<T>() * 3 * (1 + rstd));
        }
    }
    for (Index d = 0; d < dim; d++) {
        CHECK_CLOSE(dweight[d], optional ? dw[d] : dweight_before[d], tolerance<T>() * (2 + len));
        CHECK_CLOSE(dbias[d], optional ? db[d] : dbias_before[d], tolerance<T>() * (2 + len));
    }
}

struct ConvCase {
    Index total, dim, width;
    bool reverse, silu, bias;
};

template <class T>
struct ConvData {
    Index ldx, ldu;
    std::vector<T> x, weight, bias;
    std::vector<double> p;  // (total, dim) before SiLU

    explicit ConvData(const ConvCase& c)
        : ldx(c.dim + 7),
          ldu(c.dim + 2),
          x(random<T>(c.total * ldx)),
          weight(random<T>(c.width * c.dim)),
          bias(random<T>(c.dim))
    {
        for (Index t = 0; t < c.total; t++)
            for (Index e = 0; e < c.dim; e++) {
                double sum = c.bias ? bias[e] : 0;
                for (Index k = 0; k < c.width; k++) {
                    const Index s = c.reverse ? t + c.width - 1 - k : t - c.width + 1 + k;
                    if (s >= 0 && s < c.total) sum += double(weight[k * c.dim + e]) * x[s * ldx + e];
                }
                p.push_back(sum);
            }
    }
    Conv<T> conv(const ConvCase& c) const
    {
        Conv<T> a = {};
        a.x = x.data();
        a.ldx = ldx;
        a.weight = weight.data();
        a.bias = c.bias ? bias.data() : nullptr;
        a.total = c.total;
        a.dim = a.e1 = c.dim;
        a.width = c.width;
        a.reverse = c.reverse;
        a.silu = c.silu;
        return a;
    }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
void test_conv_forward(const Kernels<T>& kernels, const ConvCase& c)
{
    const ConvData<T> data(c);
    std::vector<T> u(static_cast<std::size_t>(c.total * data.ldu), T(44)), split = u;
    const ConvForwardArgs<T> args = {.f = data.conv(c), .u = u.data(), .ldu = data.ldu, .begin = 0, .len = c.total};
    kernels.conv_forward(args);
    for (Index t = 0; t < c.total; t++)
        for (Index e = 0; e < data.ldu; e++) {
            const T got = u[t * data.ldu + e];
            if (e >= c.dim) {
                CHECK(got == T(44));
                continue;
            }
            const double p = data.p[t * c.dim + e];
            CHECK_CLOSE(got, c.silu ? p * sigmoid(p) : p, tolerance<T>() * 2);
        }
    for (Index begin = 0; begin < c.total; begin += 7)  // tiles of tokens and of channels
        for (Index e = 0; e < c.dim; e += 2 * kernels.lanes) {
            ConvForwardArgs<T> part = args;
            part.u = split.data() + begin * data.ldu;
            part.begin = begin;
            part.len = std::min<Index>(7, c.total - begin);
            part.f.e0 = e;
            part.f.e1 = std::min(c.dim, e + 2 * kernels.lanes);
            kernels.conv_forward(part);
        }
    CHECK(same_bits(u, split));
}

template <class T>
void test_conv_backward(const Kernels<T>& kernels, const ConvCase& c, bool add_dx)
{
    const ConvData<T> data(c);
    const Index lddu = c.dim + 1, lddx = c.dim + 4;
    const auto du = random<T>(c.total * lddu), dx_before = random<T>(c.total * lddx);
    const auto dweight_before = random<T>(c.width * c.dim), dbias_before = random<T>(c.dim);
    auto dx = dx_before, dweight = dweight_before, dbias = dbias_before;
    for (Index e = 0; e < c.dim; e += 3 * kernels.lanes) {  // every range of channels on its own
        ConvBackwardArgs<T> args = {};
        args.f = data.conv(c);
        args.f.e0 = e;
        args.f.e1 = std::min(c.dim, e + 3 * kernels.lanes);
        args.du = du.data();
        args.lddu = lddu;
        args.dx = dx.data();
        args.lddx = lddx;
        args.add_dx = add_dx;
        args.dweight = dweight.data();
        args.dbias = dbias.data();
        kernels.conv_backward(args);
    }
    std::vector<double> want_dx(dx_before.begin(), dx_before.end());
    std::vector<double> want_dw(dweight_before.begin(), dweight_before.end());
    std::vector<double> want_db(dbias_before.begin(), dbias_before.end());
    for (Index t = 0; t < c.total; t++)
        for (Index e = 0; e < c.dim; e++)
            if (!add_dx) want_dx[t * lddx + e] = 0;
    for (Index t = 0; t < c.total; t++)
        for (Index e = 0; e < c.dim; e++) {
            const double p = data.p[t * c.dim + e], s = sigmoid(p);
            const double dp = du[t * lddu + e] * (c.silu ? s * (1 + p * (1 - s)) : 1.0);
            want_db[e] += dp;
            for (Index k = 0; k < c.width; k++) {
                const Index row = c.reverse ? t + c.width - 1 - k : t - c.width + 1 + k;
                if (row < 0 || row >= c.total) continue;
                want_dx[row * lddx + e] += data.weight[k * c.dim + e] * dp;
                want_dw[k * c.dim + e] += data.x[row * data.ldx + e] * dp;
            }
        }
    const double slack = tolerance<T>() * 3;
    for (std::size_t i = 0; i < dx.size(); i++) CHECK_CLOSE(dx[i], want_dx[i], slack);
    for (std::size_t i = 0; i < dweight.size(); i++)
        CHECK_CLOSE(dweight[i], want_dw[i], slack * (1 + std::sqrt(double(c.total))));
    for (std::size_t i = 0; i < dbias.size(); i++)
        CHECK_CLOSE(dbias[i], want_db[i], slack * (1 + std::sqrt(double(c.total))));
}

template <class T>
void test_kernels(const std::string& isa)
{
    const Kernels<T>& k = kernels<T>(isa);
    CHECK(k.isa == isa);
    const Index L = k.lanes;

    for (Index m : {Index(0), Index(1), k.mr - 1, k.mr, k.mr + 1, Index(101)})
        for (Index n : {Index(1), L - 1, L, L + 1, 2 * L + 1, k.nr, k.nr + 1, 2 * k.nr - 3})
            for (Index depth : {0, 1, 17}) test_gemm(k, m, n, depth, n % 2 != 0, m % 2 != 0, (m + n + depth) % 3 == 0);
    for (int options = 0; options < 8; options++)
        test_gemm(k, 13, k.nr + L + 2, 33, options & 1, options & 2, options & 4);
    test_gemm<T>(k, 9, 44, 768, true, false, false);

    for (Index m : {Index(0), Index(1), Index(127), Index(128), Index(300)})
        for (Index n : {Index(1), k.mr - 1, k.mr + 1, Index(44)})
            for (Index depth : {Index(1), L + 1, k.nr, k.nr + 3}) test_gemm_tn(k, m, n, depth);
    test_gemm_tn<T>(k, 70, 203, 50);

    for (Index dim : {Index(1), L - 1, L, L + 1, 4 * L, Index(75), Index(192)})
        for (bool layer : {false, true}) {
            test_norm_forward(k, 3, dim, {true, true, true, true, layer, layer});
            test_norm_forward(k, 3, dim, {true, true, true, false, false, layer});
            test_norm_forward(k, 2, dim, {true, false, true, false, layer, layer});
            test_norm_forward(k, 2, dim, {false, true, true, false, layer, false});
            test_norm_forward(k, 2, dim, {false, true, true, true, false, false});
            test_norm_forward(k, 2, dim, {false, true, false, false, false, false});
            test_norm_forward(k, 1, dim, {true, true, false, false, false, false});
            for (int options = 0; options < 8; options++)
                if (dim > 1 || !layer) test_norm_backward(k, 5, dim, layer, options & 1, options & 2, options & 4);
        }

    for (Index width : {1, 2, 3, 4, 5, 9})
        for (Index total : {1, 3, 4, 29})
            for (Index dim : {Index(1), L - 1, L + 1, 5 * L + 2})
                for (bool reverse : {false, true}) {
                    const bool silu = (total + dim) % 3 != 0, bias = dim % 2 != 0;
                    test_conv_forward<T>(k, {total, dim, width, reverse, silu, bias});
                    test_conv_backward<T>(k, {total, dim, width, reverse, silu, bias}, total % 2 != 0);
                }
    CHECK(std::isfinite(double(k.fma_peak(1000))) && k.fma_per_round > 0);
}

void test_isa()
{
    setenv("VIMCORE_ISA", "nonsense", 1);
    CHECK_THROWS(isa_in_use(), vimcore::Error);
    unsetenv("VIMCORE_ISA");
    CHECK(isa_in_use() == isas_available().back());
    CHECK(isa_in_use().starts_with(kernels<float>().isa) && kernels<double>().isa == std::string(kernels<float>().isa));
    CHECK(isas_built().size() >= isas_available().size() && !isas_available().empty());
}

}  // namespace

int main()
{
    test_isa();
    for (const std::string& isa : isas_of_float()) {
        test_kernels<float>(isa);
        test_kernels<double>(isa);
    }
    return check_failures();
}
