// SPDX-License-Identifier: Apache-2.0
// Selective scan on one thread: ns per (token, channel, state) of every instruction set, and the share of the floor:
// 10 multiply-add slots per state forward (exp2 6, product, input, update, output), at the peak measured here.
//   scan [len] [channels] [state] [rank] [chunk]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "isa.h"

using namespace vimcore::cpu;

namespace {

struct Sizes {
    Index len = 197, dim = 384, state = 16, rank = 12, chunk = 64;
};

std::mt19937 generator(3);

struct Array {
    std::vector<float> memory;
    float* base;
    explicit Array(Index count, float low = 0, float high = 0) : memory(static_cast<std::size_t>(count + 16))
    {
        std::uniform_real_distribution<float> draw(low, high);
        if (low < high)
            for (float& v : memory) v = draw(generator);
        void* p = memory.data();
        std::size_t space = memory.size() * sizeof(float);
        base = static_cast<float*>(std::align(64, sizeof(float), p, space));
    }
};

// The best of many short runs: what the code costs when the machine does nothing else.
template <class F>
double best_seconds(F&& f)
{
    using Clock = std::chrono::steady_clock;
    double best = 1e30;
    for (auto end = Clock::now() + std::chrono::milliseconds(600); Clock::now() < end;) {
        const auto start = Clock::now();
        f();
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return best;
}

void bench(const Kernels<float>& k, const Sizes& s)
{
    volatile float sink = 0;
    const Index rounds = 20000;
    const double flops = static_cast<double>(rounds * k.fma_per_round);
    const double peak = flops / best_seconds([&] { sink = k.fma_peak(rounds); });  // flop/s

    const Index row = s.rank + 2 * s.state, chunks = (s.len + s.chunk - 1) / s.chunk;
    Array u(s.len * s.dim, -1, 1), z(s.len * 2 * s.dim, -3, 3), q(s.len * row, -1, 1),
        weight(s.rank * s.dim, -0.3f, 0.3f);
    Array bias(s.dim, -4, -1), A_log(s.dim * s.state, 0, 3), A(s.dim * s.state), D(s.dim, -1, 1), y(s.len * s.dim);
    Array checkpoints(chunks * s.state * s.dim), dout(s.len * s.dim, -1, 1), du(s.len * s.dim), ddelta(s.len * s.dim);
    Array dB(s.len * s.state), dC(s.len * s.state), dA(s.state * s.dim), dD(s.dim), dbias(s.dim), dz(s.len * s.dim);
    Array scratch(k.scan_backward_scratch(s.state, s.chunk, s.dim));
    k.prepare_A(A_log.base, s.dim, s.state, A.base);

    ScanArgs<float> f{};
    f.len = s.len;
    f.dim = s.dim;
    f.state = s.state;
    f.rank = s.rank;
    f.u = u.base;
    f.ldu = s.dim;
    f.dt = q.base;
    f.lddt = f.ldb = row;
    f.dt_weight = weight.base;
    f.dt_bias = bias.base;
    f.softplus = true;
    f.A = A.base;
    f.B = q.base + s.rank;
    f.C = f.B + s.state;
    f.D = D.base;
    f.y = y.base;
    f.ldy = s.dim;
    f.finish = true;
    f.z = z.base + s.dim;
    f.ldz = 2 * s.dim;
    f.scale = 0.5f;
    f.chunk = s.chunk;

    const Index block = 64;  // channels of a task of the backend
    auto forward = [&](float* saved) {
        f.checkpoints = saved;
        for (f.e0 = 0; f.e0 < s.dim; f.e0 = f.e1) {
            f.e1 = std::min(s.dim, f.e0 + block);
            k.scan_forward(f);
        }
    };
    auto backward = [&] {
        ScanBackwardArgs<float> g{};
        g.f = f;
        g.f.finish = false;
        g.dout = dout.base;
        g.lddout = g.lddu = g.ldddelta = s.dim;
        g.du = du.base;
        g.ddelta = ddelta.base;
        g.dB = dB.base;
        g.dC = dC.base;
        g.dA = dA.base;
        g.dD = dD.base;
        g.dbias = dbias.base;
        g.scratch = scratch.base;
        for (g.f.e0 = 0; g.f.e0 < s.dim; g.f.e0 = g.f.e1) {
            g.f.e1 = std::min(s.dim, g.f.e0 + block);
            k.scan_backward(g);
        }
    };
    const double count = static_cast<double>(s.len * s.dim * s.state), floor = count * 10 * 2 / peak;
    const double t_forward = best_seconds([&] { forward(nullptr); });
    const double t_saved = best_seconds([&] { forward(checkpoints.base); });
    const double t_backward = best_seconds(backward);
    const double t_gate = best_seconds([&] {
        k.gate_backward({.len = s.len,
                         .e0 = 0,
                         .e1 = s.dim,
                         .y = y.base,
                         .ldy = s.dim,
                         .z = f.z,
                         .ldz = f.ldz,
                         .dout = dout.base,
                         .lddout = s.dim,
                         .dz = dz.base,
                         .lddz = s.dim,
                         .scale = 0.5f});
    });
    std::printf(
        "%-9s peak %6.1f Gflop/s  forward %.4f ns (%.0f %% of the floor)  with checkpoints %.4f  "
        "backward %.4f  gate %.4f\n",
        k.isa, peak * 1e-9, t_forward / count * 1e9, 100 * floor / t_forward, t_saved / count * 1e9,
        t_backward / count * 1e9, t_gate / count * 1e9);
}

}  // namespace

int main(int argc, char** argv)
{
    Sizes s;
    Index* fields[] = {&s.len, &s.dim, &s.state, &s.rank, &s.chunk};
    for (int i = 1; i < argc && i <= 5; i++) *fields[i - 1] = std::atoll(argv[i]);
    std::printf("len %lld channels %lld state %lld rank %lld chunk %lld; ns per (token, channel, state)\n", s.len,
                s.dim, s.state, s.rank, s.chunk);
    for (const std::string& isa : isas_of_float()) bench(kernels<float>(isa), s);
}
