// SPDX-License-Identifier: Apache-2.0
#define VIM_ISA emulated_amx
#define VIM_BYTES 16
#define VIM_AMX
#define VIM_FILL_TABLE fill_amx
#include "emulated_unit.h"
