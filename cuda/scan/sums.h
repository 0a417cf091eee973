// SPDX-License-Identifier: Apache-2.0
// Sums of what the blocks of a scan's backward leave behind, in one order whatever the blocks' own.
#pragma once

#include <span>

#include "launch.h"

namespace vimcore::cuda {

// to[e, row] = sum_i part[i, row, e], times -exp(A_log[e, row]) where A_log is there; part (count, ..., E) with
// `stride` elements from i to i + 1; to (E, rows) is added to, or overwritten.
struct PartialSum {
    const float* part;
    Index count, stride, rows, dim;
    const float* A_log;
    float* to;
    bool overwrite;
};
void add_partials(Context& ctx, std::span<const PartialSum> sums);  // 8 at most; those without `to` are left out

// The sums over groups of channels of rows of `width` elements: part (B, groups, L, width). The first `split` columns
// go to `first`, the others to `second`, (B, L, ...) with rows of ld elements; `zeros` columns of `first` behind its
// own are set to zero.
template <class T>
struct RowSum {
    const float* part;
    Index batch, groups, tokens, pitch, width, split;
    T *first, *second;
    Index ld_first, ld_second, zeros;
};
template <class T>
void sum_rows(Context& ctx, std::span<const RowSum<T>> sums);  // 2 at most, of one size

// The dt projection: dq[t, r] = sum_e draw[t, e] weight[e, r] and dweight[e, r] += sum_t draw[t, e] q[t, r], where draw
// (tokens, E) is the gradient before bias and softplus, q and dq have rows of `row` elements. dweight or none.
template <class T>
struct DtBackward {
    const float *draw, *weight;
    const T* q;
    T* dq;
    float* dweight;
    Index tokens, dim, rank, row;
};
template <class T>
void dt_backward(Context& ctx, const DtBackward<T>& args);

}  // namespace vimcore::cuda
