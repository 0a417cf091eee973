// SPDX-License-Identifier: Apache-2.0
// What heads consist of: lists of convolutions under mmsegmentation's names, and what follows from them.
#include <algorithm>
#include <limits>

#include "segment/network.h"
#include "vimcore/params.h"

namespace vimcore {

std::array<int, 4> level_exponents(std::int64_t patch)
{
    const int finest = patch == 16 ? 2 : patch == 8 ? 1 : 0;
    return {finest, finest - 1, finest - 2, finest - 3};
}

std::int64_t side_of(std::int64_t patches, int exponent)
{
    return exponent >= 0 ? patches << exponent : std::max<std::int64_t>(patches >> -exponent, 1);
}

namespace {

std::int64_t level_pixels(const Config& config, std::size_t level)
{
    const int exponent = level_exponents(config.patch_size)[level];
    return side_of(config.grid_height(), exponent) * side_of(config.grid_width(), exponent);
}

Part conv_norm(const SegmentationFile& about, const std::string& name, std::int64_t kernel, std::int64_t in,
               std::int64_t pixels)
{
    return {.name = name + ".conv",
            .norm = name + (about.group_norm ? ".gn" : ".bn"),
            .kernel = kernel,
            .in = in,
            .out = about.channels,
            .activation = Activation::relu,
            .pixels = pixels};
}

Part classifier(const SegmentationFile& about, std::int64_t in, std::int64_t pixels)
{
    return {.name = "decode_head.conv_seg",
            .bias = true,
            .in = in,
            .out = static_cast<std::int64_t>(about.classes.size()),
            .pixels = pixels};
}

std::vector<Part> fcn_parts(const SegmentationFile& about)
{
    std::vector<Part> parts;
    std::int64_t in = about.config.embed_dim;
    for (std::int64_t i = 0; i < about.convs; i++) {
        parts.push_back(conv_norm(about, "decode_head.convs." + std::to_string(i), 3, in, about.config.patches()));
        in = about.channels;
    }
    parts.push_back(classifier(about, in, about.config.patches()));
    return parts;
}

std::vector<Part> uper_parts(const SegmentationFile& about)
{
    const Config& config = about.config;
    const std::int64_t dim = config.embed_dim, c = about.channels;
    std::vector<Part> parts;
    for (int level = 0; level < 2; level++) {
        const int exponent = level_exponents(config.patch_size)[static_cast<std::size_t>(level)];
        const std::string name = "backbone.fpn" + std::to_string(level + 1) + ".";
        for (int i = 0; i < exponent; i++) {
            Part part{.name = name + std::to_string(3 * i),
                      .up = true,
                      .bias = true,
                      .kernel = 2,
                      .in = dim,
                      .out = dim,
                      .pixels = config.patches() << 2 * i};
            if (exponent == 2 && i == 0) part.norm = name + "1", part.activation = Activation::gelu;
            parts.push_back(part);
        }
    }
    const auto add = [&](const std::string& name, std::int64_t kernel, std::int64_t in, std::int64_t pixels) {
        parts.push_back(conv_norm(about, "decode_head." + name, kernel, in, pixels));
    };
    for (std::size_t i = 0; i < pool_bins.size(); i++)
        add("psp_modules." + std::to_string(i) + ".1", 1, dim, pool_bins[i] * pool_bins[i]);
    add("bottleneck", 3, dim + static_cast<std::int64_t>(pool_bins.size()) * c, level_pixels(config, 3));
    for (std::size_t i = 0; i < 3; i++) {
        add("lateral_convs." + std::to_string(i), 1, dim, level_pixels(config, i));
        add("fpn_convs." + std::to_string(i), 3, c, level_pixels(config, i));
    }
    add("fpn_bottleneck", 3, 4 * c, level_pixels(config, 0));
    parts.push_back(classifier(about, c, level_pixels(config, 0)));
    return parts;
}

Shape weight_shape(const Part& part)
{
    return part.up ? Shape{part.in, part.out, 2, 2} : Shape{part.out, part.in, part.kernel, part.kernel};
}

}  // namespace

std::vector<Part> parts_of(const SegmentationFile& about)
{
    return about.head == SegmentationFile::Head::uper ? uper_parts(about) : fcn_parts(about);
}

std::int64_t SegmentationFile::flops() const
{
    __int128 total = config.flops();  // sizes that no machine has give the largest number
    for (const Part& part : parts_of(*this)) total += __int128{weight_shape(part).numel()} * part.pixels;
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    return total < most ? static_cast<std::int64_t>(total) : most;
}

std::int64_t SegmentationFile::head_parameters() const
{
    std::int64_t total = 0;
    for (const Part& part : parts_of(*this))
        total += weight_shape(part).numel() + part.out * (part.bias + 2 * !part.norm.empty());
    return total;
}

void SegmentationFile::check_tensors(const SafetensorsFile& file, const std::string& path) const
{
    NamedShapes wanted;
    for_each_param(
        config, [&](const std::string& name, const Shape& shape) { wanted.emplace_back("backbone." + name, shape); });
    for (const Part& part : parts_of(*this)) {
        wanted.emplace_back(part.name + ".weight", weight_shape(part));
        if (part.bias) wanted.emplace_back(part.name + ".bias", Shape{part.out});
        if (part.norm.empty()) continue;
        for (const char* name : {"weight", "bias", "running_mean", "running_var"})
            if (!group_norm || name[0] != 'r') wanted.emplace_back(part.norm + "." + name, Shape{part.out});
    }
    const auto passed_over = [](const std::string& name) {
        return name.starts_with("auxiliary_head.") || name.starts_with("backbone.rope.freqs_") ||
               name.ends_with(".num_batches_tracked");
    };
    require_tensors(file, wanted, passed_over, path);
}

}  // namespace vimcore
