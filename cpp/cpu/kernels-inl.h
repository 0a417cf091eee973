// SPDX-License-Identifier: Apache-2.0
// Fills the table of kernels for the instruction set VIM_ISA.
#pragma once

#include "simd.h"

#include "checksum-inl.h"
#include "conv1d-inl.h"
#include "gemm-inl.h"
#include "maps-inl.h"
#include "norm-inl.h"
#include "scan-inl.h"
#include "scan_backward-inl.h"

#define VIM_NAME_(a) #a
#define VIM_NAME(a) VIM_NAME_(a)
#define VIM_JOIN_(a, b) a##b
#define VIM_JOIN(a, b) VIM_JOIN_(a, b)

namespace vimcore::cpu {
namespace VIM_ISA {

template <class T>
static const Kernels<T> table = {
    .isa = VIM_NAME(VIM_ISA),
    .lanes = lanes<T>,
    .mr = GemmTile<T>::rows,
    .nr = GemmTile<T>::columns,
    .pack = pack<T>,
    .gemm = gemm<T>,
    .gemm_tn = gemm_tn<T>,
    .gemm_tn_scratch = gemm_tn_scratch<T>,
    .norm_forward = norm_forward<T>,
    .norm_backward = norm_backward<T>,
    .conv_forward = conv_forward<T>,
    .conv_backward = conv_backward<T>,
    .scan_forward = scan_forward<T>,
    .scan_backward = scan_backward<T>,
    .scan_backward_scratch = scan_backward_scratch<T>,
    .gate_backward = gate_backward<T>,
    .prepare_A = prepare_A<T>,
    .relu = relu<T>,
    .gelu = gelu<T>,
    .blend = blend<T>,
    .stretch = stretch<T>,
    .arg_max = arg_max<T>,
    .checksum = checksum,
    .fma_peak = fma_peak<T>,
    .fma_per_round = fma_per_round<T>,
};

}  // namespace VIM_ISA

template <class T>
const Kernels<T>* VIM_JOIN(kernels_, VIM_ISA)()
{
    return &VIM_ISA::table<T>;
}
template const Kernels<float>* VIM_JOIN(kernels_, VIM_ISA)<float>();
template const Kernels<double>* VIM_JOIN(kernels_, VIM_ISA)<double>();

}  // namespace vimcore::cpu
