// SPDX-License-Identifier: Apache-2.0
// How much memory a network will need, known before any of it is taken.
#pragma once

#include <cstdint>
#include <string>

#include "vimcore/config.h"
#include "vimcore/model.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// Bytes of scratch memory and logits of one inference forward: an upper estimate, at most half as much again as is
// used, or 4 MiB more. Without weights and images. Saturates at the largest number. The device need not be there.
std::int64_t forward_bytes(const Config& config, std::int64_t batch, DType dtype = DType::f32, int threads = 1,
                           Device device = Device::cpu());

// Bytes that a training forward keeps for its backward, as many as Saved takes.
std::int64_t saved_bytes(const Config& config, Memory memory, std::int64_t batch, DType dtype = DType::f32);

// Bytes of scratch memory of a training step, a forward and a backward in one context: an upper estimate as above.
// Without weights, images, what is saved, gradients of parameters and the optimiser's state.
std::int64_t training_bytes(const Config& config, Memory memory, std::int64_t batch, DType dtype = DType::f32,
                            int threads = 1, Device device = Device::cpu());

std::int64_t weight_bytes(const Config& config);  // float32 parameters; a backend's packed form comes to as much again

// Memory of this machine, or what a container may use of it.
std::int64_t machine_bytes();

// vimcore::Error "[who] what: needs N bytes, this machine has M" where `bytes` is more than the machine has.
void require_memory(const std::string& who, const std::string& what, std::int64_t bytes);

}  // namespace vimcore
