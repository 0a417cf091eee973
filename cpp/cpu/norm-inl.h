// SPDX-License-Identifier: Apache-2.0
// Residual add and normalisation of rows of `dim` elements.
//   forward   x = residual + row_scale h;  xhat = (x - mean) rstd;  out = weight xhat + bias   (RMSNorm: mean = 0, no
//   bias)
//             rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//   backward  g = weight dout;  dx = rstd (g - mean(g) - xhat mean(g xhat)) + dresidual_out    (RMSNorm: no mean(g))
//             dweight += dout xhat;  dbias += dout;  dh = row_scale dx
// The statistics are computed again in backward. Rows are independent; the caller splits them, and a row is read a
// second time from the first-level cache.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

VIM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
VIM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Calls f(q, i, n) for vectors of n elements at i; q cycles through four accumulators, in the same way for a given dim.
template <class T, class F>
VIM_INLINE void each_vector(Index dim, F f)
{
    constexpr Index L = lanes<T>;
    Index i = 0;
    for (; i + 4 * L <= dim; i += 4 * L) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) f(q, i + q * L, L);
    }
    for (int q = 0; i < dim; i += L, q++) f(q, i, dim - i < L ? dim - i : L);
}

template <class T>
VIM_INLINE T sum4(const Vec<T> (&v)[4])
{
    return sum<T>((v[0] + v[1]) + (v[2] + v[3]));
}

template <class T>
struct RowStatistics {
    T mean, rstd;
};

// at(i, n): the n numbers at i of a row of x.
template <class T, class At>
VIM_INLINE RowStatistics<T> row_statistics(At at, Index dim, T eps, bool layer)
{
    T mean = 0;
    if (layer) {
        Vec<T> total[4] = {};
        each_vector<T>(dim, [&](int q, Index i, Index n) VIM_INLINE_LAMBDA { total[q] += at(i, n); });
        mean = sum4<T>(total) / T(dim);
    }
    Vec<T> squares[4] = {};
    each_vector<T>(dim, [&](int q, Index i, Index n) VIM_INLINE_LAMBDA {
        Vec<T> d = at(i, n) - mean;
        if (n < lanes<T>) {  // the lanes beyond the row do not count
            T part[lanes<T>];
            store<T>(part, d);
            d = load<T>(part, n);
        }
        squares[q] += d * d;
    });
    return {mean, 1 / square_root(sum4<T>(squares) / T(dim) + eps)};
}

template <class T, class At>
VIM_INLINE void norm_row(const NormForwardArgs<T>& args, At at, T* out)
{
    using W = Wide<T>;
    const RowStatistics<W> of = row_statistics<W>(at, args.dim, args.eps, args.layer);
    const W mean = of.mean, rstd = of.rstd;
    each_vector<W>(args.dim, [&](int, Index i, Index n) VIM_INLINE_LAMBDA {
        Vec<W> value = (at(i, n) - mean) * rstd * load_upto<W>(args.weight + i, n);
        if (args.bias) value += load_upto<W>(args.bias + i, n);
        store_upto<T>(out + i, value, n);
    });
}

template <class T>
static void norm_forward(const NormForwardArgs<T>& args)
{
    using W = Wide<T>;
    const Index dim = args.dim;
    const W scale = args.row_scale;
    for (Index row = 0; row < args.len; row++) {
        const T* h = args.h ? args.h + row * dim : nullptr;
        const W* residual = args.residual ? args.residual + row * dim : nullptr;
        T* out = args.out + row * dim;
        W* x = args.residual_out ? args.residual_out + row * dim : nullptr;
        if constexpr (narrow<T>) {  // `out` is too narrow to keep x in it
            if (!x) {
                const auto sum = [&](Index i, Index n) VIM_INLINE_LAMBDA {
                    Vec<W> v = {};
                    if (h) v = scale * load_upto<T>(h + i, n);
                    return residual ? load_upto<W>(residual + i, n) + v : v;
                };
                norm_row<T>(args, sum, out);
                continue;
            }
        } else if (!x) {
            x = out;
        }
        if (h && residual)
            each_vector<W>(dim, [&](int, Index i, Index n) VIM_INLINE_LAMBDA {
                store_upto<W>(x + i, load_upto<W>(residual + i, n) + scale * load_upto<T>(h + i, n), n);
            });
        else if (h)
            each_vector<W>(dim, [&](int, Index i, Index n)
                                    VIM_INLINE_LAMBDA { store_upto<W>(x + i, scale * load_upto<T>(h + i, n), n); });
        else if (residual && x != residual)
            each_vector<W>(dim, [&](int, Index i, Index n)
                                    VIM_INLINE_LAMBDA { store_upto<W>(x + i, load_upto<W>(residual + i, n), n); });
        else if (!residual)
            each_vector<W>(dim, [&](int, Index i, Index n) VIM_INLINE_LAMBDA { store_upto<W>(x + i, Vec<W>{}, n); });
        norm_row<T>(args, [&](Index i, Index n) VIM_INLINE_LAMBDA { return load_upto<W>(x + i, n); }, out);
    }
}

template <class T>
static void norm_backward(const NormBackwardArgs<T>& args)
{
    using W = Wide<T>;
    const Index dim = args.dim;
    for (Index row = 0; row < args.len; row++) {
        const W* x = args.x + row * dim;
        const T* dout = args.dout + row * dim;
        const W* arriving = args.dresidual_out ? args.dresidual_out + row * dim : nullptr;
        W* dx = args.dresidual ? args.dresidual + row * dim : nullptr;
        T* dh = args.dh ? args.dh + row * dim : nullptr;
        const auto at = [&](Index i, Index n) VIM_INLINE_LAMBDA { return load_upto<W>(x + i, n); };
        const RowStatistics<W> of = row_statistics<W>(at, dim, args.eps, args.layer);
        const W mean = of.mean, rstd = of.rstd;

        Vec<W> with_xhat[4] = {}, alone[4] = {};
        each_vector<W>(dim, [&](int q, Index i, Index n) VIM_INLINE_LAMBDA {
            Vec<W> d = load_upto<T>(dout + i, n), xhat = (load_upto<W>(x + i, n) - mean) * rstd;
            Vec<W> g = d * load_upto<W>(args.weight + i, n);
            with_xhat[q] += g * xhat;
            alone[q] += g;
            if (args.dweight) store_upto<W>(args.dweight + i, load_upto<W>(args.dweight + i, n) + d * xhat, n);
            if (args.dbias) store_upto<W>(args.dbias + i, load_upto<W>(args.dbias + i, n) + d, n);
        });
        const W slope = sum4<W>(with_xhat) / W(dim), shift = args.layer ? sum4<W>(alone) / W(dim) : W(0);
        each_vector<W>(dim, [&](int, Index i, Index n) VIM_INLINE_LAMBDA {
            Vec<W> xhat = (load_upto<W>(x + i, n) - mean) * rstd;
            Vec<W> g = load_upto<T>(dout + i, n) * load_upto<W>(args.weight + i, n);
            Vec<W> d = rstd * (g - shift - xhat * slope);
            if (arriving) d += load_upto<W>(arriving + i, n);
            if (dx) store_upto<W>(dx + i, d, n);
            if (dh) store_upto<T>(dh + i, args.row_scale * d, n);
        });
    }
}

}  // namespace vimcore::cpu::VIM_ISA
