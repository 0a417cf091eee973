// SPDX-License-Identifier: Apache-2.0
// Where tokens stand: rows of a position table, the table for another grid of patches, rotation tables.
#pragma once

#include <cstdint>

#include "vimcore/config.h"
#include "vimcore/ops.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// Where class tokens stand in a sequence of `patches` patches, in eval: a random one at the head, registers one after
// each of the first of registers + 1 equal groups of patches.
ClassPlaces class_places(ClassToken token, std::int64_t patches, std::int64_t registers = 0);

// The rows of a position table for `patches` patches that are those of class tokens: they stand as in the sequence. A
// random class token's row is the first; in training it takes the row of the place where it stands. Registers have a
// table of their own.
ClassPlaces table_places(ClassToken token, std::int64_t patches);

// How a table comes to another grid:
//   correct   the rows of class tokens are taken out, the others resized, and put back in their new places
//   authors   as published: the first rows are kept as if the class tokens stood there, the others resized. The same
//             for a token at the head and for none
enum class TableWay : std::uint8_t { correct, authors };
TableResize table_resize(ClassToken token, Grid from, Grid to, TableWay way = TableWay::correct);

// RoPE's cosines and sines (patches, D), f32 or f64 in the host's memory. Patch (row, column) turns the pairs j of the
// first half by row / rows rope_grid f, those of the second by column / columns rope_grid f, f = 10000^(-2j / (D / 2)).
void rope_tables(Grid grid, std::int64_t rope_grid, const Tensor& cos, const Tensor& sin);

}  // namespace vimcore
