// SPDX-License-Identifier: Apache-2.0
// The kernels of bf16 for ARM processors that multiply 2 x 4 by 4 x 2; the flags come from cpp/cmake/options.cmake.
#if !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#error "compiled without BF16, these would be its emulation"
#endif
#define VIM_ISA neonbf16
#define VIM_BYTES 16
#define VIM_BF16
#define VIM_BFMMLA
#include "kernels-inl.h"
