// SPDX-License-Identifier: Apache-2.0
// All operators that a device provides, one line each: the function, and its arguments. The interface below, both
// backends and the declarations of the CUDA functions are made from this list. Arguments have been checked (ops.cpp).
#pragma once

#include <span>

#include "vimcore/ops.h"

// clang-format off
#define VIM_OPERATORS(OPERATOR)                                    \
    OPERATOR(norm_forward, NormForward)                            \
    OPERATOR(norm_backward, NormBackward)                          \
    OPERATOR(linear_forward, std::span<const LinearForward>)       \
    OPERATOR(linear_backward, std::span<const LinearBackward>)     \
    OPERATOR(conv1d_forward, Conv1dForward)                        \
    OPERATOR(conv1d_backward, Conv1dBackward)                       \
    OPERATOR(scan_forward, ScanForward)                            \
    OPERATOR(scan_backward, ScanBackward)                          \
    OPERATOR(selective_scan_forward, SelectiveScanForward)         \
    OPERATOR(selective_scan_backward, SelectiveScanBackward)       \
    OPERATOR(patches_forward, Patches)                             \
    OPERATOR(patches_backward, Patches)                            \
    OPERATOR(tokens_forward, TokensForward)                        \
    OPERATOR(tokens_backward, TokensBackward)                      \
    OPERATOR(positions_forward, PositionsForward)                  \
    OPERATOR(positions_backward, PositionsBackward)                \
    OPERATOR(rope, Rope)                                           \
    OPERATOR(readout_forward, ReadoutForward)                      \
    OPERATOR(readout_backward, ReadoutBackward)                    \
    OPERATOR(add, Add)                                             \
    OPERATOR(scale_rows, ScaleRows)                                \
    OPERATOR(scale_rows_backward, ScaleRowsBackward)               \
    OPERATOR(accumulate, Accumulate)
// clang-format on

namespace vimcore {

// Operators of the library alone, over parameters and their gradients.

// out[i, :] = factor[i] matrix[i, :]
struct ScaleRows {
    Tensor matrix;  // (I, J)
    Tensor factor;  // (I)
    Tensor out;     // (I, J)
};
// dmatrix[i, :] += factor[i] dout[i, :], dfactor[i] += sum_j matrix[i, j] dout[i, j]; either or none
struct ScaleRowsBackward {
    Tensor matrix, factor;
    Tensor dout;
    Tensor dmatrix, dfactor;
};
// to[i] += from[i]; those that are none are passed over
struct Accumulate {
    std::span<const Tensor> to, from;
};

class Operators {
public:
    virtual ~Operators() = default;
#define VIM_DECLARE(function, Arguments) virtual void function(Context& ctx, const Arguments& args) = 0;
    VIM_OPERATORS(VIM_DECLARE)
#undef VIM_DECLARE
};

}  // namespace vimcore
