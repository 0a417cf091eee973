// SPDX-License-Identifier: Apache-2.0
// Fills the tables of kernels for the instruction set VIM_ISA: of float and double or, in a unit of its own, of bf16.
#pragma once

#include "simd.h"

#include "checksum-inl.h"
#include "conv1d-inl.h"
#include "gemm-inl.h"
#include "maps-inl.h"
#include "norm-inl.h"
#include "scan-inl.h"
#include "scan_backward-inl.h"

#if defined(VIM_AMX) || defined(VIM_BFMMLA)
#include "gemm_blocks-inl.h"
#elif defined(VIM_BF16)
#include "gemm_bf16-inl.h"
#endif

#define VIM_NAME_(a) #a
#define VIM_NAME(a) VIM_NAME_(a)
#define VIM_JOIN_(a, b) a##b
#define VIM_JOIN(a, b) VIM_JOIN_(a, b)

namespace vimcore::cpu {
namespace VIM_ISA {

#if defined(VIM_AMX) || defined(VIM_BFMMLA)
template <class T>
using TableTile = BlockUnit;
#else
template <class T>
struct TableTile : GemmTile<T> {
    static constexpr int depth = narrow<T> ? 2 : 1;
};
#endif

template <class T>
static constexpr Kernels<T> make_table()
{
    Kernels<T> table = {
        .isa = VIM_NAME(VIM_ISA),
        .lanes = lanes<T>,
        .mr = TableTile<T>::rows,
        .nr = TableTile<T>::columns,
        .depth = TableTile<T>::depth,
        .pack = pack<T>,
        .gemm = gemm<T>,
        .gemm_tn = gemm_tn<T>,
        .gemm_tn_scratch = gemm_tn_scratch<T>,
        .norm_forward = norm_forward<T>,
        .norm_backward = norm_backward<T>,
        .conv_forward = conv_forward<T>,
        .conv_backward = conv_backward<T>,
        .widen = widen<T>,
        .scan_forward = scan_forward<T>,
        .scan_backward = scan_backward<T>,
        .scan_backward_scratch = scan_backward_scratch<T>,
        .gate_backward = gate_backward<T>,
        .prepare_A = prepare_A<T>,
        .checksum = checksum,
        .fma_peak = fma_peak<Wide<T>>,
        .fma_per_round = fma_per_round<Wide<T>>,
    };
#if defined(VIM_BF16)
    table.fma_peak = dot_peak;
    table.fma_per_round = dot_per_round;
#endif
    if constexpr (!narrow<T>) {
        table.relu = relu<T>;
        table.gelu = gelu<T>;
        table.blend = blend<T>;
        table.stretch = stretch<T>;
        table.arg_max = arg_max<T>;
    }
    return table;
}
template <class T>
static constexpr Kernels<T> table = make_table<T>();

}  // namespace VIM_ISA

template <class T>
const Kernels<T>* VIM_JOIN(kernels_, VIM_ISA)()
{
    return &VIM_ISA::table<T>;
}
#if defined(VIM_BF16)
template const Kernels<bf16>* VIM_JOIN(kernels_, VIM_ISA)<bf16>();
#else
template const Kernels<float>* VIM_JOIN(kernels_, VIM_ISA)<float>();
template const Kernels<double>* VIM_JOIN(kernels_, VIM_ISA)<double>();
#endif

}  // namespace vimcore::cpu
