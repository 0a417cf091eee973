// SPDX-License-Identifier: Apache-2.0
// The kernels of bf16 for one instruction set that has no unit for it; the flags come from cpp/cmake/options.cmake.
#define VIM_ISA avx512
#define VIM_BYTES 64
#define VIM_BF16
#include "kernels-inl.h"
