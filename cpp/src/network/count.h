// SPDX-License-Identifier: Apache-2.0
// The plans of vimcore/plan.h where it is known what a product of matrices takes from a library on CUDA.
#pragma once

#include "vimcore/plan.h"

namespace vimcore {

ScratchBytes count_forward(const Config& config, std::int64_t batch, DType dtype, int threads, Device device,
                           std::int64_t product_bytes);
ScratchBytes count_training(const Config& config, Memory memory, std::int64_t batch, DType dtype, int threads,
                            Device device, std::int64_t product_bytes);

}  // namespace vimcore
