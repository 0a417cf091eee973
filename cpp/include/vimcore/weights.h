// SPDX-License-Identifier: Apache-2.0
// Weights in memory of their own, the published initialisation, and the file that Model::load and Python read. float32
// on the CPU; the same seed gives the same bits.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/image.h"
#include "vimcore/params.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// All weights of a network, or all their gradients, in one piece of memory; zero at first.
class Weights {
public:
    explicit Weights(const Config& config);

    Params params;  // views of the memory
    void zero();    // as between two backward passes
    std::int64_t count() const { return count_; }

private:
    Buffer storage_;
    std::int64_t count_ = 0;
};

// Draws all weights as the published training does: matrices and convolutions uniform in (-1, 1) / sqrt(fan-in),
// out_proj also / sqrt(depth); tokens, positions and head normal with deviation 0.02; patches normal with 1 /
// sqrt(fan-in); A_log = log(1..N); D = 1; the forward direction's time steps log-uniform in [0.001, 0.1], the reverse
// one's softplus(0).
void initialize(const Config& config, Params& params, std::uint64_t seed);

// Writes weights and architecture, labels (one per class, or none) and how pictures become input, to a vimcore file; in
// the type of the weights, or as save_weights does.
void save_model(const std::string& path, const Config& config, const Params& params,
                const std::vector<std::string>& labels = {}, const std::optional<Preprocess>& preprocess = {},
                std::optional<DType> dtype = {});

// save_safetensors with floats of another type: f32, or f16 or bf16 for the weights of linear maps and of convolutions
// over pixels, which computing in 16 bits rounds in any case; the small rest (A_log, time steps, norms, biases, tables)
// is then f32. Error names a weight that f16 cannot hold.
void save_weights(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& tensors,
                  const std::map<std::string, std::string>& metadata, DType dtype);

}  // namespace vimcore
