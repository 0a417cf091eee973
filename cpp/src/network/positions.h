// SPDX-License-Identifier: Apache-2.0
// What a pass needs to know where its tokens stand: a position table and rotations of its own grid. Both are kept for
// the sizes that were used last.
#pragma once

#include <memory>

#include "vimcore/positions.h"

namespace vimcore {

struct Pass;

// How the position table that the configuration's weights have comes to the tokens of its images or clips.
TableResize table_resize(const Config& config);

// The position table (1, L, D) of a pass: the weights' own, or composed of several, and resized where it was made for
// another grid; or none. On a device, where nobody looks whether weights changed, it is composed at every call, into
// scratch memory.
class PositionTable {
public:
    explicit PositionTable(const Pass& pass);
    const Tensor& tensor() const { return tensor_; }

private:
    Tensor tensor_;
    std::shared_ptr<const void> held_;
};

// RoPE of a pass; does nothing without.
class Rotation {
public:
    explicit Rotation(const Pass& pass);
    void apply(const Tensor& x, bool inverse) const;  // (B, L, D), in place; class tokens at the head pass

private:
    const Pass& pass_;
    Tensor both_;  // (2, J, D): cosines, sines
    std::shared_ptr<const void> held_;
};

}  // namespace vimcore
