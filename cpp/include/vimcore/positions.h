// SPDX-License-Identifier: Apache-2.0
// Where tokens stand: rows of a position table, the table for another grid of patches, rotation tables.
#pragma once

#include <cstdint>

#include "vimcore/config.h"
#include "vimcore/ops.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// Rows of a position table for `patches` patches that belong to class tokens, ascending; -1: none. A random class
// token's row is the first; in training it takes the row of the place where it stands.
struct ClassRows {
    std::int64_t row[2] = {-1, -1};
};
ClassRows class_rows(ClassToken token, std::int64_t patches);

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
