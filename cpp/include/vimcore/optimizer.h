// SPDX-License-Identifier: Apache-2.0
// Training in C++: the loss and AdamW. float32 on the CPU. See weights.h for weights to train.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/params.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

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

}  // namespace vimcore
