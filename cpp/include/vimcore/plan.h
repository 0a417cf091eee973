// SPDX-License-Identifier: Apache-2.0
// How much memory a network will need, known before any of it is taken.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "vimcore/config.h"
#include "vimcore/model.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// Bytes of scratch memory of one context that does nothing else. They are counted: forward and backward run with what
// takes memory in them and without what computes. The device need not be there. Sizes that no machine has (beyond
// 2^60 bytes for what a step touches, roughly) give the largest number.
struct ScratchBytes {
    // What stays reserved from the second call on, to the byte. On CUDA with cuBLASLt not more than that: which memory
    // a product of matrices asks for is the library's choice, at most the 32 MiB that are counted (4 MiB are used
    // before sm_90). For an inference for logits, or a training step with gradients of all parameters and none of
    // images.
    std::int64_t held = 0;
    // What is reserved at the most, while memory grows in pieces in the first call: to the byte for one thread, an
    // upper bound where several grow side by side.
    std::int64_t most = 0;
};
ScratchBytes forward_scratch(const Config& config, std::int64_t batch, DType dtype = DType::f32, int threads = 1,
                             Device device = Device::cpu());
ScratchBytes training_scratch(const Config& config, Memory memory, std::int64_t batch, DType dtype = DType::f32,
                              int threads = 1, Device device = Device::cpu());

// Bytes that one inference forward needs: scratch memory (`most`) and logits. Without weights and images. Saturates.
std::int64_t forward_bytes(const Config& config, std::int64_t batch, DType dtype = DType::f32, int threads = 1,
                           Device device = Device::cpu());

// Bytes that a training forward keeps for its backward, as many as Saved takes.
std::int64_t saved_bytes(const Config& config, Memory memory, std::int64_t batch, DType dtype = DType::f32,
                         Device device = Device::cpu());

// Bytes of scratch memory (`most`) that a training step needs, a forward and a backward in one context. Without
// weights, images, what is saved, gradients of parameters and the optimiser's state.
std::int64_t training_bytes(const Config& config, Memory memory, std::int64_t batch, DType dtype = DType::f32,
                            int threads = 1, Device device = Device::cpu());

// Of float32 parameters, a backend's packed form of which comes to as much again; or of a model on the CPU for one type
// of activations, see ModelOptions: with bf16 nothing comes to that.
std::int64_t weight_bytes(const Config& config, std::optional<DType> only = {});

// Memory of this machine, or what a container may use of it.
std::int64_t machine_bytes();

// vimcore::Error "[who] what: needs N bytes, this machine has M" where `bytes` is more than the machine has.
void require_memory(const std::string& who, const std::string& what, std::int64_t bytes);

}  // namespace vimcore
