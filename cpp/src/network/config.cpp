// SPDX-License-Identifier: Apache-2.0
#include "vimcore/config.h"

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "files/json.h"
#include "vimcore/positions.h"

namespace vimcore {
namespace {

using json::Value;
template <class T, std::size_t count>
using Names = std::array<std::pair<T, const char*>, count>;
using Wide = __int128;

constexpr Names<Directions, 5> direction_names{{{Directions::none, "none"},
                                                {Directions::sequence, "sequence"},
                                                {Directions::block, "block"},
                                                {Directions::ssm, "ssm"},
                                                {Directions::ssm_conv, "ssm_conv"}}};
constexpr Names<ClassToken, 6> class_token_names{{{ClassToken::none, "none"},
                                                  {ClassToken::head, "head"},
                                                  {ClassToken::double_, "double"},
                                                  {ClassToken::middle, "middle"},
                                                  {ClassToken::random, "random"},
                                                  {ClassToken::registers, "registers"}}};
constexpr Names<Pool, 4> pool_names{
    {{Pool::mean, "mean"}, {Pool::max, "max"}, {Pool::last, "last"}, {Pool::all, "all"}}};
constexpr Names<Norm, 2> norm_names{{{Norm::rms, "rms"}, {Norm::layer, "layer"}}};

template <class T, std::size_t count>
const char* name_in(const Names<T, count>& names, T value, const char* option)
{
    for (const auto& [entry, name] : names)
        if (entry == value) return name;
    throw std::invalid_argument(std::string("[config] ") + option + ": unknown value " +
                                std::to_string(static_cast<int>(value)));
}

template <class T, std::size_t count>
T value_in(const Names<T, count>& names, const std::string& text, const std::string& what)
{
    std::string known;
    for (const auto& [entry, name] : names) {
        if (text == name) return entry;
        known += std::string(known.empty() ? "\"" : ", \"") + name + '"';
    }
    throw std::invalid_argument(what + ": expected one of " + known + ", got \"" + json::printable(text, 40) + '"');
}

[[noreturn]] void fail(const std::string& option, const std::string& what)
{
    throw std::invalid_argument("[config] " + option + ": " + what);
}

void check_range(const char* option, std::int64_t value, std::int64_t low, std::int64_t high)
{
    if (value < low || value > high)
        fail(option,
             "expected " + std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(value));
}

void check_rate(const char* option, double value)
{
    if (!(value >= 0.0 && value < 1.0)) fail(option, "expected at least 0 and below 1, got " + std::to_string(value));
}

void check_registers(const Config& c)
{
    if (c.class_token != ClassToken::registers) {
        if (c.registers != 0)
            fail("registers", "needs class_token \"registers\", got \"" + std::string(name_of(c.class_token)) + '"');
        if (c.neck_reduction != 1) fail("neck_reduction", "needs class_token \"registers\"");
        return;
    }
    if (c.registers < 1 || c.registers >= c.patches())
        fail("registers", "expected 1 to " + std::to_string(c.patches() - 1) + ", fewer than the patches, got " +
                              std::to_string(c.registers));
    if (c.embed_dim % c.neck_reduction != 0 || (c.neck_reduction > 1 && c.registers % c.neck_reduction != 0))
        fail("neck_reduction", "expected a divisor of embed_dim, " + std::to_string(c.embed_dim) +
                                   ", and of registers, " + std::to_string(c.registers) + ", got " +
                                   std::to_string(c.neck_reduction));
}

void check_clips(const Config& c)
{
    if (c.stride != c.patch_size)
        fail("frames", "needs stride equal to patch_size, got " + std::to_string(c.stride) + " and " +
                           std::to_string(c.patch_size));
    if (c.img_height % c.patch_size != 0 || c.img_width % c.patch_size != 0)
        fail("img_size", "of clips: expected multiples of patch_size, " + std::to_string(c.patch_size) + ", got " +
                             std::to_string(c.img_height) + " x " + std::to_string(c.img_width));
    if (c.rope) fail("frames", "does not go with rope, whose coordinates are those of an image");
    if (c.class_token == ClassToken::random) fail("frames", "does not go with class_token \"random\"");
}

// Multiply-adds of one image or clip; needs only sizes within the limits of validate().
Wide count_flops(const Config& config)
{
    const Wide tokens = config.tokens(), width = config.embed_dim, inner = config.inner(), state = config.d_state;
    const Wide rank = config.rank();
    const int scans = config.two_directions() ? 2 : 1;
    const int branches = config.directions == Directions::ssm_conv ? 2 : 1;  // "ssm" shares all but the scan
    const Wide branch = config.d_conv * inner + (rank + 2 * state) * inner + rank * inner;
    const Wide per_token = 2 * inner * width + inner * width + branches * branch + scans * 4 * inner * state;
    const Wide patch = Wide{config.patches()} * config.in_chans * config.patch_size * config.patch_size * width;
    const Wide neck = config.neck_reduction > 1 ? Wide{config.readout_width()} * width : 0;
    const Wide head = Wide{config.num_classes} * config.readout_width() * (config.head_per_token() ? tokens : 1);
    return tokens * config.depth * per_token + patch + neck + head;
}

// A number that null leaves as it is.
void set_optional(std::int64_t& out, const Value& value, const std::string& what)
{
    if (value.kind == json::Kind::null) return;
    out = value.as_integer(what);
    if (out < 1) throw std::invalid_argument(what + ": expected at least 1 or none, got " + std::to_string(out));
}

void set_option(Config& config, const std::string& key, const Value& value, bool& has_stride)
{
    const std::string what = "[config] " + json::printable(key, 40);
    const auto integer = [&](std::int64_t& out) { out = value.as_integer(what); };
    const auto boolean = [&](bool& out) { out = value.as_boolean(what); };
    const auto real = [&](double& out) { out = value.as_real(what); };

    if (key == "img_size") {
        if (value.kind == json::Kind::integer) {
            config.img_height = config.img_width = value.number.integer;
        } else {
            if (value.kind != json::Kind::array || value.items.size() != 2)
                throw std::invalid_argument(what + ": expected an integer or [height, width]");
            config.img_height = value.items[0].as_integer(what);
            config.img_width = value.items[1].as_integer(what);
        }
    } else if (key == "patch_size") {
        integer(config.patch_size);
    } else if (key == "stride") {
        if (value.kind == json::Kind::null) return;  // as patch_size
        integer(config.stride);
        has_stride = true;
    } else if (key == "in_chans") {
        integer(config.in_chans);
    } else if (key == "num_classes") {
        integer(config.num_classes);
    } else if (key == "embed_dim") {
        integer(config.embed_dim);
    } else if (key == "depth") {
        integer(config.depth);
    } else if (key == "d_state") {
        integer(config.d_state);
    } else if (key == "d_conv") {
        integer(config.d_conv);
    } else if (key == "expand") {
        integer(config.expand);
    } else if (key == "dt_rank") {
        if (value.kind == json::Kind::string) {
            if (value.string != "auto") throw std::invalid_argument(what + ": expected \"auto\" or an integer");
            config.dt_rank = 0;
        } else {
            integer(config.dt_rank);
            check_range("dt_rank", config.dt_rank, 1, std::int64_t{1} << 20);  // 0 is not a spelling of "auto"
        }
    } else if (key == "directions") {
        config.directions = value_in(direction_names, value.as_string(what), what);
    } else if (key == "average_directions") {
        boolean(config.average_directions);
    } else if (key == "class_token") {
        config.class_token = value_in(class_token_names, value.as_string(what), what);
    } else if (key == "registers") {
        set_optional(config.registers, value, what);
    } else if (key == "neck_reduction") {
        integer(config.neck_reduction);
    } else if (key == "pool") {
        config.pool = value_in(pool_names, value.as_string(what), what);
    } else if (key == "norm") {
        config.norm = value_in(norm_names, value.as_string(what), what);
    } else if (key == "norm_eps") {
        real(config.norm_eps);
    } else if (key == "pos_embed") {
        boolean(config.pos_embed);
    } else if (key == "rope") {
        boolean(config.rope);
    } else if (key == "rope_residual") {
        boolean(config.rope_residual);
    } else if (key == "rope_grid") {
        integer(config.rope_grid);
    } else if (key == "layer_scale") {
        if (value.kind == json::Kind::null)
            config.layer_scale.reset();
        else
            config.layer_scale = value.as_real(what);
    } else if (key == "drop_rate") {
        real(config.drop_rate);
    } else if (key == "drop_path_rate") {
        real(config.drop_path_rate);
    } else if (key == "frames") {
        set_optional(config.frames, value, what);
    } else {
        throw std::invalid_argument("[config] unknown option \"" + json::printable(key, 40) + '"');
    }
}

// All options, in any order; the stride is that of the patches, and there are 12 registers, unless they are among them.
Config from_values(const std::vector<std::string>& keys, const std::vector<Value>& values)
{
    Config config;
    bool has_stride = false;
    for (std::size_t i = 0; i < keys.size(); ++i) set_option(config, keys[i], values[i], has_stride);
    if (!has_stride) config.stride = config.patch_size;
    if (config.class_token == ClassToken::registers && config.registers == 0) config.registers = 12;
    config.validate();
    return config;
}

}  // namespace

const char* name_of(Directions value) { return name_in(direction_names, value, "directions"); }
const char* name_of(ClassToken value) { return name_in(class_token_names, value, "class_token"); }
const char* name_of(Pool value) { return name_in(pool_names, value, "pool"); }
const char* name_of(Norm value) { return name_in(norm_names, value, "norm"); }

ClassPlaces Config::class_places() const { return vimcore::class_places(class_token, patches(), registers); }

std::int64_t Config::class_position() const
{
    const ClassPlaces places = class_places();
    return places.count > 0 ? places.first : -1;
}

std::int64_t Config::readout_width() const
{
    return class_token == ClassToken::registers ? registers * (embed_dim / neck_reduction) : embed_dim;
}

Shape Config::images_shape(std::int64_t batch) const
{
    if (frames > 0) return {batch, in_chans, frames, img_height, img_width};
    return {batch, in_chans, img_height, img_width};
}

std::string Config::images_axes() const
{
    const Shape shape = images_shape(1);
    std::string text = "(B";
    for (int axis = 1; axis < shape.rank(); axis++) text += ", " + std::to_string(shape[axis]);
    return text + ")";
}

double BlockConfig::direction_scale() const
{
    return directions == Directions::ssm_conv && average_directions ? 0.5 : 1.0;
}

Shape Config::logits_shape(std::int64_t batch) const
{
    if (head_per_token() && pool == Pool::all) return {batch, tokens(), outputs()};
    return {batch, outputs()};
}

Grid Config::table_grid() const
{
    if (table_height == 0 && table_width == 0) return grid();
    return {(table_height - patch_size) / stride + 1, (table_width - patch_size) / stride + 1};
}

Config Config::at_size(std::int64_t height, std::int64_t width) const
{
    Config other = *this;
    if (table_height == 0 && table_width == 0) {
        other.table_height = img_height;
        other.table_width = img_width;
    }
    other.img_height = height;
    other.img_width = width;
    if (height == other.table_height && width == other.table_width) other.table_height = other.table_width = 0;
    other.validate();
    return other;
}

// The limits are far above any use; they keep every product of sizes within 64 bits.
void Config::validate() const
{
    constexpr std::int64_t side = std::int64_t{1} << 20;
    check_range("img_size height", img_height, 1, side);
    check_range("img_size width", img_width, 1, side);
    check_range("patch_size", patch_size, 1, 4096);
    check_range("stride", stride, 1, 4096);
    check_range("in_chans", in_chans, 1, 4096);
    check_range("num_classes", num_classes, 0, 1 << 24);
    check_range("embed_dim", embed_dim, 1, 1 << 16);
    check_range("depth", depth, 1, 4096);
    check_range("d_state", d_state, 1, 4096);
    check_range("d_conv", d_conv, 1, 256);
    check_range("expand", expand, 1, 64);
    check_range("dt_rank", dt_rank, 0, side);
    check_range("rope_grid", rope_grid, 1, side);
    check_range("registers", registers, 0, 1 << 16);
    check_range("neck_reduction", neck_reduction, 1, embed_dim);
    check_range("frames", frames, 0, 1 << 16);
    name_of(directions);
    name_of(class_token);
    name_of(pool);
    name_of(norm);
    if (!(norm_eps > 0.0 && std::isfinite(norm_eps)))
        fail("norm_eps", "expected a positive number, got " + std::to_string(norm_eps));
    if (layer_scale && !std::isfinite(*layer_scale)) fail("layer_scale", "expected a finite number");
    check_rate("drop_rate", drop_rate);
    check_rate("drop_path_rate", drop_path_rate);

    if (stride > patch_size)
        fail("stride", "expected at most patch_size, " + std::to_string(patch_size) + ", got " +
                           std::to_string(stride) + ": the pixels between the patches would never be read");
    if (img_height < patch_size || img_width < patch_size)
        fail("img_size", "image of " + std::to_string(img_height) + " x " + std::to_string(img_width) +
                             " is smaller than a patch of " + std::to_string(patch_size));
    if (table_height != 0 || table_width != 0) {
        check_range("table height", table_height, patch_size, side);
        check_range("table width", table_width, patch_size, side);
    }
    check_registers(*this);
    if (frames > 0) check_clips(*this);
    if (tokens() > std::numeric_limits<std::int32_t>::max())
        fail("img_size", "gives " + std::to_string(tokens()) + " tokens; at most 2147483647 are supported");
    if (directions == Directions::block && depth % 2 != 0)
        fail("depth", "directions \"block\" needs an even depth, got " + std::to_string(depth));
    if (rope_residual && !rope) fail("rope_residual", "needs rope");
    if (rope) {
        if (embed_dim % 4 != 0) fail("rope", "needs embed_dim divisible by 4, got " + std::to_string(embed_dim));
        if (stride != patch_size)
            fail("rope", "needs stride equal to patch_size, got " + std::to_string(stride) + " and " +
                             std::to_string(patch_size));
        if (class_token != ClassToken::none && class_token != ClassToken::head)
            fail("rope", "needs class_token \"none\" or \"head\", got \"" + std::string(name_of(class_token)) + '"');
    }
    if (count_flops(*this) > std::numeric_limits<std::int64_t>::max())
        fail("img_size", "the network is too large: its operations cannot be counted in 64 bits");
}

std::int64_t Config::flops() const { return static_cast<std::int64_t>(count_flops(*this)); }

Options Config::options() const
{
    const auto real = [](const std::optional<double>& value) { return value ? Option(*value) : Option(); };
    const bool table = table_height != 0;  // what the weights were made for
    return {
        {"img_size", std::vector<Option>{table ? table_height : img_height, table ? table_width : img_width}},
        {"patch_size", patch_size},
        {"stride", stride},
        {"in_chans", in_chans},
        {"num_classes", num_classes},
        {"embed_dim", embed_dim},
        {"depth", depth},
        {"d_state", d_state},
        {"d_conv", d_conv},
        {"expand", expand},
        {"dt_rank", dt_rank > 0 ? Option(dt_rank) : Option(std::string("auto"))},
        {"directions", std::string(name_of(directions))},
        {"average_directions", average_directions},
        {"class_token", std::string(name_of(class_token))},
        {"registers", registers > 0 ? Option(registers) : Option()},
        {"neck_reduction", neck_reduction},
        {"pool", std::string(name_of(pool))},
        {"norm", std::string(name_of(norm))},
        {"norm_eps", norm_eps},
        {"pos_embed", pos_embed},
        {"rope", rope},
        {"rope_residual", rope_residual},
        {"rope_grid", rope_grid},
        {"layer_scale", real(layer_scale)},
        {"drop_rate", drop_rate},
        {"drop_path_rate", drop_path_rate},
        {"frames", frames > 0 ? Option(frames) : Option()},
    };
}

Config Config::from_options(const Options& options)
{
    std::vector<std::string> keys;
    std::vector<Value> values;
    for (const auto& [key, option] : options) {
        keys.push_back(key);
        values.push_back(json::value_of(option));
    }
    return from_values(keys, values);
}

std::string Config::to_json() const { return json::object(options()); }

Config Config::from_json(std::string_view text)
{
    const Value root = json::parse(text);
    root.require_object("[config]");
    return from_values(root.keys, root.items);
}

}  // namespace vimcore
