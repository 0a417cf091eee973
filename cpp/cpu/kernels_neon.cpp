// SPDX-License-Identifier: Apache-2.0
// The kernels for one instruction set; the flags come from cpp/cmake/options.cmake.
#define VIM_ISA neon
#define VIM_BYTES 16
#include "kernels-inl.h"
