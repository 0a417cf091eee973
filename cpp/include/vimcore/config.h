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
enum class ClassToken : std::uint8_t { none, head, double_, middle, random, registers };
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

// Where class tokens stand in a sequence, or their rows in a table: at first, first + step, ...
struct ClassPlaces {
    std::int64_t first = 0, step = 1, count = 0;
    std::int64_t at(std::int64_t k) const { return first + k * step; }
    static ClassPlaces one(std::int64_t at) { return {at, 1, 1}; }
    bool operator==(const ClassPlaces&) const = default;
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
    std::int64_t registers = 0;       // class tokens of ClassToken::registers, evenly among the patches; else 0
    std::int64_t neck_reduction = 1;  // registers reach the head narrowed to embed_dim / neck_reduction; 1: as they are
    Pool pool = Pool::mean;           // read-out without class token
    bool pos_embed = true, rope = false, rope_residual = false;
    std::int64_t rope_grid = 14;
    double drop_rate = 0.0, drop_path_rate = 0.0;  // training only
    std::int64_t frames = 0;                       // of a clip, whose patches are one sequence; 0: images

    std::int64_t grid_height() const { return (img_height - patch_size) / stride + 1; }
    std::int64_t grid_width() const { return (img_width - patch_size) / stride + 1; }
    Grid grid() const { return {grid_height(), grid_width()}; }
    std::int64_t clip_frames() const { return frames > 0 ? frames : 1; }
    std::int64_t patches() const { return clip_frames() * grid().count(); }  // of an image or of a clip
    std::int64_t class_tokens() const { return class_places().count; }
    std::int64_t tokens() const { return patches() + class_tokens(); }
    ClassPlaces class_places() const;     // of the class tokens in eval
    std::int64_t class_position() const;  // index of the (first) class token in eval, -1 without
    Grid table_grid() const;              // of the position table
    // Whether the positions of the tokens have to be made of several tables, or of one for another grid.
    bool composes_positions() const
    {
        return pos_embed && (!(table_grid() == grid()) || class_token == ClassToken::registers || frames > 0);
    }

    // Whether the head is applied to every token: Pool::max takes the largest of the results, Pool::all all of them.
    bool head_per_token() const { return class_token == ClassToken::none && (pool == Pool::max || pool == Pool::all); }
    std::int64_t readout_width() const;  // numbers that the head sees: of one token, or of all registers together
    std::int64_t outputs() const { return num_classes > 0 ? num_classes : readout_width(); }  // of one logit vector
    Shape logits_shape(std::int64_t batch) const;  // (batch, outputs()), or (batch, tokens(), outputs()) for Pool::all
    Shape images_shape(std::int64_t batch) const;  // (batch, channels, height, width); of clips frames before height
    std::string images_axes() const;               // "(B, 3, 224, 224)", for messages
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
