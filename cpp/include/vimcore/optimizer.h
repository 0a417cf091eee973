// SPDX-License-Identifier: Apache-2.0
// Training in C++: weights in memory of their own, the published initialisation, the loss, AdamW, and the file that
// Model::load and Python read. float32 on the CPU; the same seed gives the same bits.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
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

// Mean over the batch of -sum_c p_c log softmax(logits)_c, p_c = (1 - smoothing) [c = label] + smoothing / classes.
// dlogits, like logits or none, is overwritten with the gradient.
double cross_entropy(const Tensor& logits,  // (B, classes)
                     std::span<const std::int64_t> labels, const Tensor& dlogits, double smoothing = 0);

struct AdamWOptions {
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
    double weight_decay = 0.05;  // not of vectors, biases, class tokens and position table
    bool decay_A_log = true;     // as the published training did, although Mamba marks them as exempt
    double clip_norm = 0;        // longest gradient, all weights together; 0: any
};

// m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
// w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps).
class AdamW {
public:
    // Updates the weights of `params` that have a gradient in `gradients`; both must outlive the optimizer.
    AdamW(const Config& config, Params& params, Params& gradients, const AdamWOptions& options = {});

    // Returns the norm of all gradients before clipping. vimcore::Error where it is not finite; nothing has changed
    // then.
    double step(double lr);
    std::int64_t steps() const { return steps_; }

private:
    struct Slot {
        float *weight, *gradient, *m, *v;
        std::int64_t count;
        bool decayed;
    };
    AdamWOptions options_;
    Params* params_;
    std::vector<Slot> slots_;
    Buffer moments_;
    std::int64_t steps_ = 0;
};

// Writes weights and architecture, labels (one per class, or none) and how pictures become input, to a vimcore file.
void save_model(const std::string& path, const Config& config, const Params& params,
                const std::vector<std::string>& labels = {}, const std::optional<Preprocess>& preprocess = {});

}  // namespace vimcore
