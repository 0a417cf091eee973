// SPDX-License-Identifier: Apache-2.0
// Units that multiply blocks of bf16: sums (rows, columns) += a (rows, depth) b (depth, columns), float32 sums. Each is
// written once over its instruction and, for machines and tests without it, over the same in plain arithmetic (the
// order of additions within an instruction, and its rounding, are the machine's own).
//   VIM_AMX     32 x 32 sums in four tiles; b in pairs: [depth / 2][columns][2]
//   VIM_BFMMLA  8 x 8 sums of 2 x 2 in sixteen registers; b in fours: [depth / 4][columns][4]
// Sums are zero() at first, add() takes one step of `depth`, store() writes them row by row.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

#if defined(VIM_AMX)

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // the latter is clang's until version 15
#define VIM_HAS_TILES
// Macros, because the compiler's intrinsics paste the number of a tile into the instruction. Strides are in bytes.
#define VIM_TILE_ZERO(t) _tile_zero(t)
#define VIM_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define VIM_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define VIM_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#else
struct EmulatedTile {
    unsigned word[16][16];
};
static thread_local EmulatedTile emulated_tiles[8];

VIM_INLINE void emulated_load(int t, const void* from, Index stride)
{
    for (int i = 0; i < 16; i++)
        __builtin_memcpy(emulated_tiles[t].word[i], static_cast<const char*>(from) + i * stride, 64);
}
VIM_INLINE void emulated_store(int t, void* to, Index stride)
{
    for (int i = 0; i < 16; i++) __builtin_memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[t].word[i], 64);
}
VIM_INLINE void emulated_dot(int c, int a, int b)
{
    const auto half = [](unsigned word, bool odd) VIM_INLINE_LAMBDA {
        return __builtin_bit_cast(float, odd ? word & 0xffff0000u : word << 16);
    };
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = __builtin_bit_cast(float, emulated_tiles[c].word[i][j]);
            for (int p = 0; p < 16; p++) {
                const unsigned left = emulated_tiles[a].word[i][p], right = emulated_tiles[b].word[p][j];
                sum += half(left, false) * half(right, false) + half(left, true) * half(right, true);
            }
            emulated_tiles[c].word[i][j] = __builtin_bit_cast(unsigned, sum);
        }
}
#define VIM_TILE_ZERO(t) emulated_tiles[t] = {}
#define VIM_TILE_LOAD(t, from, stride) emulated_load(t, from, stride)
#define VIM_TILE_STORE(t, to, stride) emulated_store(t, to, stride)
#define VIM_TILE_DOT(c, a, b) emulated_dot(c, a, b)
#endif

struct BlockUnit {
    static constexpr Index rows = 32, columns = 32, depth = 32, group = 2;

#if defined(VIM_HAS_TILES)
    // Whoever used tiles on this thread before may have shaped them otherwise.
    BlockUnit()
    {
        alignas(64) unsigned char shape[64] = {1};  // palette 1; for each tile bytes of a row, and rows
        for (int t = 0; t < 8; t++) {
            shape[16 + 2 * t] = 64;
            shape[48 + t] = 16;
        }
        _tile_loadconfig(shape);
    }
    ~BlockUnit() { _tile_release(); }
    BlockUnit(const BlockUnit&) = delete;
    BlockUnit& operator=(const BlockUnit&) = delete;
#endif

    __attribute__((always_inline)) inline void zero()
    {
        VIM_TILE_ZERO(0);
        VIM_TILE_ZERO(1);
        VIM_TILE_ZERO(2);
        VIM_TILE_ZERO(3);
    }
    __attribute__((always_inline)) inline void add(const bf16* a, Index stride, const bf16* b)
    {
        VIM_TILE_LOAD(4, a, 2 * stride);
        VIM_TILE_LOAD(6, b, 4 * columns);
        VIM_TILE_LOAD(7, b + columns, 4 * columns);
        VIM_TILE_DOT(0, 4, 6);
        VIM_TILE_LOAD(5, a + 16 * stride, 2 * stride);
        VIM_TILE_DOT(1, 4, 7);
        VIM_TILE_DOT(2, 5, 6);
        VIM_TILE_DOT(3, 5, 7);
    }
    __attribute__((always_inline)) inline void store(float* to) const
    {
        VIM_TILE_STORE(0, to, 4 * columns);
        VIM_TILE_STORE(1, to + 16, 4 * columns);
        VIM_TILE_STORE(2, to + 16 * columns, 4 * columns);
        VIM_TILE_STORE(3, to + 16 * columns + 16, 4 * columns);
    }
};

#elif defined(VIM_BFMMLA)

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
using Fours = bfloat16x8_t;  // two rows or columns of four
using Square = float32x4_t;  // their products: (0, 0), (0, 1), (1, 0), (1, 1)

VIM_INLINE Fours two_fours(const bf16* first, const bf16* second)
{
    const auto as_words = [](const bf16* p)
                              VIM_INLINE_LAMBDA { return vld1_u16(reinterpret_cast<const unsigned short*>(p)); };
    return vreinterpretq_bf16_u16(vcombine_u16(as_words(first), as_words(second)));
}
VIM_INLINE Square square_dot(Square sum, Fours a, Fours b) { return vbfmmlaq_f32(sum, a, b); }
#else
struct Fours {
    bf16 value[2][4];
};
struct Square {
    float value[4];
    float operator[](int i) const { return value[i]; }
};

VIM_INLINE Fours two_fours(const bf16* first, const bf16* second)
{
    Fours result;
    __builtin_memcpy(result.value[0], first, sizeof result.value[0]);
    __builtin_memcpy(result.value[1], second, sizeof result.value[1]);
    return result;
}
VIM_INLINE Square square_dot(Square sum, Fours a, Fours b)
{
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            for (int p = 0; p < 4; p += 2)
                sum.value[2 * i + j] +=
                    float(a.value[i][p]) * float(b.value[j][p]) + float(a.value[i][p + 1]) * float(b.value[j][p + 1]);
    return sum;
}
#endif

struct BlockUnit {
    static constexpr Index rows = 8, columns = 8, depth = 4, group = 4;
    Square sum[4][4];

    __attribute__((always_inline)) inline void zero()
    {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = Square{};
        }
    }
    __attribute__((always_inline)) inline void add(const bf16* a, Index stride, const bf16* b)
    {
        Fours right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = two_fours(b + 8 * j, b + 8 * j + 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const Fours left = two_fours(a + 2 * i * stride, a + (2 * i + 1) * stride);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = square_dot(sum[i][j], left, right[j]);
        }
    }
    __attribute__((always_inline)) inline void store(float* to) const
    {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                float* out = to + 2 * i * columns + 2 * j;
                out[0] = sum[i][j][0], out[1] = sum[i][j][1];
                out[columns] = sum[i][j][2], out[columns + 1] = sum[i][j][3];
            }
        }
    }
};

#endif

}  // namespace vimcore::cpu::VIM_ISA
