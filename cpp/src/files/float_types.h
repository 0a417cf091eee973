// SPDX-License-Identifier: Apache-2.0
// Floats of any width, as they stand in files, to float32, and back to those of 16 bits.
#pragma once

#include "vimcore/safetensors.h"

namespace vimcore {

bool is_float(DType dtype);

// All elements of `from`, a CPU tensor of a float type, aligned or not; exact but for f64, which is rounded.
void to_float(const Tensor& from, float* out);

// `count` numbers as f16 or bf16, to nearest, of two the even one. False where a finite one is too large for the type.
bool from_float(const float* from, std::int64_t count, DType dtype, void* out);

}  // namespace vimcore
