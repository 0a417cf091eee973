// SPDX-License-Identifier: Apache-2.0
// The kernels of bf16 for processors with matrix tiles; the flags come from cpp/cmake/options.cmake.
#if !defined(__AMX_BF16__) && !defined(__AMXBF16__)
#error "compiled without AMX, these would be its emulation"
#endif
#define VIM_ISA amx
#define VIM_BYTES 64
#define VIM_BF16
#define VIM_AMX
#include "kernels-inl.h"
