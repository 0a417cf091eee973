// SPDX-License-Identifier: Apache-2.0
// Vectors of float or double by the compiler's vector extensions, and the few functions the network needs of them.
// Included once per instruction set inside its own namespace (VIM_ISA), with VIM_BYTES wide vectors. No standard
// headers: see kernels.h.
#pragma once

#if defined(__AVX512F__) && VIM_BYTES == 64
#define VIM_AVX512 1
#include <immintrin.h>
#else
#define VIM_AVX512 0
#endif

#include "kernels.h"

#define VIM_INLINE static inline __attribute__((always_inline))

namespace vimcore::cpu::VIM_ISA {

template <class T> struct Simd;
template <> struct Simd<float> {
    typedef float V __attribute__((vector_size(VIM_BYTES)));
    typedef float U __attribute__((vector_size(VIM_BYTES), aligned(4), may_alias));
    typedef int I __attribute__((vector_size(VIM_BYTES)));
    static constexpr int lanes = VIM_BYTES / 4;
};
template <> struct Simd<double> {
    typedef double V __attribute__((vector_size(VIM_BYTES)));
    typedef double U __attribute__((vector_size(VIM_BYTES), aligned(8), may_alias));
    typedef long long I __attribute__((vector_size(VIM_BYTES)));
    static constexpr int lanes = VIM_BYTES / 8;
};
template <class T> using Vec = typename Simd<T>::V;
template <class T> inline constexpr int lanes = Simd<T>::lanes;

template <class T> VIM_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const typename Simd<T>::U*>(p); }
template <class T> VIM_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename Simd<T>::U*>(p) = v; }
template <class T> VIM_INLINE Vec<T> splat(T a) { return a - Vec<T>{}; }

// The first n < lanes elements; the others read as zero and are not written.
template <class T> VIM_INLINE Vec<T> load(const T* p, Index n)
{
#if VIM_AVX512
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    else return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
    T part[lanes<T>] = {};
    for (Index i = 0; i < n; i++) part[i] = p[i];
    return load<T>(part);
#endif
}
template <class T> VIM_INLINE void store(T* p, Vec<T> v, Index n)
{
#if VIM_AVX512
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else
    for (Index i = 0; i < n; i++) p[i] = v[i];
#endif
}
// The same for any n <= lanes.
template <class T> VIM_INLINE Vec<T> load_upto(const T* p, Index n) { return n < lanes<T> ? load<T>(p, n) : load<T>(p); }
template <class T> VIM_INLINE void store_upto(T* p, Vec<T> v, Index n)
{
    if (n < lanes<T>) store<T>(p, v, n);
    else store<T>(p, v);
}

// Both keep a NaN in a.
template <class V> VIM_INLINE V at_least(V a, V low) { return a < low ? low : a; }
template <class V> VIM_INLINE V at_most(V a, V high) { return a > high ? high : a; }

template <class T> VIM_INLINE T sum(Vec<T> v)  // pairwise, fixed order
{
    T part[lanes<T>];
    store<T>(part, v);
    for (int width = lanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

// 2^x for x <= 128, relative error below 1 ulp; results under 2^-126 may be flushed to it. exp2(0) == 1. NaN stays NaN.
VIM_INLINE Vec<float> exp2(Vec<float> x)
{
#if VIM_AVX512
    Vec<float> n = (Vec<float>)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec<float> r = x - n;
#else
    x = at_least(x, splat(-126.0f));
    const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: the low mantissa bits of x + magic are round(x)
    Vec<float> shifted = x + magic;
    Vec<float> r = x - (shifted - magic);
#endif
    Vec<float> p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332548e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
#if VIM_AVX512
    return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    return p * (Vec<float>)(((Simd<float>::I)shifted << 23) + 0x3f800000);
#endif
}
VIM_INLINE Vec<double> exp2(Vec<double> x)  // float64 is for checking: the C library's function, lane by lane
{
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_exp2(x[i]);
    return x;
}

// 2^(d a), the decay of a state: the product is rounded once, inside the range reduction.
VIM_INLINE Vec<float> exp2_product(Vec<float> d, Vec<float> a) { return exp2(d * a); }
VIM_INLINE Vec<double> exp2_product(Vec<double> d, Vec<double> a) { return exp2(d * a); }

VIM_INLINE Vec<float> exp(Vec<float> x)  // any x
{
    x = at_most(at_least(x, splat(-87.3f)), splat(88.3f));
    // x log2(e) in two parts, so that the product's rounding does not reach the result
    Vec<float> high = x * 1.44269504f;
    Vec<float> low = x * 1.44269504f - high;  // contracted to one fused multiply-add where there is one
    low = low + x * 1.92596299e-8f;
    Vec<float> p = exp2(high);
    return p + p * (low * 0.693147181f);
}
VIM_INLINE Vec<double> exp(Vec<double> x)
{
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_exp(x[i]);
    return x;
}

template <class V> VIM_INLINE V sigmoid(V x) { return 1 / (1 + exp(-x)); }
template <class V> VIM_INLINE V silu(V x) { return x / (1 + exp(-x)); }
template <class V> VIM_INLINE V silu_gradient(V x)
{
    V s = sigmoid(x);
    return s * (1 + x * (1 - s));
}

// log(1 + e^x) for x <= 20, x above. For y = e^-|x| in (0, 1]: log(1 + y) = 2 atanh(y / (2 + y)).
VIM_INLINE Vec<float> softplus(Vec<float> x)
{
    Vec<float> y = exp(x < 0 ? x : -x);
    Vec<float> s = y / (y + 2), t = s * s;
    Vec<float> p = t * 0.0769230769f + 0.0909090909f;
    p = p * t + 0.111111111f;
    p = p * t + 0.142857143f;
    p = p * t + 0.2f;
    p = p * t + 0.333333333f;
    p = p * t + 1.0f;
    return at_least(x, splat(0.0f)) + 2 * s * p;
}
VIM_INLINE Vec<double> softplus(Vec<double> x)
{
    for (int i = 0; i < lanes<double>; i++) x[i] = x[i] <= 20 ? __builtin_log1p(__builtin_exp(x[i])) : x[i];
    return x;
}
// Its derivative: sigmoid(x), 1 above 20.
template <class T> VIM_INLINE Vec<T> softplus_gradient(Vec<T> x)
{
    Vec<T> s = sigmoid(x);
    return x > 20 ? splat(T(1)) : s;
}

}  // namespace vimcore::cpu::VIM_ISA
