// SPDX-License-Identifier: Apache-2.0
// The selective scan of every instruction set this machine can run, float and double, against plain loops in double
// (themselves checked by finite differences): lengths, state counts, both directions, chunks, channel tails; equal bits
// however a sequence is cut; extreme steps and decays; long sequences.
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "isa.h"
#include "scan_reference.h"

using namespace vimcore::cpu;

namespace {

// An array for the kernel: rows of a wider stride, 64-byte aligned, with guards that must survive.
template <class T>
struct Rows2 {
    Index count, width, ld;
    std::vector<T> memory;
    T* base;
    Rows2(Index count_, Index width_, Index pad = 3)
        : count(count_), width(width_), ld(width_ + pad), memory(size(count_ * (width_ + pad) + 32), T(77))
    {
        void* p = memory.data();
        std::size_t space = memory.size() * sizeof(T);
        base = static_cast<T*>(std::align(64, sizeof(T), p, space));
    }
    Rows2(Index count_, Index width_, const Doubles& values, Index pad = 3) : Rows2(count_, width_, pad)
    {
        for (Index i = 0; i < count; i++)
            for (Index j = 0; j < width; j++) base[i * ld + j] = static_cast<T>(values[size(i * width + j)]);
    }
    Rows2(const Rows2&) = delete;
    Doubles values() const
    {
        Doubles out(size(count * width));
        for (Index i = 0; i < count; i++)
            for (Index j = 0; j < width; j++) out[size(i * width + j)] = static_cast<double>(base[i * ld + j]);
        return out;
    }
    bool guards_kept() const
    {
        for (Index i = 0; i < count; i++)
            for (Index j = width; j < ld; j++)
                if (base[i * ld + j] != T(77)) return false;
        return true;
    }
};

template <class T>
bool same_bits(const Rows2<T>& a, const Rows2<T>& b)
{
    for (Index i = 0; i < a.count; i++)
        if (std::memcmp(a.base + i * a.ld, b.base + i * b.ld, size(a.width) * sizeof(T)) != 0) return false;
    return true;
}

// Relative to the largest element (of `terms` for long sums): that is how rounding errors of a recurrence scale.
void check_array(const Doubles& got, const Doubles& expected, double tolerance, const std::string& what,
                 const Doubles& terms = {})
{
    double largest = 1e-30, worst = 0;
    for (double x : terms) largest = std::max(largest, std::abs(x));
    bool numbers = got.size() == expected.size();
    for (std::size_t i = 0; i < expected.size(); i++) {
        largest = std::max(largest, std::abs(expected[i]));
        worst = std::max(worst, std::abs(got[i] - expected[i]));
        numbers = numbers && !std::isnan(got[i]);
    }
    check_report(numbers && worst <= tolerance * largest, __FILE__, __LINE__,
                 (what + ": error " + std::to_string(worst / largest) + " of the largest").c_str());
}

template <class T>
struct Run {
    const Kernels<T>& k;
    const Shape s;
    Rows2<T> u, dt, weight, bias, A, B, C, D, z, y, h, checkpoints, dout;
    Rows2<T> du, ddelta, dB, dC, dA, dD, dbias, dz;

    Run(const Kernels<T>& kernels, const Shape& shape, const Inputs& in)
        : k(kernels),
          s(shape),
          u(s.len, s.dim, in.u),
          dt(s.len, s.rank ? s.rank : s.dim, in.dt),
          weight(s.rank, s.dim, in.dt_weight, 0),
          bias(1, s.dim, in.dt_bias),
          A(s.state, s.dim, in.A, 0),
          B(s.len, s.state, in.B, 2),
          C(s.len, s.state, in.C, 2),
          D(1, s.dim, in.D),
          z(s.len, s.dim, in.z),
          y(s.len, s.dim, in.y),
          h(s.state, s.dim, in.h, 0),
          checkpoints(s.chunks() * s.state, s.dim, 0),
          dout(s.len, s.dim, in.dout),
          du(s.len, s.dim),
          ddelta(s.len, s.dim),
          dB(s.len, s.state, 0),
          dC(s.len, s.state, 0),
          dA(s.state, s.dim, 0),
          dD(1, s.dim),
          dbias(1, s.dim),
          dz(s.len, s.dim)
    {
    }

    ScanArgs<T> args(Index begin, Index len, bool with_h)
    {
        ScanArgs<T> f{};
        f.reverse = s.reverse;
        f.len = len;
        f.dim = s.dim;
        f.state = s.state;
        f.rank = s.rank;
        f.e0 = 0;
        f.e1 = s.dim;
        f.u = u.base + begin * u.ld;
        f.ldu = u.ld;
        f.dt = dt.base + begin * dt.ld;
        f.lddt = dt.ld;
        f.dt_weight = s.rank ? weight.base : nullptr;
        f.dt_bias = s.bias ? bias.base : nullptr;
        f.softplus = s.softplus;
        f.A = A.base;
        f.B = B.base + begin * B.ld;
        f.C = C.base + begin * C.ld;
        f.ldb = B.ld;
        f.D = s.skip ? D.base : nullptr;
        f.h = with_h ? h.base : nullptr;
        f.y = y.base + begin * y.ld;
        f.ldy = y.ld;
        f.add = s.add;
        f.finish = s.finish;
        f.z = s.gate ? z.base + begin * z.ld : nullptr;
        f.ldz = z.ld;
        f.scale = static_cast<T>(s.scale);
        f.checkpoints = checkpoints.base;
        f.chunk = s.chunk;
        f.begin = begin;
        return f;
    }

    // Channels in two calls where there is more than one vector, as threads do it.
    void forward(ScanArgs<T> f)
    {
        const Index split = k.lanes < s.dim ? k.lanes : s.dim;
        f.e1 = split;
        k.scan_forward(f);
        f.e0 = split;
        f.e1 = s.dim;
        if (split < s.dim) k.scan_forward(f);
        CHECK(y.guards_kept());
    }

    void backward()
    {
        ScanBackwardArgs<T> g{};
        g.f = args(0, s.len, false);
        g.f.finish = false;
        g.dout = dout.base;
        g.lddout = dout.ld;
        g.du = du.base;
        g.lddu = du.ld;
        g.ddelta = ddelta.base;
        g.ldddelta = ddelta.ld;
        g.dB = dB.base;
        g.dC = dC.base;
        g.dA = dA.base;
        g.dD = dD.base;
        g.dbias = dbias.base;
        const Index space = k.scan_backward_scratch(s.state, s.chunk, s.dim);
        Rows2<T> scratch(1, space, 1);
        scratch.base[0] = std::numeric_limits<T>::quiet_NaN();
        for (Index i = 0; i < space; i++) scratch.base[i] = std::numeric_limits<T>::quiet_NaN();
        g.scratch = scratch.base;
        k.scan_backward(g);
        CHECK(scratch.guards_kept());
        CHECK(du.guards_kept() && ddelta.guards_kept() && y.guards_kept() && dD.guards_kept() && dbias.guards_kept());
        if (s.gate)
            k.gate_backward({.len = s.len,
                             .e0 = 0,
                             .e1 = s.dim,
                             .y = y.base,
                             .ldy = y.ld,
                             .z = z.base,
                             .ldz = z.ld,
                             .dout = dout.base,
                             .lddout = dout.ld,
                             .dz = dz.base,
                             .lddz = dz.ld,
                             .scale = static_cast<T>(s.scale)});
        CHECK(y.guards_kept() && dz.guards_kept());
    }
};

std::string name(const Shape& s, const char* isa, std::size_t bytes)
{
    return std::string(isa) + (bytes == 4 ? " f32" : " f64") + " len " + std::to_string(s.len) + " dim " +
           std::to_string(s.dim) + " state " + std::to_string(s.state) + " rank " + std::to_string(s.rank) + " chunk " +
           std::to_string(s.chunk) + (s.reverse ? " reverse" : "") + (s.softplus ? "" : " no softplus") +
           (s.gate ? "" : " no gate") + (s.add ? " add" : "") + " shift " + std::to_string(s.delta_shift);
}

template <class T>
void test_shape(const Kernels<T>& k, const Shape& s, double tolerance, double gradient_tolerance)
{
    const std::string id = name(s, k.isa, sizeof(T));
    const Inputs in = make_inputs<T>(s);

    // with a state on entry, not finished
    Shape plain = s;
    plain.finish = false;
    const Forward expected = reference(plain, in, true);
    Run<T> run(k, plain, in);
    run.forward(run.args(0, s.len, true));
    check_array(run.y.values(), expected.ungated, tolerance, id + " y");
    check_array(run.h.values(), expected.h, tolerance, id + " h");
    check_array(run.checkpoints.values(), expected.checkpoints, tolerance, id + " checkpoints");

    // cut at multiples of the chunk: the same bits
    Run<T> cut(k, plain, in);
    const Index piece = s.chunk;
    for (Index i = 0; i < s.chunks(); i++) {
        const Index begin = (s.reverse ? s.chunks() - 1 - i : i) * piece;
        cut.forward(cut.args(begin, std::min(piece, s.len - begin), true));
    }
    CHECK(same_bits(run.y, cut.y) && same_bits(run.h, cut.h) && same_bits(run.checkpoints, cut.checkpoints));
    // cut anywhere, without checkpoints
    Run<T> odd(k, plain, in);
    for (Index done = 0, i = 0; done < s.len; i++) {
        const Index len = std::min<Index>(1 + i * 5 % 11, s.len - done);
        ScanArgs<T> f = odd.args(s.reverse ? s.len - done - len : done, len, true);
        f.checkpoints = nullptr;
        odd.forward(f);
        done += len;
    }
    CHECK(same_bits(run.y, odd.y) && same_bits(run.h, odd.h));

    // from zero, finished; then backward from its checkpoints
    const Forward whole = reference(s, in, false);
    const Gradients wanted = reference_backward(s, in, whole);
    Run<T> full(k, s, in), again(k, s, in);
    for (Run<T>* r : {&full, &again}) {
        r->forward(r->args(0, s.len, false));
        if (r == &full) check_array(r->y.values(), whole.y, tolerance, id + " gated y");
        for (Index t = 0; t < s.len; t++)
            for (Index e = 0; e < s.dim; e++) r->y.base[t * r->y.ld + e] = static_cast<T>(in.y[size(t * s.dim + e)]);
        r->backward();
    }
    if (s.gate) check_array(full.y.values(), whole.y, tolerance, id + " y after the gate");
    if (!s.gate) check_array(full.y.values(), whole.ungated, tolerance, id + " replayed y");
    if (s.gate) check_array(full.dz.values(), wanted.dz, tolerance, id + " dz");
    check_array(full.du.values(), wanted.du, gradient_tolerance, id + " du");
    check_array(full.ddelta.values(), wanted.ddelta, gradient_tolerance, id + " ddelta");
    check_array(full.dB.values(), wanted.dB, gradient_tolerance, id + " dB", wanted.dB_terms);
    check_array(full.dC.values(), wanted.dC, gradient_tolerance, id + " dC", wanted.dC_terms);
    check_array(full.dA.values(), wanted.dA, gradient_tolerance, id + " dA", wanted.dA_terms);
    check_array(full.dD.values(), wanted.dD, gradient_tolerance, id + " dD", wanted.dD_terms);
    check_array(full.dbias.values(), wanted.dbias, gradient_tolerance, id + " dbias", wanted.dbias_terms);
    CHECK(same_bits(full.du, again.du) && same_bits(full.ddelta, again.ddelta) && same_bits(full.dB, again.dB) &&
          same_bits(full.dC, again.dC) && same_bits(full.dA, again.dA) && same_bits(full.dD, again.dD) &&
          same_bits(full.dbias, again.dbias) && same_bits(full.y, again.y) && same_bits(full.dz, again.dz));
}

// The adjoint of the reference against differences of the loss sum(dout y).
void test_reference()
{
    Shape s;
    s.len = 6;
    s.dim = 2;
    s.state = 3;
    for (bool reverse : {false, true}) {
        s.reverse = reverse;
        Inputs in = make_inputs<double>(s);
        const Gradients g = reference_backward(s, in, reference(s, in, false));
        auto loss = [&] {
            const Doubles y = reference(s, in, false).y;
            double total = 0;
            for (std::size_t i = 0; i < y.size(); i++) total += y[i] * in.dout[i];
            return total;
        };
        auto compare = [&](Doubles& x, const Doubles& gradient, double factor) {
            for (std::size_t i = 0; i < x.size(); i++) {
                const double kept = x[i], step = 1e-5;
                x[i] = kept + step;
                const double above = loss();
                x[i] = kept - step;
                const double below = loss();
                x[i] = kept;
                CHECK_CLOSE((above - below) / (2 * step), gradient[i] * factor, 1e-8);
            }
        };
        compare(in.u, g.du, 1);
        compare(in.B, g.dB, 1);
        compare(in.C, g.dC, 1);
        compare(in.D, g.dD, 1);
        compare(in.dt_bias, g.dbias, 1);
        compare(in.z, g.dz, 1);
        compare(in.A, g.dA, std::log(2.0));
    }
}

template <class T>
void test_prepare(const Kernels<T>& k)
{
    const Index dim = 5, state = 3;
    const Doubles A_log = random<T>(dim * state, -20, 4);
    std::vector<T> in(A_log.begin(), A_log.end()), out(size(dim * state));
    k.prepare_A(in.data(), dim, state, out.data());
    for (Index n = 0; n < state; n++)
        for (Index e = 0; e < dim; e++) {
            const double expected = -std::exp(A_log[size(e * state + n)]) * 1.4426950408889634;
            CHECK_CLOSE(out[size(n * dim + e)], expected, std::abs(expected) * (sizeof(T) == 4 ? 6e-8 : 3e-16));
        }
}

// A NaN anywhere in a channel reaches its outputs and stays in its channel.
template <class T>
void test_nan(const Kernels<T>& k)
{
    Shape s;
    s.len = 9;
    const Inputs in = make_inputs<T>(s);
    for (int which = 0; which < 4; which++) {
        Run<T> run(k, s, in);
        const Index t = 4, e = 3;
        Rows2<T>* target[] = {&run.u, &run.bias, &run.z, &run.h};
        target[which]->base[which == 1 || which == 3 ? e : t * target[which]->ld + e] =
            std::numeric_limits<T>::quiet_NaN();
        run.forward(run.args(0, s.len, true));
        const Doubles y = run.y.values();
        for (Index i = 0; i < s.len; i++)
            for (Index j = 0; j < s.dim; j++) {
                const bool expected = j == e && (which == 2 ? i == t : which == 0 ? i >= t : true);
                CHECK(std::isnan(y[size(i * s.dim + j)]) == expected);
            }
    }
}

// Steps and decays whose product overflows, or nearly: all that is kept of a state is 0, in both passes.
template <class T>
void test_far(const Kernels<T>& k, double tolerance, double gradients)
{
    for (bool reverse : {false, true})
        for (Index state : {4, 16, 17}) {
            Shape s;
            s.len = 40;
            s.state = state;
            s.reverse = reverse;
            for (auto [low, high] : {std::pair{62.0, 88.0}, {-1.5, 88.0}, {86.0, 88.0}}) {
                s.A_low = low;
                s.A_high = high;
                s.delta_shift = 0;
                test_shape(k, s, tolerance, gradients);
                s.delta_shift = -60;  // decays in reach of the steps again, of which they are rounded with the product
                test_shape(k, s, 3 * tolerance, 100 * gradients);
            }
            for (auto [low, high] : {std::pair{-1.5, 1.5}, {-60.0, 20.0}, {62.0, 88.0}}) {
                s.A_low = low;
                s.A_high = high;
                s.delta_shift = 1e30;
                test_shape(k, s, tolerance, 10 * gradients);
            }
        }
    // A_log for which A itself, times log2(e), is beyond float
    const T A_log[] = {T(88.5), T(400), T(1e5)};
    T A[3];
    k.prepare_A(A_log, 3, 1, A);
    for (const T a : A) CHECK(std::isfinite(a) && a < T(-3e38));
}

template <class T>
void test_isa(const std::string& isa)
{
    const Kernels<T>& k = kernels<T>(isa);
    const double tolerance = sizeof(T) == 4 ? 3e-6 : 2e-14, gradients = sizeof(T) == 4 ? 5e-6 : 1e-13;
    test_prepare(k);
    test_nan(k);
    for (Index state : {1, 3, 4, 8, 16, 17, 32})
        for (Index len : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 200})
            for (bool reverse : {false, true}) {
                Shape s;
                s.state = state;
                s.len = len;
                s.reverse = reverse;
                s.chunk = (len + state) % 2 ? 16 : 64;
                test_shape(k, s, tolerance, gradients);
            }
    for (bool reverse : {false, true}) {
        Shape base;
        base.len = 40;
        base.reverse = reverse;
        auto with = [&](auto change) {
            Shape s = base;
            change(s);
            test_shape(k, s, tolerance, gradients);
        };
        for (Index dim : {1, 2, 7, 8, 15, 16, 17, 32, 40, 70}) with([&](Shape& s) { s.dim = dim; });
        for (Index rank : {0, 1, 2, 12, 24}) with([&](Shape& s) { s.rank = rank; });
        for (Index chunk : {1, 3, 8, 20, 64}) with([&](Shape& s) { s.chunk = chunk; });
        with([](Shape& s) {
            s.rank = 0;
            s.softplus = false;
        });
        with([](Shape& s) {
            s.rank = 0;
            s.softplus = false;
            s.bias = false;
            s.gate = false;
        });
        with([](Shape& s) { s.gate = false; });
        with([](Shape& s) {
            s.skip = false;
            s.bias = false;
        });
        with([](Shape& s) { s.add = true; });
        with([](Shape& s) {
            s.add = true;
            s.gate = false;
        });
        // delta near 30 is rounded to 2e-6, and decays to that times A
        Shape large = base;
        large.delta_shift = 30;
        test_shape(k, large, tolerance, 10 * gradients);
        large.A_low = 3;
        large.A_high = 6;
        test_shape(k, large, tolerance, 10 * gradients);
        with([](Shape& s) { s.delta_shift = -30; });
        with([](Shape& s) { s.A_low = s.A_high = -20; });
        with([](Shape& s) {
            s.len = 5000;
            s.dim = 17;
            s.chunk = 64;
        });
        // decay almost one: the errors of 5000 steps add up
        Shape slow = base;
        slow.len = 5000;
        slow.A_low = -12;
        slow.A_high = -8;
        slow.chunk = 64;
        test_shape(k, slow, sizeof(T) == 4 ? 2e-5 : 1e-13, sizeof(T) == 4 ? 1e-4 : 1e-12);
    }
    test_far(k, tolerance, gradients);
}

}  // namespace

// With an argument, the widest instruction set only: the one that an emulated machine adds.
int main(int argc, char**)
{
    test_reference();
    const std::vector<std::string> all = isas_of_float(), widest{all.back()};
    for (const std::string& isa : argc > 1 ? widest : all) {
        test_isa<float>(isa);
        test_isa<double>(isa);
    }
    return check_failures();
}
