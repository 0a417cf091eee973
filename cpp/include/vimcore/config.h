// SPDX-License-Identifier: Apache-2.0
// Config: the architecture of one Vision Mamba, with the names of the Python constructor.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "vimcore/option.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

enum class Directions : std::uint8_t { none, sequence, block, ssm, ssm_conv };
enum class ClassToken : std::uint8_t { none, head, double_, middle, random };
enum class Pool : std::uint8_t { mean, max, last, all };
enum class Norm : std::uint8_t { rms, layer };
const char* name_of(Directions value);  // as in Python; std::invalid_argument where it is none of these
const char* name_of(ClassToken value);
const char* name_of(Pool value);
const char* name_of(Norm value);

// Patches of an image, row by row.
struct Grid {
    std::int64_t rows = 0, columns = 0;
    std::int64_t count() const { return rows * columns; }
    bool operator==(const Grid&) const = default;
};

// Sizes and options of one block.
struct BlockConfig {
    std::int64_t embed_dim = 192;
    std::int64_t d_state = 16, d_conv = 4, expand = 2;
    std::int64_t dt_rank = 0;  // 0: ceil(embed_dim / 16)
    Directions directions = Directions::ssm_conv;
    bool average_directions = true;  // halve the sum of both directions (ssm_conv only)
    Norm norm = Norm::rms;
    double norm_eps = 1e-5;
    std::optional<double> layer_scale;

    std::int64_t inner() const { return expand * embed_dim; }
    std::int64_t rank() const { return dt_rank > 0 ? dt_rank : (embed_dim + 15) / 16; }
    bool two_directions() const { return directions == Directions::ssm || directions == Directions::ssm_conv; }
    double direction_scale() const;  // 0.5 or 1

    bool operator==(const BlockConfig&) const = default;
};

// A value that is checked where it is made: from_json and from_options do, who sets fields calls validate() at the end.
// Functions that take one rely on it.
struct Config : BlockConfig {
    std::int64_t img_height = 224, img_width = 224;
    // Pixels that the position table was made for; 0: those of the images. No option by name, see at_size.
    std::int64_t table_height = 0, table_width = 0;
    std::int64_t patch_size = 16, stride = 16;
    std::int64_t in_chans = 3, num_classes = 1000;  // num_classes 0: no head
    std::int64_t depth = 24;
    ClassToken class_token = ClassToken::middle;
    Pool pool = Pool::mean;  // read-out without class token
    bool pos_embed = true, rope = false, rope_residual = false;
    std::int64_t rope_grid = 14;
    double drop_rate = 0.0, drop_path_rate = 0.0;  // training only

    std::int64_t grid_height() const { return (img_height - patch_size) / stride + 1; }
    std::int64_t grid_width() const { return (img_width - patch_size) / stride + 1; }
    Grid grid() const { return {grid_height(), grid_width()}; }
    std::int64_t patches() const { return grid_height() * grid_width(); }
    std::int64_t class_tokens() const;  // 0, 1 or 2
    std::int64_t tokens() const { return patches() + class_tokens(); }
    std::int64_t class_position() const;  // index of the (first) class token in eval, -1 without
    Grid table_grid() const;              // of the position table
    bool resizes_table() const { return pos_embed && !(table_grid() == grid()); }

    // Whether the head is applied to every token: Pool::max takes the largest of the results, Pool::all all of them.
    bool head_per_token() const { return class_token == ClassToken::none && (pool == Pool::max || pool == Pool::all); }
    std::int64_t outputs() const { return num_classes > 0 ? num_classes : embed_dim; }  // numbers of one logit vector
    Shape logits_shape(std::int64_t batch) const;  // (batch, outputs()), or (batch, tokens(), outputs()) for Pool::all
    Shape images_shape(std::int64_t batch) const { return {batch, in_chans, img_height, img_width}; }
    Shape tokens_shape(std::int64_t batch) const { return {batch, tokens(), embed_dim}; }

    // The same weights for images of another size. forward and backward resize the position table, and add gradients
    // to it as it is; for_each_param and options() go on describing the weights.
    Config at_size(std::int64_t height, std::int64_t width) const;

    void validate() const;       // std::invalid_argument names the option and its value
    std::int64_t flops() const;  // multiply-adds of one image, scan included

    Options options() const;                             // all of them, in the order of the Python constructor
    static Config from_options(const Options& options);  // unknown keys and wrong types are errors, others as stated
    std::string to_json() const;
    static Config from_json(std::string_view text);

    bool operator==(const Config&) const = default;
};

}  // namespace vimcore
