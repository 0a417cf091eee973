// SPDX-License-Identifier: Apache-2.0
// Vectors of float or double by the compiler's vector extensions, and the few functions the network needs of them. A
// vector of bf16 is one of float: it is converted where it is loaded and stored.
// Included once per instruction set inside its own namespace (VIM_ISA), with VIM_BYTES wide vectors. No standard
// headers: see kernels.h.
#pragma once

#if defined(__AVX512F__) && VIM_BYTES == 64
#define VIM_AVX512 1
#else
#define VIM_AVX512 0
#endif
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define VIM_INLINE static inline __attribute__((always_inline))
#define VIM_INLINE_LAMBDA __attribute__((always_inline))

namespace vimcore::cpu::VIM_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(VIM_BYTES)));
    typedef float U __attribute__((vector_size(VIM_BYTES), aligned(4), may_alias));
    typedef int I __attribute__((vector_size(VIM_BYTES)));
    static constexpr int lanes = VIM_BYTES / 4;
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VIM_BYTES)));
    typedef double U __attribute__((vector_size(VIM_BYTES), aligned(8), may_alias));
    typedef long long I __attribute__((vector_size(VIM_BYTES)));
    static constexpr int lanes = VIM_BYTES / 8;
};
template <>
struct Simd<bf16> : Simd<float> {
    typedef unsigned W __attribute__((vector_size(VIM_BYTES)));
    typedef unsigned UW __attribute__((vector_size(VIM_BYTES), aligned(4), may_alias));
    typedef unsigned short H __attribute__((vector_size(VIM_BYTES / 2)));
    typedef unsigned short U __attribute__((vector_size(VIM_BYTES / 2), aligned(2), may_alias));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
inline constexpr int lanes = Simd<T>::lanes;

template <class T>
inline constexpr bool narrow = sizeof(T) == 2;  // bf16

VIM_INLINE Vec<float> widen(Simd<bf16>::H v) { return (Vec<float>)(__builtin_convertvector(v, Simd<bf16>::W) << 16); }
VIM_INLINE Simd<bf16>::H rounded(Vec<float> v)
{
#if defined(__AVX512BF16__)
    return (Simd<bf16>::H)_mm512_cvtneps_pbh((__m512)v);
#else
    using W = Simd<bf16>::W;
    const W word = (W)v, nearest = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    return __builtin_convertvector(v != v ? word >> 16 | 64 : nearest, Simd<bf16>::H);
#endif
}

template <class T>
VIM_INLINE Vec<T> load(const T* p)
{
    if constexpr (narrow<T>)
        return widen(*reinterpret_cast<const Simd<bf16>::U*>(p));
    else
        return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
VIM_INLINE void store(T* p, Vec<T> v)
{
    if constexpr (narrow<T>)
        *reinterpret_cast<Simd<bf16>::U*>(p) = rounded(v);
    else
        *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}
template <class T>
VIM_INLINE Vec<T> splat(T a)
{
    return Wide<T>(a) - Vec<T>{};
}

// The first n < lanes elements; the others read as zero and are not written.
template <class T>
VIM_INLINE Vec<T> load(const T* p, Index n)
{
#if VIM_AVX512
    if constexpr (narrow<T>)
        return widen((Simd<bf16>::H)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
    else if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    else
        return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
    T part[lanes<T>] = {};
    for (Index i = 0; i < n; i++) part[i] = p[i];
    return load<T>(part);
#endif
}
template <class T>
VIM_INLINE void store(T* p, Vec<T> v, Index n)
{
#if VIM_AVX512
    if constexpr (narrow<T>)
        _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)rounded(v));
    else if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    else
        _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else
    for (Index i = 0; i < n; i++) p[i] = T(v[i]);
#endif
}
template <class T>
VIM_INLINE void prefetch(const T* p)
{
    __builtin_prefetch(p);
}

// The same for any n <= lanes.
template <class T>
VIM_INLINE Vec<T> load_upto(const T* p, Index n)
{
    return n < lanes<T> ? load<T>(p, n) : load<T>(p);
}
template <class T>
VIM_INLINE void store_upto(T* p, Vec<T> v, Index n)
{
    if (n < lanes<T>)
        store<T>(p, v, n);
    else
        store<T>(p, v);
}

// a b + c and a b - c, rounded once where the machine has it. Spelled out where a sum has two products, because the
// compiler's choice between them must not differ from one copy of the code to the next.
template <class V>
VIM_INLINE V fma(V a, V b, V c)
{
#if VIM_AVX512
    if constexpr (sizeof(a[0]) == 4)
        return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else
        return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__) && VIM_BYTES == 32
    if constexpr (sizeof(a[0]) == 4)
        return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else
        return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__) && VIM_BYTES == 16
    if constexpr (sizeof(a[0]) == 4)
        return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
        return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}
template <class V>
VIM_INLINE V fms(V a, V b, V c)
{
    return fma(a, b, -c);
}

// Both keep a NaN in a, as the machine's instructions do with a as their second operand.
template <class V>
VIM_INLINE V at_least(V a, V low)
{
#if VIM_AVX512
    if constexpr (sizeof(a[0]) == 4) return (V)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)a);
#elif defined(__FMA__) && VIM_BYTES == 32
    if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)low, (__m256)a);
#endif
    return a < low ? low : a;
}
template <class V>
VIM_INLINE V at_most(V a, V high)
{
#if VIM_AVX512
    if constexpr (sizeof(a[0]) == 4) return (V)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)a);
#elif defined(__FMA__) && VIM_BYTES == 32
    if constexpr (sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)high, (__m256)a);
#endif
    return a > high ? high : a;
}
template <class V>
VIM_INLINE V magnitude(V a)
{
    return at_least(a, -a);
}

template <class T>
VIM_INLINE T sum(Vec<T> v)  // pairwise, fixed order
{
    T part[lanes<T>];
    store<T>(part, v);
    for (int width = lanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

// Sums across lanes of `lanes` vectors at once: element i of the result is the sum of rows[i]. At each level element i
// takes the two halves that differ in bit `Bit` from the row whose number has that bit as i has it.
template <int... I>
struct Places {};
template <int N, int... I>
struct MakePlaces : MakePlaces<N - 1, N - 1, I...> {};
template <int... I>
struct MakePlaces<0, I...> {
    using type = Places<I...>;
};

template <class T, int Bit, int... I>
VIM_INLINE Vec<T> fold_pair(Vec<T> a, Vec<T> b, Places<I...>)
{
    return __builtin_shufflevector(a, b, ((I & ~Bit) + (I & Bit ? lanes<T> : 0))...) +
           __builtin_shufflevector(a, b, ((I | Bit) + (I & Bit ? lanes<T> : 0))...);
}
template <class T, int Bit>
VIM_INLINE Vec<T> fold(const T* const* rows, int first)
{
    if constexpr (Bit == lanes<T>)
        return load<T>(rows[first]);
    else
        return fold_pair<T, Bit>(fold<T, 2 * Bit>(rows, first), fold<T, 2 * Bit>(rows, first + Bit),
                                 typename MakePlaces<lanes<T>>::type{});
}
template <class T>
VIM_INLINE Vec<T> sum_rows(const T* const* rows)
{
    return fold<T, 1>(rows, 0);
}

}  // namespace vimcore::cpu::VIM_ISA

#include "simd_math.h"
