// SPDX-License-Identifier: Apache-2.0
// Floats of any width, as they stand in files, to float32.
#pragma once

#include "vimcore/safetensors.h"

namespace vimcore {

bool is_float(DType dtype);

// All elements of `from`, a CPU tensor of a float type, aligned or not; exact but for f64, which is rounded.
void to_float(const Tensor& from, float* out);

}  // namespace vimcore
