// SPDX-License-Identifier: Apache-2.0
// Where windows lie along one axis, and how large a picture is made.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "vimcore/segment.h"

namespace vimcore {

struct Windows {
    std::int64_t length, window, stride;

    std::int64_t count() const { return std::max<std::int64_t>(length - window + stride - 1, 0) / stride + 1; }
    std::int64_t start(std::int64_t k) const
    {
        return std::min(stride * k, std::max<std::int64_t>(length - window, 0));
    }
    std::int64_t end(std::int64_t k) const { return std::min(start(k) + window, length); }
};

// (height, width) after resizing; the same where the file has no sizes.
std::pair<std::int64_t, std::int64_t> fitted(const SegmentationFile& about, std::int64_t height, std::int64_t width);

}  // namespace vimcore
