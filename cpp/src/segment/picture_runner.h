// SPDX-License-Identifier: Apache-2.0
// From a picture of any size to the class of every pixel. Logits at the resolution of pixels exist a row at a time:
// what is kept of a window are its coarse ones, and those only until the rows of pixels that they reach are done.
#pragma once

#include <vector>

#include "segment/window_runner.h"
#include "segment/windows.h"

namespace vimcore {

class PictureRunner {
public:
    explicit PictureRunner(WindowRunner& windows) : windows_(windows) {}
    void segment(const Image& image, ClassMap& result);

private:
    // The coarse logits of a row of windows.
    struct Band {
        std::int64_t start = 0, end = 0;  // rows of the resized picture
        const float* coarse = nullptr;    // of its windows, one after the other
    };

    struct Stage {
        const Image& image;  // resized
        ClassMap& result;
        Windows right;
        Places rows, columns;  // of the result, in the resized picture
        Places window_rows, window_columns;
    };

    void check(const Image& image) const;
    void whole(const Image& image, ClassMap& result);
    void cut(const Image& image, std::int64_t top, const Windows& right, std::int64_t first, std::int64_t count);
    void finish(const Stage& stage, std::int64_t first, std::int64_t last);
    void average(const Stage& stage, std::int64_t r, float* out, float* coarse_row) const;
    // Three rows of a picture's logits, and one of a window's coarse ones.
    std::int64_t row_floats(std::int64_t width) const { return (3 * width + windows_.columns) * windows_.classes; }

    WindowRunner& windows_;
    std::vector<float> coarse_, pixels_, table_;
    std::vector<Band> live_;
};

}  // namespace vimcore
