// SPDX-License-Identifier: Apache-2.0
// The operators of vimcore/ops.h on the device: each launches its kernels on the context's stream and returns. The
// arguments were checked. Activations are T (float, __half, __nv_bfloat16); parameters, residual stream, states and
// statistics are float. Each lives in the file named beside it.
#pragma once

#include <span>
#include <vector>

#include "core/backend.h"
#include "launch.h"
#include "vimcore/ops.h"

namespace vimcore::cuda {

void norm_forward(Context& ctx, const NormForward& args);                  // norm.cu
void norm_backward(Context& ctx, const NormBackward& args);                // norm_backward.cu
void conv1d_forward(Context& ctx, const Conv1d& args);                     // conv1d.cu
void conv1d_backward(Context& ctx, const Conv1d& args);                    // conv1d_backward.cu
void linear_forward(Context& ctx, std::span<const LinearForward> args);    // linear.cpp
void linear_backward(Context& ctx, std::span<const LinearBackward> args);  // linear.cpp
void scan_forward(Context& ctx, const Scan& args);                         // scan.cu
void selective_scan_forward(Context& ctx, const SelectiveScan& args);      // scan.cu
bool scan_forward_tuned(Context& ctx, const Scan& args);                   // scan_tuned.cu; false: not for these sizes
void scan_backward(Context& ctx, const Scan& args);                        // scan_backward.cu
bool scan_backward_tuned(Context& ctx, const Scan& args);                  // scan_backward_tuned.cu; false: not these
void selective_scan_backward(Context& ctx, const SelectiveScan& args);     // scan_backward.cu
void patches_forward(Context& ctx, const Patches& args);                   // embed.cu
void patches_backward(Context& ctx, const Patches& args);                  // embed_backward.cu
void tokens_forward(Context& ctx, const Tokens& args);                     // embed.cu
void tokens_backward(Context& ctx, const Tokens& args);                    // embed_backward.cu
void rope(Context& ctx, const Rope& args);                                 // embed.cu
void readout_forward(Context& ctx, const Readout& args);                   // readout.cu
void readout_backward(Context& ctx, const Readout& args);                  // readout_backward.cu
void add(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& row_scale);  // elementwise.cu
void copy(Context& ctx, const Tensor& from, const Tensor& to);  // elementwise.cu; converts types
void fill_zero(Context& ctx, const Tensor& tensor);             // elementwise.cu
void scale_rows(Context& ctx, const Tensor& matrix, const Tensor& factor, const Tensor& out);  // elementwise.cu
void scale_rows_backward(Context& ctx, const Tensor& matrix, const Tensor& factor, const Tensor& dout,
                         const Tensor& dmatrix, const Tensor& dfactor);  // elementwise.cu

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
struct ColumnSum {
    Tensor x, out;
};
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
