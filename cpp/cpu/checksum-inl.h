// SPDX-License-Identifier: Apache-2.0
// A checksum of memory, to see whether weights were written to since their packed forms were made.
//
//   state[i % 64] = rotate_left(state[i % 64] ^ word[i], 13) * 0x9e3779b1     for the 32-bit words i = 0, 1, ...
//
// Every step is a bijection of the state, so one changed word changes the result for certain, and so does any change
// within one of the 64 lanes but for one in 2^32. The rotation brings a changed sign, which the product alone would
// leave in the top bit, where a second one undoes it, down to the others. Equal on all instruction sets.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

typedef unsigned Words __attribute__((vector_size(VIM_BYTES)));
typedef unsigned UnalignedWords __attribute__((vector_size(VIM_BYTES), aligned(4), may_alias));

// bytes: a multiple of 4. What is missing of the last 64 words counts as zero.
static void checksum(const void* data, Index bytes, unsigned* state)
{
    constexpr int lanes = VIM_BYTES / 4, vectors = checksum_lanes / lanes;
    Words sums[vectors];
    for (int v = 0; v < vectors; v++) sums[v] = *reinterpret_cast<const UnalignedWords*>(state + v * lanes);
    const auto add = [&](const unsigned* words) VIM_INLINE_LAMBDA {
        for (int v = 0; v < vectors; v++) {
            const Words x = sums[v] ^ *reinterpret_cast<const UnalignedWords*>(words + v * lanes);
            sums[v] = (x << 13 | x >> 19) * 0x9e3779b1u;
        }
    };
    const unsigned* words = static_cast<const unsigned*>(data);
    Index count = bytes / 4;
    for (; count >= checksum_lanes; count -= checksum_lanes, words += checksum_lanes) add(words);
    if (count > 0) {
        unsigned last[checksum_lanes] = {};
        for (Index i = 0; i < count; i++) last[i] = words[i];
        add(last);
    }
    for (int v = 0; v < vectors; v++) *reinterpret_cast<UnalignedWords*>(state + v * lanes) = sums[v];
}

}  // namespace vimcore::cpu::VIM_ISA
