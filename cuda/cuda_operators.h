// SPDX-License-Identifier: Apache-2.0
// The operators on the device: each launches its kernels on the context's stream and returns. The arguments were
// checked. Activations are T (float, __half, __nv_bfloat16); parameters, residual stream, states and statistics are
// float. A function lies in the file of its name: norm_forward in norm.cu, norm_backward in norm_backward.cu; patches,
// tokens and rope in embed.cu, both of positions in positions.cu, add, copy and what scales rows in elementwise.cu.
#pragma once

#include <span>
#include <vector>

#include "core/backend.h"
#include "core/device_scratch.h"
#include "launch.h"
#include "vimcore/ops.h"

namespace vimcore::cuda {

#define VIM_DECLARE(function, Arguments) void function(Context& ctx, const Arguments& args);
VIM_OPERATORS(VIM_DECLARE)
#undef VIM_DECLARE

// The tuned scans; false: not for these sizes.
bool scan_forward_tuned(Context& ctx, const ScanForward& args);
bool scan_backward_tuned(Context& ctx, const ScanBackward& args);

void copy(Context& ctx, const Tensor& from, const Tensor& to);  // converts types
void fill_zero(Context& ctx, const Tensor& tensor);

// Copies of float32 tensors, cut into pieces; `copies` of them in one launch, the table being in device memory.
// casts.cu
struct CastPiece {
    const float* from;
    void* to;
    int count;
    DType dtype;   // of to
    bool vectors;  // both addresses allow them
};
std::vector<CastPiece> cast_pieces(std::span<const Copy> copies);
void cast_all(Context& ctx, const CastPiece* table, Index pieces);

// out (columns) += the rows of x (rows, columns), at most four at a time, x of one type and equally many rows. Those
// without `out` are passed over. reduce.cu
using device_scratch::ColumnSum;
void sum_columns(Context& ctx, std::span<const ColumnSum> sums);

// y (m, n) = x (m, k) W (n, k)^T + bias, accumulated in float, or added to y. ld: elements from row to row. `count`
// problems at stride_* elements from each other. gemm.cu; used where cuBLASLt is not there, and as its oracle.
struct GemmArgs {
    DType dtype = DType::f32;  // of x and w; bias is float
    DType y_dtype = DType::f32;
    bool x_across = false, w_across = false;  // x lies in memory as (k, m), w as (k, n)
    bool add = false;
    const void *x = nullptr, *w = nullptr;
    const float* bias = nullptr;
    void* y = nullptr;
    Index m = 0, n = 0, k = 0, ldx = 0, ldw = 0, ldy = 0;
    Index count = 1, stride_x = 0, stride_w = 0, stride_y = 0;
};
void gemm(Context& ctx, const GemmArgs& args);

}  // namespace vimcore::cuda
