// SPDX-License-Identifier: Apache-2.0
// The operators of vimcore/ops.h on the device: each launches its kernels on the context's stream and returns. The
// arguments were checked. Activations are T (float, __half, __nv_bfloat16); parameters, residual stream, states and
// statistics are float. Each lives in the file named beside it.
#pragma once

#include <span>

#include "launch.h"
#include "vimcore/ops.h"

namespace vimcore::cuda {

void norm_forward(Context& ctx, const NormForward& args);                // norm.cu
void conv1d_forward(Context& ctx, const Conv1d& args);                   // conv1d.cu
void linear_forward(Context& ctx, std::span<const LinearForward> args);  // linear.cpp
void scan_forward(Context& ctx, const Scan& args);                       // scan.cu
void selective_scan_forward(Context& ctx, const SelectiveScan& args);    // scan.cu
bool scan_forward_tuned(Context& ctx, const Scan& args);                 // scan_tuned.cu; false: not for these sizes
void scan_backward(Context& ctx, const Scan& args);                      // scan_backward.cu
bool scan_backward_tuned(Context& ctx, const Scan& args);                // scan_backward_tuned.cu; false: not for these
void selective_scan_backward(Context& ctx, const SelectiveScan& args);   // scan_backward.cu
void patches_forward(Context& ctx, const Patches& args);                 // embed.cu
void tokens_forward(Context& ctx, const Tokens& args);                   // embed.cu
void rope(Context& ctx, const Rope& args);                               // embed.cu
void readout_forward(Context& ctx, const Readout& args);                 // readout.cu
void add(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& row_scale);  // elementwise.cu
void copy(Context& ctx, const Tensor& from, const Tensor& to);  // elementwise.cu; converts types
void fill_zero(Context& ctx, const Tensor& tensor);             // elementwise.cu
void scale_rows(Context& ctx, const Tensor& matrix, const Tensor& factor, const Tensor& out);  // elementwise.cu

// y (m, n) = x (m, k) W (n, k)^T + bias, accumulated in float. ld: elements from row to row. `count` problems at
// stride_* elements from each other. gemm.cu; used where cuBLASLt is not there, and as its oracle.
struct GemmArgs {
    DType dtype = DType::f32;  // of x, w and y; bias is float
    const void *x = nullptr, *w = nullptr;
    const float* bias = nullptr;
    void* y = nullptr;
    Index m = 0, n = 0, k = 0, ldx = 0, ldw = 0, ldy = 0;
    Index count = 1, stride_x = 0, stride_w = 0, stride_y = 0;
};
void gemm(Context& ctx, const GemmArgs& args);

}  // namespace vimcore::cuda
