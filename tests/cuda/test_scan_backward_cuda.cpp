// SPDX-License-Identifier: Apache-2.0
// The gradients of the scan on CUDA, generic and tuned, against loops in double (tests/cpp/scan_reference.h, themselves
// checked by finite differences) and the CPU backend in float64: every type, state count, rank and length around a tile
// or chunk, one and two directions; equal bits from one run to the next, in any order of threads, image by image.
#include <array>
#include <cstdlib>
#include <limits>
#include <span>

#include "../cpp/scan_reference.h"
#include "check_cuda.h"
#include "core/device_scratch.h"
#include "scan/choice.h"
#include "vimcore/ops.h"
#if VIMCORE_SHIM
#include "engine.h"
#endif

using namespace vimcore;
using namespace vimcore::test;
using vimcore::cuda::force_scan;
using vimcore::cuda::ScanKernel;
using Index = std::int64_t;
using Shape = vimcore::Shape;

namespace {

struct Case {
    Index batch = 1, len = 33, inner = 24, state = 16, rank = 3, chunk = 16;
    std::vector<bool> reverse = {false, true};
    float delta_shift = 0, A_low = -1.5f, A_high = 1.5f;
    float scale = 0.5f;
    Index shift = 0;  // elements between an aligned address and every activation
    std::uint64_t seed = 1;

    Index row() const { return rank + 2 * state; }
    Index chunks() const { return (len + chunk - 1) / chunk; }
    std::string name() const
    {
        std::string label;
        const auto add = [&](const char* what, auto value) { label.append(what).append(std::to_string(value)); };
        add(" B ", batch);
        add(" L ", len);
        add(" E ", inner);
        add(" N ", state);
        add(" R ", rank);
        add(" chunk ", chunk);
        add(" shift ", shift);
        add(" delta ", delta_shift);
        for (bool way : reverse) label += way ? " reverse" : " forward";
        return label;
    }
};

// Values of all inputs, activations rounded to the device's type; and what the gradients of parameters hold before.
struct Inputs {
    Floats xz, dout;
    struct Pass {
        Floats u, q, A_log, D, dt_weight, dt_bias, dA_log, dD, ddt_weight, ddt_bias;
    };
    std::array<Pass, 2> pass;
};

Inputs make_inputs(const Case& c, DType dtype)
{
    Random random(c.seed);
    Inputs in;
    in.xz = rounded(dtype, random.uniform(c.batch * c.len * 2 * c.inner, -3, 3));
    in.dout = rounded(dtype, random.uniform(c.batch * c.len * c.inner, -1, 1));
    for (std::size_t i = 0; i < c.reverse.size(); i++)
        in.pass[i] = {rounded(dtype, random.uniform(c.batch * c.len * c.inner, -1, 1)),
                      rounded(dtype, random.uniform(c.batch * c.len * c.row(), -1, 1)),
                      random.uniform(c.inner * c.state, c.A_low, c.A_high),
                      random.uniform(c.inner, -1, 1),
                      random.uniform(c.inner * c.rank, -0.5f, 0.5f),
                      random.uniform(c.inner, c.delta_shift - 1, c.delta_shift + 1),
                      random.uniform(c.inner * c.state, -0.1f, 0.1f),
                      random.uniform(c.inner, -0.1f, 0.1f),
                      random.uniform(c.inner * c.rank, -0.1f, 0.1f),
                      random.uniform(c.inner, -0.1f, 0.1f)};
    return in;
}

// The forward pass whose checkpoints `p` reads.
ScanForwardPass forward_pass(const ScanBackwardPass& p)
{
    return {.reverse = p.reverse,
            .u = p.u,
            .q = p.q,
            .A_log = p.A_log,
            .D = p.D,
            .dt_weight = p.dt_weight,
            .dt_bias = p.dt_bias,
            .checkpoints = p.checkpoints};
}

// Forward, then backward from its checkpoints by `kernel`.
Outputs run(Side& side, const Case& c, const Inputs& in, ScanKernel kernel = ScanKernel::automatic)
{
    const auto activation = [&](const Shape& shape, const Floats& values) {
        return side.make(shape, side.dtype, values, c.shift);
    };
    const auto result = [&](const Shape& shape) {
        return activation(shape, Floats(static_cast<std::size_t>(shape.numel()), std::nanf("")));
    };
    const Shape sequence{c.batch, c.len, c.inner}, states{c.batch, c.chunks(), c.state, c.inner};
    std::vector<ScanBackwardPass> passes(c.reverse.size());
    std::vector<ScanForwardPass> forward(c.reverse.size());
    const Index row = c.len % 2 ? device_scratch::padded_columns(c.row(), side.dtype, side.ctx.device().type) : c.row();
    for (std::size_t i = 0; i < passes.size(); i++) {
        const Inputs::Pass& p = in.pass[i];
        ScanBackwardPass& to = passes[i];
        to.reverse = c.reverse[i];
        to.u = activation(sequence, p.u);
        to.q = activation({c.batch, c.len, row}, with_rows(p.q, c.row(), row, std::nanf("")));
        to.A_log = side.parameter({c.inner, c.state}, p.A_log);
        to.D = side.parameter({c.inner}, p.D);
        to.dt_weight = side.parameter({c.inner, c.rank}, p.dt_weight);
        to.dt_bias = side.parameter({c.inner}, p.dt_bias);
        to.checkpoints = side.wide_result(states);
        forward[i] = forward_pass(to);
        forward[i].add = i > 0;
        forward[i].finish = i + 1 == passes.size();
        to.du = result(sequence);
        to.dq = result(to.q.shape);
        to.dA_log = side.parameter(to.A_log.shape, p.dA_log);
        to.dD = side.parameter({c.inner}, p.dD);
        to.ddt_weight = side.parameter(to.dt_weight.shape, p.ddt_weight);
        to.ddt_bias = side.parameter({c.inner}, p.ddt_bias);
    }
    ScanBackward scan;
    scan.xz = activation({c.batch, c.len, 2 * c.inner}, in.xz);
    scan.passes = passes;
    scan.scale = c.scale;
    scan.chunk = c.chunk;
    scan_forward(side.ctx,
                 {.xz = scan.xz, .passes = forward, .scale = c.scale, .chunk = c.chunk, .out = result(sequence)});
    scan.out = result(sequence);
    scan.dout = activation(sequence, in.dout);
    scan.dxz = activation(scan.xz.shape, Floats(in.xz.size(), 7));
    force_scan(kernel);
    scan_backward(side.ctx, scan);
    force_scan(ScanKernel::automatic);
    const Floats dxz = side.values(scan.dxz);
    Floats dz;
    bool kept = true;
    for (std::size_t i = 0; i < dxz.size(); i++) {
        const bool second = static_cast<Index>(i) % (2 * c.inner) >= c.inner;
        if (second) dz.push_back(dxz[i]);
        kept = kept && (second || dxz[i] == 7);
    }
    check_report(kept, __FILE__, __LINE__, "the first half of dxz is not touched");
    Outputs got = {{"out", side.values(scan.out)}, {"dz", dz}};
    for (std::size_t i = 0; i < passes.size(); i++) {
        const ScanBackwardPass& p = passes[i];
        const std::string pass(1, static_cast<char>('0' + i));
        const Floats rows_of_dq = side.values(p.dq), dq = with_rows(rows_of_dq, row, c.row());
        CHECK(with_rows(dq, c.row(), row) == rows_of_dq);  // zeros behind the columns
        Floats part[3];
        for (std::size_t j = 0; j < dq.size(); j++) {
            const Index column = static_cast<Index>(j) % c.row() - c.rank;
            part[column < 0 ? 0 : 1 + column / c.state].push_back(dq[j]);
        }
        got.push_back({"du " + pass, side.values(p.du)});
        got.push_back({"ddt " + pass, part[0]});
        got.push_back({"dB " + pass, part[1]});
        got.push_back({"dC " + pass, part[2]});
        got.push_back({"dA_log " + pass, side.values(p.dA_log), true});
        got.push_back({"dD " + pass, side.values(p.dD), true});
        got.push_back({"ddt_weight " + pass, side.values(p.ddt_weight), true});
        got.push_back({"ddt_bias " + pass, side.values(p.ddt_bias), true});
    }
    return got;
}

Outputs run_cuda(const Case& c, const Inputs& in, DType dtype, ScanKernel kernel)
{
    Side side = Side::cuda(dtype);
    return run(side, c, in, kernel);
}

// The same from the loops in double, image by image, direction by direction.
Outputs reference(const Case& c, const Inputs& in)
{
    namespace loops = vimcore::cpu;
    using loops::Doubles;
    const Index E = c.inner, N = c.state, R = c.rank, L = c.len;
    const auto rows = [](const Floats& values, Index begin, Index count, Index width, Index first, Index columns) {
        Doubles part;
        for (Index t = begin; t < begin + count; t++)
            for (Index i = 0; i < columns; i++) part.push_back(values[static_cast<std::size_t>(t * width + first + i)]);
        return part;
    };
    const auto append = [](Floats& to, const Doubles& values) { to.insert(to.end(), values.begin(), values.end()); };
    const auto at = [](auto& values, Index i) -> auto& { return values[static_cast<std::size_t>(i)]; };
    Outputs want(2 + 8 * c.reverse.size());
    std::vector<std::array<Doubles, 4>> sums;
    for (const Inputs::Pass& p : std::span(in.pass).first(c.reverse.size())) {
        const auto doubles = [](const Floats& values) { return Doubles(values.begin(), values.end()); };
        sums.push_back({doubles(p.dA_log), doubles(p.dD), doubles(p.ddt_weight), doubles(p.ddt_bias)});
    }
    for (Index b = 0; b < c.batch; b++) {
        Doubles y(static_cast<std::size_t>(L * E));
        std::vector<loops::Shape> shapes;
        std::vector<loops::Inputs> inputs;
        for (std::size_t i = 0; i < c.reverse.size(); i++) {
            const Inputs::Pass& p = in.pass[i];
            loops::Shape s;
            s.len = L;
            s.dim = E;
            s.state = N;
            s.rank = R;
            s.chunk = c.chunk;
            s.reverse = c.reverse[i];
            s.scale = c.scale;
            s.add = true;
            loops::Inputs x;
            x.u = rows(p.u, b * L, L, E, 0, E);
            x.dt = rows(p.q, b * L, L, c.row(), 0, R);
            x.B = rows(p.q, b * L, L, c.row(), R, N);
            x.C = rows(p.q, b * L, L, c.row(), R + N, N);
            x.D = rows(p.D, 0, 1, E, 0, E);
            x.dt_bias = rows(p.dt_bias, 0, 1, E, 0, E);
            x.z = rows(in.xz, b * L, L, 2 * E, E, E);
            x.dout = rows(in.dout, b * L, L, E, 0, E);
            for (Index r = 0; r < R; r++)
                for (Index e = 0; e < E; e++) x.dt_weight.push_back(at(p.dt_weight, e * R + r));
            for (Index n = 0; n < N; n++)
                for (Index e = 0; e < E; e++)
                    x.A.push_back(-std::exp(static_cast<double>(at(p.A_log, e * N + n))) * 1.4426950408889634);
            x.y = y;
            y = loops::reference(s, x, false).ungated;
            shapes.push_back(s);
            inputs.push_back(x);
        }
        for (std::size_t i = 0; i < c.reverse.size(); i++) {
            const loops::Inputs& x = inputs[i];
            const loops::Forward forward = loops::reference(shapes[i], x, false);
            const loops::Gradients g = loops::reference_backward(shapes[i], x, forward);
            if (i + 1 == c.reverse.size()) {
                append(want[0].values, forward.y);
                append(want[1].values, g.dz);
            }
            Doubles ddt(static_cast<std::size_t>(L * R));
            auto& [dA_log, dD, ddt_weight, ddt_bias] = sums[i];
            for (Index e = 0; e < E; e++) {
                at(dD, e) += at(g.dD, e);
                at(ddt_bias, e) += at(g.dbias, e);
                for (Index n = 0; n < N; n++)
                    at(dA_log, e * N + n) += at(g.dA, n * E + e) * at(x.A, n * E + e) * 0.6931471805599453;
                for (Index t = 0; t < L; t++)
                    for (Index r = 0; r < R; r++) {
                        at(ddt, t * R + r) += at(g.ddelta, t * E + e) * at(x.dt_weight, r * E + e);
                        at(ddt_weight, e * R + r) += at(g.ddelta, t * E + e) * at(x.dt, t * R + r);
                    }
            }
            Output* const to = &want[2 + 8 * i];
            append(to[0].values, g.du);
            append(to[1].values, ddt);
            append(to[2].values, g.dB);
            append(to[3].values, g.dC);
            for (std::size_t j = 0; j < 4; j++) to[4 + j].values.assign(sums[i][j].begin(), sums[i][j].end());
        }
    }
    return want;
}

void compare(const Outputs& got, const Outputs& want, const Case& c, DType dtype, double f32_rounding,
             const std::string& what)
{
    check_report(got.size() == want.size(), __FILE__, __LINE__, (what + ": as many results").c_str());
    for (std::size_t i = 0; i < got.size(); i++) {
        const double rounding = got[i].wide || dtype == DType::f32 ? f32_rounding : tolerance(dtype);
        check_agree(got[i].values, want[i].values, rounding, __FILE__, __LINE__,
                    what + " " + name_of(dtype) + " " + got[i].name + c.name());
    }
}

bool same(const Outputs& a, const Outputs& b)
{
    bool equal = a.size() == b.size();
    for (std::size_t i = 0; i < a.size() && equal; i++) equal = same_bits(a[i].values, b[i].values);
    return equal;
}

bool has_tuned(const Case& c, DType dtype)
{
    if (c.inner % 2 || c.shift * static_cast<Index>(size_of(dtype)) % (2 * static_cast<Index>(size_of(dtype))))
        return false;
    if (c.reverse.size() == 2 && c.reverse[0] == c.reverse[1]) return false;
    return (c.state == 8 || c.state == 16 || c.state == 32) && c.chunk % 16 == 0;
}

// f32: what many steps of the recurrence add up to.
void check_case(const Case& c, DType dtype, double f32_rounding = 1e-5)
{
    const Inputs in = make_inputs(c, dtype);
    const Outputs want = reference(c, in);
    compare(run_cuda(c, in, dtype, ScanKernel::generic), want, c, dtype, f32_rounding, "generic");
    if (has_tuned(c, dtype)) {
        compare(run_cuda(c, in, dtype, ScanKernel::wide), want, c, dtype, f32_rounding, "tuned");
    } else {
        CHECK_THROWS(run_cuda(c, in, dtype, ScanKernel::wide), std::invalid_argument);
        force_scan(ScanKernel::automatic);
    }
}

template <class Change>
Case with(Case c, Change change)
{
    change(c);
    return c;
}

void test_lengths()
{
    for (DType dtype : device_types)
        for (Index len : {1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 197})
            for (Index chunk : {16, 64})
                check_case(with({},
                                [&](Case& c) {
                                    c.len = len;
                                    c.inner = len > 65 ? 6 : 20;
                                    c.chunk = chunk;
                                    c.seed = static_cast<std::uint64_t>(len);
                                }),
                           dtype);
}

void test_sizes()
{
    for (DType dtype : device_types) {
        for (Index inner : {1, 2, 3, 32, 34, 64, 65, 136})
            check_case(with({}, [&](Case& c) { c.inner = inner; }), dtype);
        for (Index state : {1, 3, 8, 15, 17, 32, 33, 64})
            check_case(with({},
                            [&](Case& c) {
                                c.state = state;
                                c.inner = 40;
                            }),
                       dtype);
        for (Index rank : {1, 5, 8, 12, 24})
            check_case(with({},
                            [&](Case& c) {
                                c.rank = rank;
                                c.batch = 2;
                            }),
                       dtype);
        for (Index shift : {1, 2, 4})
            check_case(with({},
                            [&](Case& c) {
                                c.shift = shift;
                                c.rank = 12;
                            }),
                       dtype);
        for (Index chunk : {1, 10, 48, 128})
            check_case(with({},
                            [&](Case& c) {
                                c.chunk = chunk;
                                c.len = 100;
                                c.inner = 6;
                            }),
                       dtype);
        for (std::vector<bool> ways : {std::vector{false}, std::vector{true}, std::vector{true, false},
                                       std::vector{false, false}, std::vector{true, true}})
            for (Index state : {16, 20})
                check_case(with({},
                                [&](Case& c) {
                                    c.reverse = ways;
                                    c.state = state;
                                    c.batch = 2;
                                    c.scale = 1;
                                }),
                           dtype);
    }
}

void test_extremes()
{
    for (float shift : {30.0f, -30.0f})
        for (DType dtype : {DType::f32, DType::bf16})
            check_case(with({}, [&](Case& c) { c.delta_shift = shift; }), dtype, 3e-5);
    check_case(with({}, [](Case& c) { c.A_low = c.A_high = -20; }), DType::f32, 3e-5);
    check_case(with({}, [](Case& c) { c.A_low = 3, c.A_high = 6; }), DType::f32, 3e-5);
    check_case(with({},
                    [](Case& c) {
                        c.A_low = -12, c.A_high = -8;
                        c.len = 500;
                        c.inner = 6;
                    }),
               DType::f32, 3e-4);  // exponentials of 2 ulp, all to one side
}

// Sequences that are cut into segments, with states that reach over many of them, and that do not.
void test_long()
{
    for (bool far : {false, true})
        for (std::vector<bool> ways : {std::vector{false, true}, std::vector{true}})
            check_case(with({},
                            [&](Case& c) {
                                c.len = 2100;
                                c.inner = 2;
                                c.chunk = far ? 64 : 16;
                                c.reverse = ways;
                                if (far) c.A_low = -9, c.A_high = -6;
                                if (far) c.delta_shift = -3;
                            }),
                       far ? DType::f32 : DType::bf16, far ? 1e-3 : 1e-4);
}

// The same against the CPU backend, whose own tests check it against loops and finite differences.
void test_cpu()
{
    for (Index chunk : {16, 64}) {
        Case c;
        c.batch = 3;
        c.len = 67;
        c.inner = 72;
        c.rank = 12;
        c.chunk = chunk;
        for (DType dtype : device_types) {
            const Inputs in = make_inputs(c, dtype);
            Side cpu = Side::cpu();
            compare(run_cuda(c, in, dtype, ScanKernel::automatic), run(cpu, c, in), c, dtype, 2e-5, "cpu");
        }
    }
}

// The same bits again, in another order of blocks and threads; and activations of one image as in a batch.
void test_repeat(DType dtype)
{
    for (ScanKernel kernel : {ScanKernel::automatic, ScanKernel::generic}) {
        Case whole;
        whole.batch = 3;
        whole.len = 53;
        whole.inner = 72;
        const Inputs in = make_inputs(whole, dtype);
        const Outputs together = run_cuda(whole, in, dtype, kernel);
        CHECK(same(together, run_cuda(whole, in, dtype, kernel)));
#if VIMCORE_SHIM
        for (std::uint64_t seed : {1, 2}) {
            shim::set_seed(seed);
            CHECK(same(together, run_cuda(whole, in, dtype, kernel)));
        }
        shim::set_seed(0);
#endif
        const auto image = [&](const Floats& values, Index b) {
            const auto size = static_cast<std::ptrdiff_t>(values.size()) / whole.batch;
            return Floats(values.begin() + b * size, values.begin() + (b + 1) * size);
        };
        for (Index b : {0, 2}) {
            Case one = whole;
            one.batch = 1;
            Inputs part = in;
            part.xz = image(in.xz, b);
            part.dout = image(in.dout, b);
            for (Inputs::Pass& p : part.pass) {
                p.u = image(p.u, b);
                p.q = image(p.q, b);
            }
            const Outputs apart = run_cuda(one, part, dtype, kernel);
            for (std::size_t i = 0; i < apart.size(); i++)
                if (!apart[i].wide) CHECK(same_bits(apart[i].values, image(together[i].values, b)));
        }
    }
}

// Gradients of parameters that nobody wants, and nothing to do.
void test_absent()
{
    for (ScanKernel kernel : {ScanKernel::automatic, ScanKernel::generic}) {
        force_scan(kernel);
        for (Index batch : {0, 1}) {
            Side side = Side::cuda(DType::f32);
            const Index len = 20, inner = 5, state = 16, rank = 2;
            ScanBackwardPass p;
            Random random(3);
            const auto some = [&](const Shape& shape) {
                return side.activation(shape, random.uniform(shape.numel(), -1, 1));
            };
            p.u = some({batch, len, inner});
            p.q = some({batch, len, rank + 2 * state});
            p.A_log = some({inner, state});
            p.D = some({inner});
            p.dt_weight = some({inner, rank});
            p.dt_bias = some({inner});
            p.checkpoints = side.result({batch, 2, state, inner});
            p.du = side.result(p.u.shape);
            p.dq = side.result(p.q.shape);
            ScanBackward scan;
            scan.xz = some({batch, len, 2 * inner});
            scan.chunk = 16;
            scan.out = side.result(p.u.shape);
            scan.dout = some(p.u.shape);
            scan.dxz = side.activation(scan.xz.shape, Floats(static_cast<std::size_t>(scan.xz.numel())));
            scan.passes = {&p, 1};
            const ScanForwardPass forward = forward_pass(p);
            scan_forward(side.ctx, {.xz = scan.xz, .passes = {&forward, 1}, .chunk = scan.chunk, .out = scan.out});
            scan_backward(side.ctx, scan);
            const Floats without = side.values(p.dq);
            for (float x : without) CHECK(!std::isnan(x));
            p.dA_log = side.parameter(p.A_log.shape, Floats(static_cast<std::size_t>(inner * state)));
            p.dD = side.parameter({inner}, Floats(static_cast<std::size_t>(inner)));
            scan_backward(side.ctx, scan);
            CHECK(same_bits(side.values(p.dq), without));
            const Floats dD = side.values(p.dD);
            CHECK(batch == 0 || dD[0] != 0);
        }
    }
    force_scan(ScanKernel::automatic);
}

// ---- textbook arguments --------------------------------------------------------------------------------------------

struct Textbook {
    Index batch = 2, len = 19, inner = 7, state = 16;
    bool reverse = false, softplus = true, D = true, z = true, bias = true;
};

void check_textbook(const Textbook& c, DType dtype)
{
    Random random(5);
    const Shape x{c.batch, c.len, c.inner}, B{c.batch, c.len, c.state};
    const Floats u = rounded(dtype, random.uniform(x.numel(), -1, 1));
    const Floats delta = rounded(dtype, random.uniform(x.numel(), c.softplus ? -2.0f : 0.0f, 0.5f));
    const Floats z = rounded(dtype, random.uniform(x.numel(), -3, 3)),
                 dout = rounded(dtype, random.uniform(x.numel(), -1, 1));
    const Floats Bm = rounded(dtype, random.uniform(B.numel(), -1, 1)),
                 Cm = rounded(dtype, random.uniform(B.numel(), -1, 1));
    const Floats A = random.uniform(c.inner * c.state, -2, 0), D = random.uniform(c.inner, -1, 1);
    const Floats bias = random.uniform(c.inner, 0, 0.2f);
    const auto run_side = [&](Side& side) {
        const Shape vector{c.inner};
        SelectiveScanBackward s;
        s.u = side.activation(x, u);
        s.delta = side.activation(x, delta);
        s.A = side.parameter({c.inner, c.state}, A);
        s.Bm = side.activation(B, Bm);
        s.Cm = side.activation(B, Cm);
        s.delta_softplus = c.softplus;
        s.reverse = c.reverse;
        s.out = side.result(x);
        s.dout = side.activation(x, dout);
        s.du = side.result(x);
        s.ddelta = side.result(x);
        s.dA = side.wide_result(s.A.shape);
        s.dB = side.result(B);
        s.dC = side.result(B);
        if (c.D) s.D = side.parameter(vector, D), s.dD = side.wide_result(vector);
        if (c.z) s.z = side.activation(x, z), s.dz = side.result(x);
        if (c.bias) s.delta_bias = side.parameter(vector, bias), s.ddelta_bias = side.wide_result(vector);
        selective_scan_backward(side.ctx, s);
        Outputs got = {{"out", side.values(s.out)},     {"du", side.values(s.du)}, {"ddelta", side.values(s.ddelta)},
                       {"dA", side.values(s.dA), true}, {"dB", side.values(s.dB)}, {"dC", side.values(s.dC)}};
        if (c.D) got.push_back({"dD", side.values(s.dD), true});
        if (c.z) got.push_back({"dz", side.values(s.dz)});
        if (c.bias) got.push_back({"ddelta_bias", side.values(s.ddelta_bias), true});
        return got;
    };
    Side cuda = Side::cuda(dtype), again = Side::cuda(dtype), cpu = Side::cpu();
    const Outputs got = run_side(cuda), want = run_side(cpu);
    for (std::size_t i = 0; i < want.size(); i++)
        check_agree(got[i].values, want[i].values, got[i].wide || dtype == DType::f32 ? 3e-5 : tolerance(dtype),
                    __FILE__, __LINE__, std::string("textbook ") + name_of(dtype) + " " + got[i].name);
    CHECK(same(got, run_side(again)));
}

void test_textbook()
{
    for (DType dtype : device_types)
        for (bool reverse : {false, true})
            for (bool softplus : {false, true}) {
                const Textbook c{.reverse = reverse, .softplus = softplus};
                check_textbook(c, dtype);
                for (Index state : {1, 17}) {
                    Textbook other = c;
                    other.state = state;
                    other.len = 70;
                    check_textbook(other, dtype);
                }
                check_textbook({.inner = 70, .reverse = reverse, .softplus = softplus, .D = false}, dtype);
                check_textbook({.len = 1, .reverse = reverse, .softplus = softplus, .z = false}, dtype);
                check_textbook({.reverse = reverse, .softplus = softplus, .z = false, .bias = false}, dtype);
            }
    check_textbook({.batch = 0}, DType::f32);  // gradients of parameters are 0
    check_textbook({.len = 0}, DType::f32);
}

}  // namespace

int main()
{
    test_lengths();
    test_sizes();
    test_extremes();
    test_long();
    test_cpu();
    for (DType dtype : device_types) test_repeat(dtype);
    test_absent();
    test_textbook();
    return check_failures();
}
