// SPDX-License-Identifier: Apache-2.0
#define VIM_ISA emulated_bfmmla
#define VIM_BYTES 16
#define VIM_BFMMLA
#define VIM_FILL_TABLE fill_bfmmla
#include "emulated_unit.h"
