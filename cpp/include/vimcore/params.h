// SPDX-License-Identifier: Apache-2.0
// Params: named views of all weights of a network, or of all their gradients.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// One scan direction (spec: theta). Directions::ssm shares all but A_log between its two directions.
struct DirectionParams {
    Tensor A_log;        // (E, N)
    Tensor D;            // (E)
    Tensor conv_weight;  // (E, 1, K)
    Tensor conv_bias;    // (E)
    Tensor x_proj;       // (R + 2N, E)
    Tensor dt_weight;    // (E, R)
    Tensor dt_bias;      // (E)
};

struct BlockParams {
    DirectionParams forward, reverse;  // reverse: absent tensors where the architecture has none
    Tensor in_proj;                    // (2E, D)
    Tensor out_proj;                   // (D, E)
    Tensor gamma;                      // (D), with layer scale
    Tensor norm_weight, norm_bias;     // (D)
};

class WeightCache;  // packed forms of weights, kept by a backend until the weights change

struct Params {
    Tensor class_token, class_token_tail;     // (1, 1, D); registers (1, n, D)
    Tensor pos_embed;                         // (1, L, D); with registers or frames fewer rows
    Tensor class_positions;                   // (1, n, D), of registers
    Tensor frame_positions;                   // (1, frames, D), of clips
    Tensor patch_weight, patch_bias;          // (D, C, P, P), of clips (D, C, 1, P, P); (D)
    Tensor neck_weight;                       // (D / r, D), between registers and head
    Tensor neck_norm_weight, neck_norm_bias;  // (n D / r)
    Tensor head_weight, head_bias;            // (classes, readout width), (classes)
    Tensor norm_weight, norm_bias;            // final norm, (D)
    std::vector<BlockParams> blocks;

    std::shared_ptr<WeightCache> cache;
    void changed();  // call after writing to weights: packed forms are rebuilt at the next use
};

// Calls visit(name, tensor, shape) for every parameter of the architecture in state-dict order, under the
// authors' names. params.blocks is resized to config.depth.
void for_each_param(const Config& config, Params& params,
                    const std::function<void(const std::string& name, Tensor& tensor, const Shape& shape)>& visit);
// The same of parameters that stay as they are; tensors of blocks that they lack are absent.
void for_each_param(
    const Config& config, const Params& params,
    const std::function<void(const std::string& name, const Tensor& tensor, const Shape& shape)>& visit);
// Names and shapes alone.
void for_each_param(const Config& config,
                    const std::function<void(const std::string& name, const Shape& shape)>& visit);

// The parameters of one block; names without "layers.N.": "mixer.A_log", ..., "norm.weight".
void for_each_param(const BlockConfig& config, BlockParams& params,
                    const std::function<void(const std::string& name, Tensor& tensor, const Shape& shape)>& visit);

}  // namespace vimcore
