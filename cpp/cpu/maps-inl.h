// SPDX-License-Identifier: Apache-2.0
// Rows of maps (pixels of `channels` numbers) for the heads of dense tasks: activations, linear interpolation, the
// class of every pixel.
//   blend    out = a + part (b - a)
//   stretch  out[x] = row[left[x]] + part[x] (row[right[x]] - row[left[x]])  [+ out[x]]
//   arg_max  out[x] = the first largest channel of the pixel that stretch gives
// Parallel mapping: callers split rows.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

template <class T>
static void relu(T* y, Index count)
{
    Index i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) store<T>(y + i, at_least(load<T>(y + i), Vec<T>{}));
    for (; i < count; i++) y[i] = y[i] < 0 ? 0 : y[i];
}

// erf(x), within 2e-7 (Abramowitz and Stegun, 7.1.26).
VIM_INLINE Vec<float> erf(Vec<float> x)
{
    const Vec<float> a = magnitude(x), t = 1 / fma(a, splat(0.3275911f), splat(1.0f));
    Vec<float> p = fma(t, splat(1.061405429f), splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const Vec<float> value = 1 - p * t * exp(-a * a);
    return x < 0 ? -value : value;
}
VIM_INLINE Vec<double> erf(Vec<double> x)
{
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_erf(x[i]);
    return x;
}

template <class T>
static void gelu(T* y, Index count)
{
    const Vec<T> root = splat(T(0.70710678118654752440)), half = splat(T(0.5));
    for (Index i = 0; i < count; i += lanes<T>) {
        const Index n = count - i < lanes<T> ? count - i : lanes<T>;
        const Vec<T> x = load_upto<T>(y + i, n);
        store_upto<T>(y + i, half * x * (1 + erf(x * root)), n);
    }
}

template <class T>
static void blend(const T* a, const T* b, T part, T* out, Index count)
{
    const Vec<T> weight = splat(part);
    for (Index i = 0; i < count; i += lanes<T>) {
        const Index n = count - i < lanes<T> ? count - i : lanes<T>;
        const Vec<T> first = load_upto<T>(a + i, n);
        store_upto<T>(out + i, fma(weight, load_upto<T>(b + i, n) - first, first), n);
    }
}

template <class T>
static void stretch(const StretchArgs<T>& args)
{
    for (Index x = 0; x < args.columns; x++) {
        const T *left = args.row + args.left[x] * args.channels, *right = args.row + args.right[x] * args.channels;
        const Vec<T> part = splat(args.part[x]);
        T* out = args.out + x * args.pixel;
        for (Index c = 0; c < args.channels; c += lanes<T>) {
            const Index n = args.channels - c < lanes<T> ? args.channels - c : lanes<T>;
            const Vec<T> first = load_upto<T>(left + c, n);
            Vec<T> value = fma(part, load_upto<T>(right + c, n) - first, first);
            if (args.add) value += load_upto<T>(out + c, n);
            store_upto<T>(out + c, value, n);
        }
    }
}

template <class T>
static void arg_max(const StretchArgs<T>& args, unsigned char* out)
{
    using Int = typename Simd<T>::I;
    Int first{};
    for (int i = 0; i < lanes<T>; i++) first[i] = i;
    for (Index x = 0; x < args.columns; x++) {
        const T *left = args.row + args.left[x] * args.channels, *right = args.row + args.right[x] * args.channels;
        const Vec<T> part = splat(args.part[x]);
        Vec<T> best = splat(T(-__builtin_inf()));
        Int where{}, at = first;
        for (Index c = 0; c < args.channels; c += lanes<T>, at += lanes<T>) {
            const Index n = args.channels - c < lanes<T> ? args.channels - c : lanes<T>;
            const Vec<T> a = load_upto<T>(left + c, n);
            Vec<T> value = fma(part, load_upto<T>(right + c, n) - a, a);
            if (n < lanes<T>)
                for (Index i = n; i < lanes<T>; i++) value[i] = T(-__builtin_inf());
            const Int larger = value > best;
            best = larger ? value : best;
            where = larger ? at : where;
        }
        int lane = 0;
        for (int i = 1; i < lanes<T>; i++)
            if (best[i] > best[lane] || (best[i] == best[lane] && where[i] < where[lane])) lane = i;
        out[x] = static_cast<unsigned char>(where[lane]);
    }
}

}  // namespace vimcore::cpu::VIM_ISA
