// SPDX-License-Identifier: Apache-2.0
// Where the weights of a loaded network lie, and which of them are kept in the form that products of matrices read.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/params.h"

namespace vimcore {

struct WeightLayout {
    std::vector<std::size_t> offsets;  // of the weights in the order of for_each_param, multiples of 64
    std::size_t bytes = 0;
    std::size_t largest_panels = 0;  // elements of the largest weight that is kept in panels
};

// Gives all tensors shape and type, without memory: float32, but for weights of linear maps on a CPU that computes in
// bf16 only, see ModelOptions::only.
WeightLayout lay_out_weights(const Config& config, Params& params, Device device, std::optional<DType> only);

}  // namespace vimcore
