// SPDX-License-Identifier: Apache-2.0
// The kernels of bf16 for processors that multiply pairs of it; the flags come from cpp/cmake/options.cmake.
#if !defined(__AVX512BF16__)
#error "compiled without AVX512-BF16, these would be its emulation"
#endif
#define VIM_ISA avx512bf16
#define VIM_BYTES 64
#define VIM_BF16
#include "kernels-inl.h"
