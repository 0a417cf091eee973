// SPDX-License-Identifier: Apache-2.0
// From normalised tokens to logits, and back: read-out, neck, linear head.
#pragma once

#include "network/pass.h"

namespace vimcore {

void classify(const Pass& pass, const Tensor& x, const Tensor& y);  // (..., readout width) -> (..., outputs)

void head_forward(const Pass& pass, const Tensor& tokens, const Tensor& logits);

// dlogits -> gradient of the normalised tokens, from which the rest is computed again.
void head_backward(const Pass& pass, const Tensor& tokens, const Tensor& dlogits, const Tensor& dtokens,
                   Params& dparams);

}  // namespace vimcore
