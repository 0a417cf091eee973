// SPDX-License-Identifier: Apache-2.0
// The selective scan and its gradient in plain loops and double, with the inputs that the tests feed to the kernels.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "kernels.h"

namespace vimcore::cpu {

inline std::mt19937 generator(11);

using Doubles = std::vector<double>;

inline std::size_t size(Index n) { return static_cast<std::size_t>(n); }

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Shape {
    Index len = 17, dim = 19, state = 16, rank = 3, chunk = 16;
    bool reverse = false, softplus = true, gate = true, skip = true, bias = true, add = false, finish = true;
    double scale = 0.5;
    double delta_shift = 0;             // added to dt_bias
    double A_low = -1.5, A_high = 1.5;  // range of A_log
    Index chunks() const { return (len + chunk - 1) / chunk; }
    Index token(Index step) const { return reverse ? len - 1 - step : step; }
};

// Inputs in double, rounded to T where they are T for the kernel. Row strides are wider than the rows.
struct Inputs {
    Doubles u, dt, dt_weight, dt_bias, A, B, C, D, z, y, dout, h;
};

template <class T>
Doubles random(Index count, double low, double high)
{
    std::uniform_real_distribution<double> draw(low, high);
    Doubles values(size(count));
    for (double& v : values) v = static_cast<double>(static_cast<T>(draw(generator)));
    return values;
}

template <class T>
Inputs make_inputs(const Shape& s)
{
    Inputs in;
    in.u = random<T>(s.len * s.dim, -1, 1);
    in.dt =
        s.rank ? random<T>(s.len * s.rank, -1, 1) : random<T>(s.len * s.dim, s.softplus ? -2 : 0, s.softplus ? 1 : 0.5);
    in.dt_weight = random<T>(s.rank * s.dim, -0.5, 0.5);
    in.dt_bias = random<T>(s.dim, s.delta_shift - 1, s.delta_shift + 1);
    if (!s.softplus && s.bias) in.dt_bias = random<T>(s.dim, 0, 0.2);
    in.B = random<T>(s.len * s.state, -1, 1);
    in.C = random<T>(s.len * s.state, -1, 1);
    in.D = random<T>(s.dim, -1, 1);
    in.z = random<T>(s.len * s.dim, -3, 3);
    in.y = random<T>(s.len * s.dim, -1, 1);
    in.dout = random<T>(s.len * s.dim, -1, 1);
    in.h = random<T>(s.state * s.dim, -1, 1);
    // A as the kernel stores it, (N, E) and times log2(e)
    const Doubles A_log = random<T>(s.dim * s.state, s.A_low, s.A_high);
    in.A.resize(size(s.state * s.dim));
    for (Index n = 0; n < s.state; n++)
        for (Index e = 0; e < s.dim; e++)
            in.A[size(n * s.dim + e)] =
                static_cast<double>(static_cast<T>(-std::exp(A_log[size(e * s.state + n)]) * 1.4426950408889634));
    return in;
}

struct Forward {
    Doubles y, ungated, raw, delta, h, states, checkpoints;  // states: (L, N, E) after every token
};

inline Forward reference(const Shape& s, const Inputs& in, bool from_h)
{
    Forward r;
    const Index E = s.dim, N = s.state;
    r.y = in.y;
    r.ungated = r.raw = r.delta = Doubles(size(s.len * E));
    r.h = from_h ? in.h : Doubles(size(N * E));
    r.states.resize(size(s.len * N * E));
    r.checkpoints.resize(size(s.chunks() * N * E));
    for (Index step = 0; step < s.len; step++) {
        const Index t = s.token(step);
        const bool enters = s.reverse ? (t + 1) % s.chunk == 0 || step == 0 : t % s.chunk == 0;
        for (Index e = 0; e < E; e++) {
            double raw = s.bias ? in.dt_bias[size(e)] : 0;
            if (s.rank == 0) raw += in.dt[size(t * E + e)];
            for (Index i = 0; i < s.rank; i++) raw += in.dt[size(t * s.rank + i)] * in.dt_weight[size(i * E + e)];
            const double delta = !s.softplus || raw > 20 ? raw : std::log1p(std::exp(raw));
            const double u = in.u[size(t * E + e)];
            double y = s.skip ? in.D[size(e)] * u : 0;
            for (Index n = 0; n < N; n++) {
                double& h = r.h[size(n * E + e)];
                if (enters) r.checkpoints[size((t / s.chunk * N + n) * E + e)] = h;
                h = std::exp2(delta * in.A[size(n * E + e)]) * h + delta * u * in.B[size(t * N + n)];
                y += in.C[size(t * N + n)] * h;
                r.states[size((t * N + n) * E + e)] = h;
            }
            r.raw[size(t * E + e)] = raw;
            r.delta[size(t * E + e)] = delta;
            if (s.add) y += in.y[size(t * E + e)];
            r.ungated[size(t * E + e)] = y;
            const double z = in.z[size(t * E + e)];
            if (s.finish) y *= s.scale * (s.gate ? z * sigmoid(z) : 1);
            r.y[size(t * E + e)] = y;
        }
    }
    return r;
}

struct Gradients {
    Doubles du, ddelta, dB, dC, dA, dD, dbias, dz;
    Doubles dB_terms, dC_terms, dA_terms, dD_terms,
        dbias_terms;  // sums of absolute values: what rounding errors are relative to
};

inline Gradients reference_backward(const Shape& s, const Inputs& in, const Forward& f)
{
    const Index E = s.dim, N = s.state;
    Gradients g;
    g.du = g.ddelta = g.dz = Doubles(size(s.len * E));
    g.dB = g.dC = g.dB_terms = g.dC_terms = Doubles(size(s.len * N));
    g.dA = g.dA_terms = Doubles(size(N * E));
    g.dD = g.dbias = g.dD_terms = g.dbias_terms = Doubles(size(E));
    Doubles lambda(size(N * E));
    auto add = [](Doubles& sums, Doubles& terms, Index i, double x) {
        sums[size(i)] += x;
        terms[size(i)] += std::abs(x);
    };
    for (Index step = s.len - 1; step >= 0; step--) {
        const Index t = s.token(step), previous = s.token(step - 1);
        for (Index e = 0; e < E; e++) {
            const Index i = t * E + e;
            const double z = in.z[size(i)], gate = s.scale * (s.gate ? z * sigmoid(z) : 1),
                         gy = in.dout[size(i)] * gate;
            const double u = in.u[size(i)], delta = f.delta[size(i)];
            g.dz[size(i)] = in.dout[size(i)] * s.scale * f.ungated[size(i)] * sigmoid(z) * (1 + z * (1 - sigmoid(z)));
            double du = s.skip ? in.D[size(e)] * gy : 0, ddelta = 0;
            for (Index n = 0; n < N; n++) {
                const double A2 = in.A[size(n * E + e)], a = std::exp2(delta * A2), b = in.B[size(t * N + n)];
                const double before = step ? f.states[size((previous * N + n) * E + e)] : 0;
                double& l = lambda[size(n * E + e)];
                l += in.C[size(t * N + n)] * gy;
                add(g.dC, g.dC_terms, t * N + n, gy * f.states[size((t * N + n) * E + e)]);
                add(g.dB, g.dB_terms, t * N + n, l * delta * u);
                add(g.dA, g.dA_terms, n * E + e, l * delta * a * before);
                du += l * delta * b;
                ddelta += l * (b * u + A2 * std::log(2.0) * a * before);
                l *= a;
            }
            if (s.softplus && f.raw[size(i)] <= 20) ddelta *= sigmoid(f.raw[size(i)]);
            g.du[size(i)] = du;
            g.ddelta[size(i)] = ddelta;
            add(g.dD, g.dD_terms, e, gy * u);
            add(g.dbias, g.dbias_terms, e, ddelta);
        }
    }
    return g;
}

}  // namespace vimcore::cpu
