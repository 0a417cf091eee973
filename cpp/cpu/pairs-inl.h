// SPDX-License-Identifier: Apache-2.0
// Pairs of bf16 in 32-bit words, the earlier in the lower half, and the sum of their products:
//   dot(sum, a, b) = (sum + a_odd b_odd) + a_even b_even, rounded after each of the two
// in one instruction where the machine has it, otherwise in plain arithmetic.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

typedef unsigned Word __attribute__((may_alias));
using PairWords = Simd<bf16>::W;
using UnalignedPairs = Simd<bf16>::UW;

VIM_INLINE Vec<float> dot(Vec<float> sum, PairWords a, PairWords b)
{
#if defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = fma((Vec<float>)(a & 0xffff0000u), (Vec<float>)(b & 0xffff0000u), sum);
    return fma((Vec<float>)(a << 16), (Vec<float>)(b << 16), sum);
#endif
}

VIM_INLINE PairWords load_words(const Word* p, Index n)  // the first n
{
    return (PairWords)load_upto<float>(reinterpret_cast<const float*>(p), n);
}
VIM_INLINE unsigned pair_at(const bf16* p)
{
    unsigned word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}
VIM_INLINE unsigned pair_of(bf16 even, bf16 odd) { return even.bits | unsigned(odd.bits) << 16; }

VIM_INLINE Index pairs_of(Index k) { return (k + 1) / 2; }

}  // namespace vimcore::cpu::VIM_ISA
