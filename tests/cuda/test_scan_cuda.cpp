// SPDX-License-Identifier: Apache-2.0
// The scan on CUDA, generic and tuned, against plain loops in double and the CPU backend in float64: every type, state
// count, rank and length around a tile, one and two directions, every flag; equal bits whatever kernel shape, batch or
// cut.
#include <array>
#include <limits>
#include <span>

#include "check_cuda.h"
#include "core/device_scratch.h"
#include "scan/choice.h"
#include "vimcore/ops.h"
#ifdef VIMCORE_SHIM
#include "runtime.h"
#endif

using namespace vimcore;
using namespace vimcore::test;
using vimcore::cuda::force_scan;
using vimcore::cuda::ScanKernel;
using Index = std::int64_t;

namespace {

// One pass of a case.
struct Way {
    bool reverse = false, add = false, finish = true;
    Index begin = 0, tokens = -1;  // -1: all
};

struct Case {
    Index batch = 1, len = 33, inner = 24, state = 16, rank = 3;
    std::vector<Way> ways = {{.reverse = false, .add = false, .finish = false},
                             {.reverse = true, .add = true, .finish = true}};
    bool with_state = false;
    Index chunk = 0;  // 0: no checkpoints
    float delta_shift = 0, A_low = -1.5f, A_high = 1.5f;
    float scale = 0.5f;
    Index shift = 0;  // elements between an aligned address and every activation
    std::uint64_t seed = 1;

    Index tokens(std::size_t way) const { return ways[way].tokens < 0 ? len : ways[way].tokens; }
    Index row() const { return rank + 2 * state; }
    Index row(DType dtype, Device device) const  // in memory: padded in every other case
    {
        return len % 2 ? device_scratch::padded_columns(row(), dtype, device.type) : row();
    }
    Index chunks() const { return (len + chunk - 1) / chunk; }
    std::string name() const
    {
        std::string text = "B " + std::to_string(batch) + " L " + std::to_string(len) + " E " + std::to_string(inner) +
                           " N " + std::to_string(state) + " R " + std::to_string(rank) + " shift " +
                           std::to_string(shift) + " delta " + std::to_string(delta_shift) + " chunk " +
                           std::to_string(chunk) + (with_state ? " state" : "");
        for (const Way& way : ways)
            text += std::string(way.reverse ? " | reverse" : " | forward") + (way.add ? " add" : "") +
                    (way.finish ? " finish" : "") + " from " + std::to_string(way.begin);
        return text;
    }
};

// Values of all inputs. Activations are rounded to the device's type, so that every side computes from the same.
struct Inputs {
    Floats xz, out;
    struct Pass {
        Floats u, q, A_log, D, dt_weight, dt_bias, state;
    };
    std::array<Pass, 2> pass;
};

Inputs make_inputs(const Case& c, DType dtype)
{
    Random random(c.seed);
    Inputs in;
    in.xz = rounded(dtype, random.uniform(c.batch * c.len * 2 * c.inner, -3, 3));
    in.out = rounded(dtype, random.uniform(c.batch * c.len * c.inner, -1, 1));
    for (std::size_t i = 0; i < c.ways.size(); i++) {
        const Index tokens = c.tokens(i);
        in.pass[i] = {rounded(dtype, random.uniform(c.batch * tokens * c.inner, -1, 1)),
                      rounded(dtype, random.uniform(c.batch * tokens * c.row(), -1, 1)),
                      random.uniform(c.inner * c.state, c.A_low, c.A_high),
                      random.uniform(c.inner, -1, 1),
                      random.uniform(c.inner * c.rank, -0.5f, 0.5f),
                      random.uniform(c.inner, c.delta_shift - 1, c.delta_shift + 1),
                      random.uniform(c.batch * c.state * c.inner, -1, 1)};
    }
    return in;
}

// What a call leaves behind, all of it.
struct Outputs {
    Floats out;
    std::array<Floats, 2> state, checkpoints;
};

Outputs run(Side& side, const Case& c, const Inputs& in)
{
    const auto activation = [&](const Shape& shape, const Floats& values) {
        return side.make(shape, side.dtype, values, c.shift);
    };
    std::vector<ScanForwardPass> passes(c.ways.size());
    for (std::size_t i = 0; i < passes.size(); i++) {
        const Inputs::Pass& p = in.pass[i];
        passes[i].reverse = c.ways[i].reverse;
        passes[i].u = activation({c.batch, c.tokens(i), c.inner}, p.u);
        const Index row = c.row(side.dtype, side.ctx.device());
        passes[i].q = activation({c.batch, c.tokens(i), row}, with_rows(p.q, c.row(), row, std::nanf("")));
        passes[i].A_log = side.parameter({c.inner, c.state}, p.A_log);
        passes[i].D = side.parameter({c.inner}, p.D);
        passes[i].dt_weight = side.parameter({c.inner, c.rank}, p.dt_weight);
        passes[i].dt_bias = side.parameter({c.inner}, p.dt_bias);
        passes[i].begin = c.ways[i].begin;
        passes[i].add = c.ways[i].add;
        passes[i].finish = c.ways[i].finish;
        if (c.with_state) passes[i].state = side.parameter({c.batch, c.state, c.inner}, p.state);
        if (c.chunk)
            passes[i].checkpoints =
                side.parameter({c.batch, c.chunks(), c.state, c.inner},
                               Floats(static_cast<std::size_t>(c.batch * c.chunks() * c.state * c.inner)));
    }
    ScanForward scan;
    scan.xz = activation({c.batch, c.len, 2 * c.inner}, in.xz);
    scan.passes = passes;
    scan.scale = c.scale;
    scan.chunk = c.chunk;
    scan.out = activation({c.batch, c.len, c.inner}, in.out);
    scan_forward(side.ctx, scan);
    Outputs result;
    result.out = side.values(scan.out);
    for (std::size_t i = 0; i < passes.size(); i++) {
        if (c.with_state) result.state[i] = side.values(passes[i].state);
        if (c.chunk) result.checkpoints[i] = side.values(passes[i].checkpoints);
    }
    return result;
}

Outputs run_cuda(const Case& c, const Inputs& in, DType dtype, ScanKernel kernel)
{
    force_scan(kernel);
    Side side = Side::cuda(dtype);
    Outputs result = run(side, c, in);
    force_scan(ScanKernel::automatic);
    return result;
}

// Plain loops in double.
Outputs reference(const Case& c, const Inputs& in)
{
    const Index E = c.inner, N = c.state, R = c.rank;
    const auto at = [](const Floats& values, Index i) {
        return static_cast<double>(values[static_cast<std::size_t>(i)]);
    };
    Outputs result;
    std::vector<double> out(in.out.begin(), in.out.end());
    for (std::size_t i = 0; i < c.ways.size(); i++) {
        const Way& way = c.ways[i];
        const Inputs::Pass& p = in.pass[i];
        const Index tokens = c.tokens(i);
        result.state[i] = p.state;
        if (c.chunk) result.checkpoints[i].resize(static_cast<std::size_t>(c.batch * c.chunks() * N * E));
        for (Index b = 0; b < c.batch; b++)
            for (Index e = 0; e < E; e++) {
                std::vector<double> h(static_cast<std::size_t>(N));
                for (Index n = 0; n < N && c.with_state; n++)
                    h[static_cast<std::size_t>(n)] = at(p.state, (b * N + n) * E + e);
                for (Index step = 0; step < tokens; step++) {
                    const Index t = way.reverse ? tokens - 1 - step : step, natural = way.begin + t;
                    const Index token = b * tokens + t, place = b * c.len + natural;
                    const bool enters =
                        c.chunk && (way.reverse ? step == 0 || (natural + 1) % c.chunk == 0 : natural % c.chunk == 0);
                    double raw = at(p.dt_bias, e);
                    for (Index r = 0; r < R; r++) raw += at(p.dt_weight, e * R + r) * at(p.q, token * c.row() + r);
                    const double delta = raw > 40 ? raw : std::log1p(std::exp(raw)), u = at(p.u, token * E + e);
                    double y = at(p.D, e) * u;
                    for (Index n = 0; n < N; n++) {
                        double& state = h[static_cast<std::size_t>(n)];
                        if (enters)
                            result.checkpoints[i][static_cast<std::size_t>(
                                ((b * c.chunks() + natural / c.chunk) * N + n) * E + e)] = static_cast<float>(state);
                        state = std::exp(-delta * std::exp(at(p.A_log, e * N + n))) * state +
                                delta * u * at(p.q, token * c.row() + R + n);
                        y += state * at(p.q, token * c.row() + R + N + n);
                    }
                    double& to = out[static_cast<std::size_t>(place * E + e)];
                    if (way.add) y += to;
                    const double z = at(in.xz, place * 2 * E + E + e);
                    to = way.finish ? c.scale * y * z / (1 + std::exp(-z)) : y;
                }
                for (Index n = 0; n < N; n++)
                    result.state[i][static_cast<std::size_t>((b * N + n) * E + e)] =
                        static_cast<float>(h[static_cast<std::size_t>(n)]);
            }
    }
    result.out.assign(out.begin(), out.end());
    return result;
}

void compare(const Outputs& got, const Outputs& want, const Case& c, double rounding, double wide_rounding,
             const std::string& what)
{
    check_agree(got.out, want.out, rounding, __FILE__, __LINE__, what + " out, " + c.name());
    for (std::size_t i = 0; i < c.ways.size(); i++) {
        if (c.with_state)
            check_agree(got.state[i], want.state[i], wide_rounding, __FILE__, __LINE__, what + " state, " + c.name());
        if (c.chunk)
            check_agree(got.checkpoints[i], want.checkpoints[i], wide_rounding, __FILE__, __LINE__,
                        what + " checkpoints, " + c.name());
    }
}

bool same(const Outputs& a, const Outputs& b)
{
    return a.out == b.out && a.state == b.state && a.checkpoints == b.checkpoints;
}

// Both directions of whole sequences that finish, whole groups of channels, rows by 16 bytes.
bool takes_whole(const Case& c, DType dtype)
{
    if (c.ways.size() != 2 || c.ways[0].finish || !c.ways[1].finish || c.ways[0].add || !c.ways[1].add) return false;
    const auto size = static_cast<Index>(size_of(dtype)), row = c.row(dtype, Device::cuda());
    return c.ways[0].reverse != c.ways[1].reverse && c.tokens(0) == c.len && c.tokens(1) == c.len &&
           c.inner % 64 == 0 && c.rank % 4 == 0 && row * size % 16 == 0 && c.shift * size % 16 == 0 && c.chunk % 8 == 0;
}

// The tuned kernels that must take a case; others than these refuse it.
std::vector<ScanKernel> tuned_for(const Case& c, DType dtype)
{
    const auto fits = [&](Index tile) {
        if (c.chunk % tile) return false;
        return std::all_of(c.ways.begin(), c.ways.end(),
                           [&](const Way& way) { return !c.chunk || way.begin % tile == 0; });
    };
    std::vector<ScanKernel> kernels;
    if (c.state != 8 && c.state != 16 && c.state != 32 && c.state != 64) return kernels;
    if (fits(16)) kernels.push_back(ScanKernel::wide);
    if (c.state != 16) return kernels;
    if (takes_whole(c, dtype)) kernels.push_back(ScanKernel::whole);
    if (fits(32)) kernels.push_back(ScanKernel::middle);
    if (fits(dtype == DType::f32 ? 32 : 64) && c.rank <= 24) kernels.push_back(ScanKernel::narrow);
    return kernels;
}

// Both directions in one launch keep the first one's y in float. Passes one after the other round it to the type, and
// it may be larger than the sum.
double out_rounding(const Case& c, DType dtype, bool together, double f32_rounding = 1e-5)
{
    return dtype == DType::f32 ? f32_rounding : (c.ways.size() > 1 && !together ? 4 : 1) * tolerance(dtype);
}

bool runs_together(const Case& c, DType dtype)
{
    if (c.ways.size() != 2 || tuned_for(c, dtype).empty()) return false;
    const Way &a = c.ways[0], &b = c.ways[1];
    return a.reverse != b.reverse && a.begin == b.begin && c.tokens(0) == c.tokens(1) && !a.add && !a.finish && b.add;
}

// f32: what many steps of the recurrence add up to.
void check_case(const Case& c, DType dtype, double f32_rounding = 1e-5)
{
    const Inputs in = make_inputs(c, dtype);
    const Outputs want = reference(c, in);
    compare(run_cuda(c, in, dtype, ScanKernel::generic), want, c, out_rounding(c, dtype, false, f32_rounding),
            f32_rounding, "generic");
    const Outputs automatic = run_cuda(c, in, dtype, ScanKernel::automatic);
    compare(automatic, want, c, out_rounding(c, dtype, runs_together(c, dtype), f32_rounding), f32_rounding,
            "automatic");
    const std::vector<ScanKernel> kernels = tuned_for(c, dtype);
    for (ScanKernel kernel : kernels) {
        const bool equal = same(run_cuda(c, in, dtype, kernel), automatic);
        check_report(equal, __FILE__, __LINE__, ("same bits from every tuned kernel, " + c.name()).c_str());
    }
    for (ScanKernel kernel : {ScanKernel::wide, ScanKernel::whole})
        if (std::find(kernels.begin(), kernels.end(), kernel) == kernels.end() && c.ways.size() == 2) {
            CHECK_THROWS(run_cuda(c, in, dtype, kernel), std::invalid_argument);
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
        for (Index len : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 197})
            check_case(with({},
                            [&](Case& c) {
                                c.len = len;
                                c.inner = len > 65 ? 8 : 24;
                                c.seed = static_cast<std::uint64_t>(len);
                            }),
                       dtype);
}

void test_sizes()
{
    for (DType dtype : device_types) {
        for (Index inner : {1, 3, 4, 64, 65, 136}) check_case(with({}, [&](Case& c) { c.inner = inner; }), dtype);
        for (Index state : {1, 3, 8, 15, 17, 32, 33, 64})
            check_case(with({},
                            [&](Case& c) {
                                c.state = state;
                                c.inner = 40;
                            }),
                       dtype);
        for (Index rank : {1, 5, 6, 8, 12, 24, 48})  // rows of q aligned by 2 to 16 bytes
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
    }
    check_case(with({},
                    [](Case& c) {
                        c.inner = 192;
                        c.rank = 12;
                        c.len = 20;
                    }),
               DType::bf16);
    check_case(with({},
                    [](Case& c) {
                        c.inner = 384;
                        c.rank = 24;
                        c.len = 20;
                    }),
               DType::bf16);
    // more shared memory than a block has: left to the generic kernel
    const Case large = with({}, [](Case& c) {
        c.rank = 600;
        c.state = 64;
        c.len = 5;
    });
    const Inputs in = make_inputs(large, DType::f32);
    compare(run_cuda(large, in, DType::f32, ScanKernel::automatic), reference(large, in), large, 1e-5, 1e-5,
            "rank 600");
    CHECK_THROWS(run_cuda(large, in, DType::f32, ScanKernel::wide), std::invalid_argument);
    force_scan(ScanKernel::automatic);
}

// Sixteen states of 64 channels in a warp: lengths around a tile and the middle, ranks around the 16 of a product of
// matrices, chunks; and as many blocks as make it the choice.
void test_whole()
{
    Case c;
    c.inner = 64;
    c.rank = 12;
    for (DType dtype : device_types) {
        for (Index len : {1, 8, 9, 16, 23, 33}) check_case(with(c, [&](Case& w) { w.len = len; }), dtype);
        for (Index rank : {4, 16, 20, 48})
            check_case(with(c,
                            [&](Case& w) {
                                w.rank = rank;
                                w.inner = rank == 20 ? 128 : 64;
                                w.len = 11;
                            }),
                       dtype);
        for (Index chunk : {16, 64})
            check_case(with(c,
                            [&](Case& w) {
                                w.chunk = chunk;
                                w.with_state = true;
                                w.batch = 2;
                                w.len = 69;
                                std::swap(w.ways[0].reverse, w.ways[1].reverse);
                            }),
                       dtype);
    }
    c.batch = 397;  // it is the choice
    c.len = 2;
    const Inputs in = make_inputs(c, DType::bf16);
    CHECK(same(run_cuda(c, in, DType::bf16, ScanKernel::automatic), run_cuda(c, in, DType::bf16, ScanKernel::wide)));
}

void test_flags()
{
    for (bool reverse : {false, true})
        for (bool add : {false, true})
            for (bool finish : {false, true})
                for (bool with_state : {false, true})
                    for (Index chunk : {0, 10, 16, 64}) {
                        Case c;
                        c.len = 50;
                        c.inner = 8;
                        c.ways = {{.reverse = reverse, .add = add, .finish = finish}};
                        c.with_state = with_state;
                        c.chunk = chunk;
                        check_case(c, chunk == 16 ? DType::f16 : DType::f32);
                        c.ways[0].begin = 16;  // part of the sequence
                        c.ways[0].tokens = 21;
                        check_case(c, chunk == 16 ? DType::bf16 : DType::f32);
                        c.ways[0].begin = 7;
                        check_case(c, DType::f32);
                    }
    Case two;
    two.inner = 8;
    two.with_state = true;
    for (Index len : {20, 70})
        for (Index chunk : {0, 32})
            for (DType dtype : device_types) {
                two.len = len;
                two.chunk = chunk;
                two.ways = {{.reverse = false, .add = false, .finish = false}, {.reverse = true, .add = true}};
                check_case(two, dtype);
                two.ways = {{.reverse = true, .add = true, .finish = false},
                            {.reverse = false, .add = true, .finish = false}};
                check_case(two, dtype);
                // not two directions of one sum: one after the other
                two.ways = {{.reverse = false, .add = false, .finish = false}, {.reverse = false, .add = true}};
                check_case(two, dtype);
                two.ways = {{.reverse = true, .add = false, .finish = true}, {.reverse = false, .add = true}};
                check_case(two, dtype);
            }
    // up to a class token from both ends, as the last block runs it
    two.chunk = 0;
    two.len = 41;
    for (Index token : {0, 16, 20, 40}) {
        two.ways = {{.reverse = false, .add = false, .finish = false, .begin = 0, .tokens = token + 1},
                    {.reverse = true, .add = true, .finish = true, .begin = token, .tokens = 41 - token}};
        for (DType dtype : device_types) check_case(two, dtype);
    }
}

void test_extremes()
{
    for (float shift : {30.0f, -30.0f})
        for (DType dtype : device_types) check_case(with({}, [&](Case& c) { c.delta_shift = shift; }), dtype);
    check_case(with({}, [](Case& c) { c.A_low = c.A_high = -20; }), DType::f32, 2e-5);
    check_case(with({}, [](Case& c) { c.A_low = 3, c.A_high = 6; }), DType::f32, 2e-5);
    check_case(with({},
                    [](Case& c) {
                        c.A_low = -12, c.A_high = -8;
                        c.len = 500;
                        c.inner = 8;
                    }),
               DType::f32, 3e-4);  // a table of exponentials may err by 2 ulp and to one side near 0
}

// The same against the CPU backend, whose own tests check it against loops and finite differences.
void test_cpu()
{
    for (Index chunk : {0, 16}) {
        Case c;
        c.batch = 3;
        c.len = 67;
        c.inner = 72;
        c.rank = 12;
        c.with_state = true;
        c.chunk = chunk;
        for (DType dtype : device_types) {
            const Inputs in = make_inputs(c, dtype);
            Side cpu = Side::cpu();
            compare(run_cuda(c, in, dtype, ScanKernel::automatic), run(cpu, c, in), c, out_rounding(c, dtype, true),
                    1e-5, "cpu");
        }
    }
}

// One image of many, and part by part, gives the bits of the whole.
void test_invariance(DType dtype)
{
    for (ScanKernel kernel : {ScanKernel::automatic, ScanKernel::generic}) {
        Case whole;
        whole.batch = 12;
        whole.len = 37;
        whole.inner = 72;
        const Inputs in = make_inputs(whole, dtype);
        const Outputs together = run_cuda(whole, in, dtype, kernel);
        CHECK(same(together, run_cuda(whole, in, dtype, kernel)));
        const auto image = [](const Floats& values, Index b, Index batch) {
            const auto size = static_cast<std::ptrdiff_t>(values.size()) / batch;
            return Floats(values.begin() + b * size, values.begin() + (b + 1) * size);
        };
        for (Index b : {0, 5, 11}) {
            Case one = whole;
            one.batch = 1;
            Inputs part = in;
            part.xz = image(in.xz, b, whole.batch);
            part.out = image(in.out, b, whole.batch);
            for (Inputs::Pass& p : part.pass) {
                p.u = image(p.u, b, whole.batch);
                p.q = image(p.q, b, whole.batch);
                p.state = image(p.state, b, whole.batch);
            }
            CHECK(run_cuda(one, part, dtype, kernel).out == image(together.out, b, whole.batch));
        }

        // in two calls, the second from the state that the first leaves behind
        for (bool reverse : {false, true}) {
            Case c;
            c.len = 50;
            c.inner = 24;
            c.ways = {{.reverse = reverse}};
            c.with_state = true;
            const Inputs all = make_inputs(c, dtype);
            const Outputs want = run_cuda(c, all, dtype, kernel);
            Inputs cut = all;
            const Index at = 21, begins[2] = {reverse ? at : 0, reverse ? 0 : at},
                        ends[2] = {reverse ? 50 : at, reverse ? at : 50};
            Outputs got;
            for (int i = 0; i < 2; i++) {
                Case piece = c;
                piece.ways[0].begin = begins[i];
                piece.ways[0].tokens = ends[i] - begins[i];
                const auto tokens = [&](const Floats& values, Index width) {
                    return Floats(values.begin() + begins[i] * width, values.begin() + ends[i] * width);
                };
                cut.pass[0].u = tokens(all.pass[0].u, c.inner);
                cut.pass[0].q = tokens(all.pass[0].q, c.row());
                got = run_cuda(piece, cut, dtype, kernel);
                cut.pass[0].state = got.state[0];
                cut.out = got.out;
            }
            CHECK(same(got, want));
        }
    }
}

// A reverse pass is a forward pass over the reversed sequence.
void test_reversed(DType dtype)
{
    Case c;
    c.len = 37;
    c.ways = {{.reverse = true}};
    const Inputs in = make_inputs(c, dtype);
    const auto turned = [&](Floats values) {
        const auto width = static_cast<std::ptrdiff_t>(values.size()) / c.len;
        Floats result;
        for (std::ptrdiff_t t = c.len - 1; t >= 0; t--)
            result.insert(result.end(), values.begin() + t * width, values.begin() + (t + 1) * width);
        return result;
    };
    Inputs turned_in = in;
    for (Floats* values : {&turned_in.xz, &turned_in.out, &turned_in.pass[0].u, &turned_in.pass[0].q})
        *values = turned(*values);
    Case forward = c;
    forward.ways[0].reverse = false;
    for (ScanKernel kernel : {ScanKernel::generic, ScanKernel::wide, ScanKernel::middle, ScanKernel::narrow})
        CHECK(run_cuda(c, in, dtype, kernel).out == turned(run_cuda(forward, turned_in, dtype, kernel).out));
}

// A NaN reaches its channel from there on, and no other.
void test_nan(DType dtype)
{
    Case c;
    c.len = 40;
    c.ways = {{}};
    Inputs in = make_inputs(c, dtype);
    const Index token = 18, channel = 3;
    in.pass[0].u[static_cast<std::size_t>(token * c.inner + channel)] = std::numeric_limits<float>::quiet_NaN();
    for (ScanKernel kernel : {ScanKernel::generic, ScanKernel::wide, ScanKernel::middle, ScanKernel::narrow}) {
        const Floats out = run_cuda(c, in, dtype, kernel).out;
        for (Index t = 0; t < c.len; t++)
            for (Index e = 0; e < c.inner; e++)
                CHECK(std::isnan(out[static_cast<std::size_t>(t * c.inner + e)]) == (e == channel && t >= token));
    }
}

void test_empty()
{
    for (ScanKernel kernel : {ScanKernel::automatic, ScanKernel::generic}) {
        const Case none = with({}, [](Case& c) { c.batch = 0; });
        CHECK(run_cuda(none, make_inputs(none, DType::f32), DType::f32, kernel).out.empty());
        const Case no_tokens = with({}, [](Case& c) {
            c.len = 0;
            c.with_state = true;
        });
        const Inputs in = make_inputs(no_tokens, DType::f32);
        CHECK(run_cuda(no_tokens, in, DType::f32, kernel).state[1] == in.pass[1].state);
    }
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
    const Floats z = rounded(dtype, random.uniform(x.numel(), -3, 3));
    const Floats Bm = rounded(dtype, random.uniform(B.numel(), -1, 1)),
                 Cm = rounded(dtype, random.uniform(B.numel(), -1, 1));
    const Floats A = random.uniform(c.inner * c.state, -2, 0), D = random.uniform(c.inner, -1, 1);
    const Floats bias = random.uniform(c.inner, 0, 0.2f);
    const auto run_side = [&](Side& side) {
        SelectiveScanForward s;
        s.u = side.activation(x, u);
        s.delta = side.activation(x, delta);
        s.A = side.parameter({c.inner, c.state}, A);
        s.Bm = side.activation(B, Bm);
        s.Cm = side.activation(B, Cm);
        if (c.D) s.D = side.parameter({c.inner}, D);
        if (c.z) s.z = side.activation(x, z);
        if (c.bias) s.delta_bias = side.parameter({c.inner}, bias);
        s.delta_softplus = c.softplus;
        s.reverse = c.reverse;
        s.out = side.result(x);
        selective_scan_forward(side.ctx, s);
        return side.values(s.out);
    };
    Side cuda = Side::cuda(dtype), again = Side::cuda(dtype), cpu = Side::cpu();
    const Floats got = run_side(cuda);
    CHECK_AGREE(got, run_side(cpu), dtype == DType::f32 ? 3e-5 : tolerance(dtype));  // a device's exp errs by 2 ulp
    CHECK(got == run_side(again));
}

void test_textbook()
{
    for (DType dtype : device_types)
        for (bool reverse : {false, true})
            for (bool softplus : {false, true}) {
                const Textbook c{.reverse = reverse, .softplus = softplus};
                check_textbook(c, dtype);
                for (Index state : {1, 5, 17, 40}) {
                    Textbook other = c;
                    other.state = state;
                    check_textbook(other, dtype);
                }
                check_textbook({.inner = 130, .reverse = reverse, .softplus = softplus, .D = false}, dtype);
                check_textbook({.len = 1, .reverse = reverse, .softplus = softplus, .z = false}, dtype);
                check_textbook({.reverse = reverse, .softplus = softplus, .z = false, .bias = false}, dtype);
            }
}

// Blocks of the tuned scans that an architecture's multiprocessor holds, by their shared memory and threads: as many as
// registers are kept for (tests/cuda/registers.py has those), or what room there is.
void test_residence()
{
    struct Architecture {
        int number, shared, threads;  // of a multiprocessor
        Index forward_tiny, forward_small, backward;
    };
    constexpr Architecture all[] = {{80, 164, 2048, 4, 3, 2}, {86, 100, 1536, 2, 2, 1},  {89, 100, 1536, 2, 2, 1},
                                    {90, 228, 2048, 6, 4, 2}, {100, 228, 2048, 6, 4, 2}, {120, 100, 1536, 2, 2, 1}};
    constexpr Index state = 16, reserved = 1024;
    for (const Architecture& a : all) {
        const auto blocks = [&](Index shared, int threads) {
            return std::min(Index{a.shared} * 1024 / (2 * shared + reserved), Index{a.threads / threads});
        };
        const auto forward = [&](Index rank) {
            const Index row = device_scratch::padded_columns(rank + 2 * state, DType::bf16, Device::Type::cuda);
            return blocks(device_scratch::whole_shared(2, rank, row), 64);
        };
        CHECK(forward(12) == a.forward_tiny && forward(24) == a.forward_small);
        CHECK(blocks(device_scratch::back_shared(state, 12), 128) == a.backward);
#ifdef VIMCORE_SHIM
        shim::set_architecture(a.number);  // and they run there
        check_case(with({}, [](Case& c) { c.rank = 12, c.inner = 64, c.len = 40; }), DType::bf16);
        shim::set_architecture(90);
#endif
    }
}

}  // namespace

int main()
{
    test_residence();
    test_lengths();
    test_sizes();
    test_whole();
    test_flags();
    test_extremes();
    test_cpu();
    for (DType dtype : device_types) {
        test_invariance(dtype);
        test_reversed(dtype);
        test_nan(dtype);
    }
    test_empty();
    test_textbook();
    return check_failures();
}
