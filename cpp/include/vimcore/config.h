// SPDX-License-Identifier: Apache-2.0
// Config: the architecture of one Vision Mamba, with the names of the Python constructor.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace [[gnu::visibility("default")]] vimcore {

enum class Directions : std::uint8_t { none, sequence, block, ssm, ssm_conv };
enum class ClassToken : std::uint8_t { none, head, double_, middle, random };
enum class Pool : std::uint8_t { mean, max, last, all };
enum class Norm : std::uint8_t { rms, layer };

struct Config {
    std::int64_t img_height = 224, img_width = 224;
    std::int64_t patch_size = 16, stride = 16;
    std::int64_t in_chans = 3, num_classes = 1000;  // num_classes 0: no head
    std::int64_t embed_dim = 192, depth = 24;
    std::int64_t d_state = 16, d_conv = 4, expand = 2;
    std::int64_t dt_rank = 0;  // 0: ceil(embed_dim / 16)
    Directions directions = Directions::ssm_conv;
    bool average_directions = true;  // halve the sum of both directions (ssm_conv only)
    ClassToken class_token = ClassToken::middle;
    Pool pool = Pool::mean;  // read-out without class token
    Norm norm = Norm::rms;
    double norm_eps = 1e-5;
    bool pos_embed = true, rope = false, rope_residual = false;
    std::int64_t rope_grid = 14;
    std::optional<double> layer_scale;
    double drop_rate = 0.0, drop_path_rate = 0.0;  // training only

    std::int64_t inner() const { return expand * embed_dim; }
    std::int64_t rank() const { return dt_rank > 0 ? dt_rank : (embed_dim + 15) / 16; }
    std::int64_t grid_height() const { return (img_height - patch_size) / stride + 1; }
    std::int64_t grid_width() const { return (img_width - patch_size) / stride + 1; }
    std::int64_t patches() const { return grid_height() * grid_width(); }
    std::int64_t class_tokens() const;  // 0, 1 or 2
    std::int64_t tokens() const { return patches() + class_tokens(); }
    std::int64_t class_position() const;  // index of the (first) class token in eval, -1 without
    bool two_directions() const { return directions == Directions::ssm || directions == Directions::ssm_conv; }
    double direction_scale() const;  // 0.5 or 1

    void validate() const;       // std::invalid_argument names the option and its value
    std::int64_t flops() const;  // multiply-adds of one image, scan included

    std::string to_json() const;                     // keys as in the Python constructor
    static Config from_json(std::string_view text);  // unknown keys and wrong types are errors
};

}  // namespace vimcore
