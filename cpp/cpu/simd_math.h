// SPDX-License-Identifier: Apache-2.0
// exp, 2^x, sigmoid, SiLU and softplus of vectors. float: own polynomials, within 5 ulp; double is for checking and
// takes the C library's functions lane by lane. A NaN stays a NaN. Included by simd.h.
//
// 2^x is 2^n p(r) with n the nearest multiple of a step and p a polynomial with p(0) = 1. Adding `round_to` rounds x to
// the step and leaves n in the low bits of the mantissa. Where a permutation looks up a vector's worth of 2^(j step),
// the step is 1/32 (AVX-512, two registers) or 1/8 (AVX2) and p is short; elsewhere it is 1.
#pragma once

namespace vimcore::cpu::VIM_ISA {

#if VIM_AVX512
inline constexpr float round_to = 393216.0f;  // 1.5 * 2^18
alignas(64) static const float exp2_table[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// 2^n e^r or, not natural, 2^n 2^r. scalef takes the floor of n, the table its fraction.
template <bool natural>
VIM_INLINE Vec<float> exp2_scale(Vec<float> shifted, Vec<float> n, Vec<float> r)
{
    const Vec<float> part = (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(exp2_table), (__m512i)shifted,
                                                               _mm512_load_ps(exp2_table + 16));
    const Vec<float> p =
        fma(r, splat(natural ? 0.49999997f : 0.240226492f), splat(natural ? 1.00001466f : 0.693157315f));
    return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)fma(p * r, part, part), (__m512)n);
}
#elif defined(__FMA__) && VIM_BYTES == 32
inline constexpr float round_to = 1572991.0f;  // 1.5 * 2^20 + 127: the low bits of x + round_to are 8 (n + 127)
alignas(32) static const int exp2_table[8] = {0,        0xb95c2,  0x1837f0, 0x25fed7,
                                              0x3504f3, 0x45672a, 0x5744fd, 0x6ac0c7};  // mantissas of 2^(j/8)

template <bool natural>
VIM_INLINE Vec<float> exp2_scale(Vec<float> shifted, Vec<float>, Vec<float> r)
{
    using Int = Simd<float>::I;
    const Int bits = (Int)shifted;
    const Int part = (Int)_mm256_permutevar8x32_epi32(*reinterpret_cast<const __m256i*>(exp2_table), (__m256i)bits);
    Vec<float> p = fma(r, splat(natural ? 0.166642979f : 0.0554962233f), splat(natural ? 0.50006479f : 0.240257636f));
    p = fma(p, r, splat(natural ? 1.0f : 0.693147242f));
    return fma(p, r, splat(1.0f)) * (Vec<float>)(part + ((bits & -8) << 20));
}
#else
inline constexpr float round_to = 12583039.0f;  // 1.5 * 2^23 + 127: the low bits of x + round_to are n + 127

template <bool natural>
VIM_INLINE Vec<float> exp2_scale(Vec<float> shifted, Vec<float>, Vec<float> r)
{
    Vec<float> p =
        fma(r, splat(natural ? 8.29031505e-3f : 1.32647273e-3f), splat(natural ? 4.18979302e-2f : 9.67151299e-3f));
    p = fma(p, r, splat(natural ? 1.66676357e-1f : 5.55073358e-2f));
    p = fma(p, r, splat(natural ? 4.99991506e-1f : 2.40222424e-1f));
    p = fma(p, r, splat(natural ? 9.99999702e-1f : 6.93147004e-1f));
    return fma(p, r, splat(1.0f)) * (Vec<float>)((Simd<float>::I)shifted << 23);
}
#endif

// 2^(d a) for d a <= 127, relative error 2e-7 and that of d a; exactly 1 where d a is 0. Below -126 the result is at
// most 2^-126, from -150 on it is 0, also where d a overflows.
//
// AVX-512 needs no clamp until the square of the remainder, which is up to 2^-24 |d a|, overflows: callers ask once for
// many d and a whether one of them is `far`, and take the clamp with those only. The bits are the same with both.
#if VIM_AVX512
template <class T>
inline constexpr bool exp2_has_far = sizeof(T) <= 4;
#else
template <class T>
inline constexpr bool exp2_has_far = false;
#endif

// Whether |d a| passes 2^80, or what decay_of takes for bf16, for one of the vectors d[0, count) and some a in
// [-largest, largest].
template <class T>
VIM_INLINE bool exp2_is_far([[maybe_unused]] const Wide<T>* d, [[maybe_unused]] Index count,
                            [[maybe_unused]] Vec<T> largest)
{
#if VIM_AVX512
    if constexpr (exp2_has_far<T>) {
        Vec<T> reach{};
        for (Index s = 0; s < count; s++) reach = at_least(reach, magnitude(load<Wide<T>>(d + s * lanes<T>)));
        const float most = narrow<T> ? 126.0f : 0x1p80f;
        return _mm512_cmp_ps_mask((__m512)(reach * largest), _mm512_set1_ps(most), _CMP_GT_OQ) != 0;
    }
#endif
    return false;
}

template <bool far>
VIM_INLINE Vec<float> exp2_product(Vec<float> d, Vec<float> a)
{
#if VIM_AVX512
    const Vec<float> shifted = fma(d, a, splat(round_to)), n = shifted - round_to;
    Vec<float> r = fms(d, a, n);
    if constexpr (far) r = at_most(at_least(r, splat(-1.0f)), splat(1.0f));
    return exp2_scale<false>(shifted, n, r);
#else
    // the bits of 2^-127 are those of 0
    const Vec<float> x = at_least(d * a, splat(-127.0f)), shifted = x + round_to, n = shifted - round_to;
    return exp2_scale<false>(shifted, n, x - n);
#endif
}
template <bool>
VIM_INLINE Vec<double> exp2_product(Vec<double> d, Vec<double> a)
{
    d *= a;
    for (int i = 0; i < lanes<double>; i++) d[i] = __builtin_exp2(d[i]);
    return d;
}

// Any x; results stay in [1.2e-38, 8.3e37].
VIM_INLINE Vec<float> exp(Vec<float> x)
{
    x = at_most(at_least(x, splat(-87.3f)), splat(87.3f));
    const Vec<float> shifted = fma(x, splat(1.44269504f), splat(round_to)), n = shifted - round_to;
    // r = x - n ln 2, with ln 2 in two parts, n times the first being exact
    const Vec<float> r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    return exp2_scale<true>(shifted, n, r);
}
VIM_INLINE Vec<double> exp(Vec<double> x)
{
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_exp(x[i]);
    return x;
}

// a / b for b in [1, 2^126]: the divider takes 16 cycles, an approximation and one Newton step 5.
template <class V>
VIM_INLINE V quotient(V a, V b)
{
#if VIM_AVX512
    if constexpr (sizeof(a[0]) == 4) {
        const V r = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
        return a * fma(r, fma(-b, r, splat(1.0f)), r);
    }
#endif
    return a / b;
}

template <class V>
VIM_INLINE V sigmoid(V x)
{
    return quotient(V{} + 1, 1 + exp(-x));
}
template <class V>
VIM_INLINE V silu(V x)
{
    return quotient(x, 1 + exp(-x));
}
template <class V>
VIM_INLINE V silu_gradient(V x)
{
    V s = sigmoid(x);
    return s * (1 + x * (1 - s));
}

// log(1 + y) of y in [0, 1], relative error 1e-7.
VIM_INLINE Vec<float> log1p_unit(Vec<float> y)
{
    Vec<float> p = fma(y, splat(5.36482641e-3f), splat(-3.0065801e-2f));
    p = fma(p, y, splat(7.92045519e-2f));
    p = fma(p, y, splat(-1.37538031e-1f));
    p = fma(p, y, splat(1.91536561e-1f));
    p = fma(p, y, splat(-2.48571634e-1f));
    p = fma(p, y, splat(3.3321324e-1f));
    p = fma(p, y, splat(-4.99996483e-1f));
    return fma(p * y, y, y);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|).
VIM_INLINE Vec<float> softplus(Vec<float> x) { return at_least(x, splat(0.0f)) + log1p_unit(exp(at_most(x, -x))); }
// The same, and its derivative: sigmoid(x), 1 above 20.
VIM_INLINE Vec<float> softplus(Vec<float> x, Vec<float>& slope)
{
    const Vec<float> y = exp(at_most(x, -x));
    slope = quotient(x < 0 ? y : splat(1.0f), 1 + y);
    return at_least(x, splat(0.0f)) + log1p_unit(y);
}
VIM_INLINE Vec<double> softplus(Vec<double> x)
{
    for (int i = 0; i < lanes<double>; i++) x[i] = x[i] <= 20 ? __builtin_log1p(__builtin_exp(x[i])) : x[i];
    return x;
}
VIM_INLINE Vec<double> softplus(Vec<double> x, Vec<double>& slope)
{
    slope = x > 20 ? splat(1.0) : sigmoid(x);
    return softplus(x);
}

// ---- as exact as a result of T needs -------------------------------------------------------------------------------
// What ends in bf16, whose rounding is 2e-3, is computed within 1e-5 of itself (SiLU: 1e-4) in as few instructions as
// that takes. 2^x keeps p(0) = 1 and its first two derivatives: the decay of a long memory is close to 1, and an error
// in what is missing to 1 would change how long it is.
#if VIM_AVX512
alignas(64) static const int brief_table[16] = {// bits of 2^(j/16), less j << 19
                                                0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                                0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                                0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

// 2^x for x in [-126, 127], relative error 2e-6. Sums and shifts go where the machine multiplies nothing.
VIM_INLINE Vec<float> brief_exp2(Vec<float> x)
{
    constexpr float to_sixteenths = 786432.0f;  // 1.5 * 2^19
    asm("" : "+v"(x));                          // else the compiler multiplies once more instead of adding
    const Vec<float> shifted = x + to_sixteenths, r = x - (shifted - to_sixteenths);
    const __m512i bits = (__m512i)shifted;
    const Vec<float> scale =
        (Vec<float>)_mm512_add_epi32(_mm512_maskz_permutexvar_epi32(0xffff, bits, _mm512_load_si512(brief_table)),
                                     _mm512_maskz_slli_epi32(0xffff, bits, 19));
    return fma(scale * r, fma(r, splat(0.2402265f), splat(0.69314718f)), scale);
}
VIM_INLINE Vec<float> brief_reciprocal(Vec<float> x) { return (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x); }
VIM_INLINE Vec<float> brief_sigmoid(Vec<float> x)
{
    const Vec<float> y = at_most(at_least(x * -1.44269504f, splat(-126.0f)), splat(126.0f));
    return brief_reciprocal(1 + brief_exp2(y));
}
// log(1 + e^x), and its derivative.
VIM_INLINE Vec<float> brief_softplus(Vec<float> x, Vec<float>& slope)
{
    const Vec<float> down = (Vec<float>)((Simd<float>::I)x | (int)0x80000000);
    const Vec<float> y = brief_exp2(at_least(down * 1.44269504f, splat(-126.0f)));
    slope = (x < 0 ? y : splat(1.0f)) * brief_reciprocal(1 + y);
    Vec<float> p = fma(y, splat(-2.38688812e-2f), splat(1.01221643e-1f));  // log(1 + y) / y, relative error 8e-6
    p = fma(p, y, splat(-2.10048169e-1f));
    p = fma(p, y, splat(3.25206518e-1f));
    p = fma(p, y, splat(-4.99361336e-1f));
    p = fma(p, y, splat(9.99991596e-1f));
    return fma(p, y, at_least(x, splat(0.0f)));
}
#endif

template <class T>
inline constexpr bool brief = narrow<T> && VIM_AVX512;

template <class T>
VIM_INLINE Vec<T> silu_of(Vec<T> x)
{
#if VIM_AVX512
    if constexpr (brief<T>) return x * brief_sigmoid(x);
#endif
    return silu(x);
}
template <class T>
VIM_INLINE Vec<T> silu_gradient_of(Vec<T> x)
{
#if VIM_AVX512
    if constexpr (brief<T>) {
        const Vec<float> s = brief_sigmoid(x);
        return s * (1 + x * (1 - s));
    }
#endif
    return silu_gradient(x);
}
template <class T>
VIM_INLINE Vec<T> softplus_of(Vec<T> x, Vec<T>& slope)
{
#if VIM_AVX512
    if constexpr (brief<T>) return brief_softplus(x, slope);
#endif
    return softplus(x, slope);
}
template <class T>
VIM_INLINE Vec<T> softplus_of(Vec<T> x)
{
#if VIM_AVX512
    Vec<float> slope;
    if constexpr (brief<T>) return brief_softplus(x, slope);
#endif
    return softplus(x);
}
template <class T, bool far>
VIM_INLINE Vec<T> decay_of(Vec<T> d, Vec<T> a)
{
#if VIM_AVX512
    if constexpr (brief<T>) return brief_exp2(far ? at_least(d * a, splat(-126.0f)) : d * a);
#endif
    return exp2_product<far>(d, a);
}

}  // namespace vimcore::cpu::VIM_ISA
