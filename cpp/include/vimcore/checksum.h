// SPDX-License-Identifier: Apache-2.0
// A checksum of weights on the CPU: the only sign of writes that nobody announces (fused optimizers, views, other
// processes).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

class Checksum {
public:
    explicit Checksum(std::span<const Tensor> tensors);

    // Of what the tensors hold now; on all threads of the context, the same value for any number of them. One
    // changed word of 32 bits changes it for certain, any other change but for one in 2^32.
    std::uint64_t operator()(Context& ctx) const;

private:
    struct Piece {
        const char* data;
        std::int64_t bytes;
    };
    std::vector<Piece> pieces_;
    std::vector<std::size_t> tasks_;  // the first piece of each, and the end
};

}  // namespace vimcore
