// SPDX-License-Identifier: Apache-2.0
// What a segmentation model is made of: the backbone's weights and a head, which turns outputs of its layers into
// logits on a coarser grid than pixels.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "core/maps.h"
#include "vimcore/model_file.h"
#include "vimcore/segment.h"
#include "vimcore/weights.h"

namespace vimcore {

class SegmentationHead {
public:
    virtual ~SegmentationHead() = default;

    std::vector<std::int64_t> layers;    // whose outputs it takes, ascending
    std::int64_t rows = 0, columns = 0;  // of its logits

    // streams: (L, D) for each of `layers`, class tokens included. logits: (rows, columns, classes).
    virtual void run(Context& ctx, const std::vector<Tensor>& streams, const Map& logits) const = 0;
};

constexpr std::array<std::int64_t, 4> pool_bins = {1, 2, 3, 6};  // of UperNet's pooled maps, a side

// Of UperNet's four levels: sides grow by 2^e, to strides of 4, 8, 16 and 32 pixels, and are at least 1.
std::array<int, 4> level_exponents(std::int64_t patch);
std::int64_t side_of(std::int64_t patches, int exponent);

// One convolution and what follows it, by its names in the file.
struct Part {
    std::string name;       // NAME.weight, NAME.bias
    std::string norm = {};  // NORM.weight, .bias, .running_mean, .running_var; or none
    bool up = false, bias = false;
    std::int64_t kernel = 1, in = 0, out = 0;
    Activation activation = Activation::none;
    std::int64_t pixels = 0;  // of its input where it goes up, else of its output
};
std::vector<Part> parts_of(const SegmentationFile& about);  // of the head, in the order it uses them

std::unique_ptr<SegmentationHead> make_head(const SegmentationFile& about, const Config& window,
                                            const SafetensorsFile& file, const std::string& path);

struct SegmentationNetwork {
    explicit SegmentationNetwork(const Config& config) : weights(config) {}
    Weights weights;
    Config window;  // the backbone on one window
    std::unique_ptr<SegmentationHead> head;
};

}  // namespace vimcore
