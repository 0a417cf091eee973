// SPDX-License-Identifier: Apache-2.0
// The heads: FCN (and linear, which is one without convolutions) and UperNet. Batch norm is multiplied into the weights
// when they are read.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/backend.h"
#include "core/class_places.h"
#include "files/json.h"
#include "segment/network.h"
#include "vimcore/error.h"
#include "vimcore/params.h"

namespace vimcore {
namespace {

constexpr double norm_eps = 1e-5;

// As many as divide the channels, 32 at most, with four channels or more in each.
std::int64_t norm_groups(std::int64_t channels)
{
    std::int64_t groups = std::max<std::int64_t>(std::min<std::int64_t>(32, channels / 4), 1);
    while (channels % groups) groups--;
    return groups;
}

// A part with its weights.
struct Layer {
    Convolution convolution;
    std::vector<float> scale, shift;  // of a group norm
    std::int64_t groups = 0;
    Activation activation = Activation::none;  // behind it

    void operator()(Context& ctx, const Map& x, const Map& y) const
    {
        convolution(ctx, x, y);
        if (groups > 0)
            group_norm(ctx,
                       {.groups = groups,
                        .eps = norm_eps,
                        .weight = scale.data(),
                        .bias = shift.data(),
                        .activation = activation},
                       y);
    }
};

class Reader {
public:
    Reader(const SegmentationFile& about, const SafetensorsFile& file, const std::string& path)
        : about_(about), file_(file), path_(path)
    {
    }

    Layer layer(const Part& part) const
    {
        const auto out = static_cast<std::size_t>(part.out);
        std::vector<float> weight = read(part.name + ".weight"), bias(out, 0.0f);
        if (part.bias) bias = read(part.name + ".bias");
        Layer layer;
        if (!part.norm.empty() && about_.group_norm) {
            layer.scale = read(part.norm + ".weight");
            layer.shift = read(part.norm + ".bias");
            layer.groups = norm_groups(part.out);
            layer.activation = part.activation;
        } else if (!part.norm.empty()) {
            fold_norm(part, weight, bias);
        }
        const Activation own = layer.groups ? Activation::none : part.activation;
        layer.convolution = part.up
                                ? Convolution::up(part.in, part.out, weight.data(), bias.data(), own)
                                : Convolution::same(part.kernel, part.in, part.out, weight.data(), bias.data(), own);
        return layer;
    }

private:
    std::vector<float> read(const std::string& name) const
    {
        const Tensor& tensor = *file_.find(name);
        std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
        read_floats(file_, tensor, values.data());
        return values;
    }

    // (w x + b - mean) / sqrt(variance + eps) g + h as one convolution.
    void fold_norm(const Part& part, std::vector<float>& weight, std::vector<float>& bias) const
    {
        const std::vector<float> g = read(part.norm + ".weight"), h = read(part.norm + ".bias");
        const std::vector<float> mean = read(part.norm + ".running_mean"), variance = read(part.norm + ".running_var");
        std::vector<double> factor(g.size());
        for (std::size_t o = 0; o < g.size(); o++) {
            if (!(variance[o] >= 0) || !std::isfinite(variance[o]))
                throw Error("[load] " + json::printable(path_, 1000) + ": " + part.norm +
                            ".running_var: expected numbers of at least 0, got " + std::to_string(variance[o]));
            factor[o] = g[o] / std::sqrt(double{variance[o]} + norm_eps);
            bias[o] = static_cast<float>((double{bias[o]} - mean[o]) * factor[o] + h[o]);
        }
        const std::size_t taps = weight.size() / g.size() / static_cast<std::size_t>(part.in);
        for (std::size_t i = 0; i < weight.size(); i++) {
            const std::size_t o = part.up ? i / taps % g.size() : i / (taps * static_cast<std::size_t>(part.in));
            weight[i] = static_cast<float>(weight[i] * factor[o]);
        }
    }

    const SegmentationFile& about_;
    const SafetensorsFile& file_;
    const std::string& path_;
};

// The patches of tokens (L, D) as a map.
class Patches2d {
public:
    explicit Patches2d(const Config& config)
        : grid_(config.grid()), dim_(config.embed_dim), places_(config.class_places())
    {
    }

    // less: what is taken away, or none.
    Map operator()(Context& ctx, const Tensor& tokens, std::int64_t margin, const Tensor& less = {}) const
    {
        const Map map = take_map(ctx, grid_.rows, grid_.columns, dim_, margin);
        if (counts(ctx)) return map;
        struct Work {
            const Patches2d& self;
            const Map& map;
            const float *tokens, *less;
        } work{*this, map, tokens.as<float>(), less.as<float>()};
        backend_of(ctx).run_workers(
            ctx, static_cast<int>(grid_.rows),
            [](void* context, int row) {
                static_cast<Work*>(context)->self.copy_row(*static_cast<Work*>(context), row);
            },
            &work);
        return map;
    }

private:
    template <class Work>
    void copy_row(const Work& work, std::int64_t row) const
    {
        for (std::int64_t x = 0; x < grid_.columns; x++) {
            const std::int64_t patch = row * grid_.columns + x;
            const std::int64_t at = place_of(places_, patch) * dim_;
            float* out = work.map.at(row, x);
            for (std::int64_t d = 0; d < dim_; d++)
                out[d] = work.less ? work.tokens[at + d] - work.less[at + d] : work.tokens[at + d];
        }
    }

    Grid grid_;
    std::int64_t dim_;
    ClassPlaces places_;
};

class FcnHead final : public SegmentationHead {
public:
    FcnHead(const SegmentationFile& about, const Config& window, const Reader& reader) : patches_(window)
    {
        layers = {window.depth - 1};
        rows = window.grid_height();
        columns = window.grid_width();
        for (const Part& part : parts_of(about)) steps_.push_back(reader.layer(part));
    }

    void run(Context& ctx, const std::vector<Tensor>& streams, const Map& logits) const override
    {
        Arena::Scope scope(arena_of(ctx));
        Map x = patches_(ctx, streams[0], margin_of(0));
        for (std::size_t i = 0; i + 1 < steps_.size(); i++) {
            const Map y = take_map(ctx, rows, columns, steps_[i].convolution.out(), margin_of(i + 1));
            steps_[i](ctx, x, y);
            x = y;
        }
        steps_.back()(ctx, x, logits);
    }

private:
    std::int64_t margin_of(std::size_t step) const { return steps_[step].convolution.kernel() / 2; }

    Patches2d patches_;
    std::vector<Layer> steps_;
};

class UperHead final : public SegmentationHead {
public:
    UperHead(const SegmentationFile& about, const Config& window, const Reader& reader)
        : patches_(window),
          exponents_(level_exponents(window.patch_size)),
          mixer_(about.taps == SegmentationFile::Taps::mixer),
          dim_(window.embed_dim),
          channels_(about.channels)
    {
        for (const std::int64_t index : about.indices) {
            layers.push_back(index);
            if (mixer_) layers.push_back(index - 1);
        }
        std::sort(layers.begin(), layers.end());
        layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
        for (std::size_t i = 0; i < 4; i++) {
            taps_[i] = place_of(about.indices[i]);
            if (mixer_) before_[i] = place_of(about.indices[i] - 1);
            heights_[i] = side_of(window.grid_height(), exponents_[i]);
            widths_[i] = side_of(window.grid_width(), exponents_[i]);
        }
        rows = heights_[0];
        columns = widths_[0];
        const std::vector<Part> parts = parts_of(about);
        auto next = parts.begin();
        for (std::size_t level = 0; level < 2; level++)
            for (int i = 0; i < exponents_[level]; i++) up_[level].push_back(reader.layer(*next++));
        for (Layer& layer : pooled_) layer = reader.layer(*next++);
        bottleneck_ = reader.layer(*next++);
        for (std::size_t i = 0; i < 3; i++) {
            lateral_[i] = reader.layer(*next++);
            fpn_[i] = reader.layer(*next++);
        }
        fusion_ = reader.layer(*next++);
        classifier_ = reader.layer(*next++);
    }

    void run(Context& ctx, const std::vector<Tensor>& streams, const Map& logits) const override
    {
        Arena::Scope scope(arena_of(ctx));
        const std::int64_t c = channels_;
        Map path[4];
        for (std::size_t i = 0; i < 4; i++) path[i] = take_map(ctx, heights_[i], widths_[i], c, i < 3 ? 1 : 0);
        top(ctx, streams, path[3]);
        for (std::size_t i = 3; i-- > 0;) {
            Arena::Scope level(arena_of(ctx));
            lateral_[i](ctx, map_of(ctx, streams, i), path[i]);
            resize_linear(ctx, path[i + 1], path[i], true);
        }
        const Map all = take_map(ctx, rows, columns, 4 * c, 1);
        fpn_[0](ctx, path[0], all.part(0, c));
        for (std::size_t i = 1; i < 3; i++) {
            Arena::Scope level(arena_of(ctx));
            const Map own = take_map(ctx, heights_[i], widths_[i], c);
            fpn_[i](ctx, path[i], own);
            resize_linear(ctx, own, all.part(static_cast<std::int64_t>(i) * c, c), false);
        }
        resize_linear(ctx, path[3], all.part(3 * c, c), false);
        const Map fused = take_map(ctx, rows, columns, c);
        fusion_(ctx, all, fused);
        classifier_(ctx, fused, logits);
    }

private:
    std::size_t place_of(std::int64_t layer) const
    {
        return static_cast<std::size_t>(std::find(layers.begin(), layers.end(), layer) - layers.begin());
    }
    Map patches_of(Context& ctx, const std::vector<Tensor>& streams, std::size_t level) const
    {
        return patches_(ctx, streams[taps_[level]], 0, mixer_ ? streams[before_[level]] : Tensor{});
    }

    // The neck's map of levels 0 to 2.
    Map map_of(Context& ctx, const std::vector<Tensor>& streams, std::size_t level) const
    {
        Map x = patches_of(ctx, streams, level);
        for (std::size_t i = 0; level < 2 && i < up_[level].size(); i++) {
            const Map y = take_map(ctx, 2 * x.height, 2 * x.width, dim_);
            up_[level][i](ctx, x, y);
            x = y;
        }
        if (exponents_[level] >= 0) return x;
        const Map y = take_map(ctx, heights_[level], widths_[level], dim_);
        max_pool(ctx, x, std::int64_t{1} << -exponents_[level], y);
        return y;
    }

    // The coarsest level beside its means over bins, fused.
    void top(Context& ctx, const std::vector<Tensor>& streams, const Map& out) const
    {
        Arena::Scope scope(arena_of(ctx));
        const Map all = take_map(ctx, out.height, out.width, bottleneck_.convolution.in(), 1), own = all.part(0, dim_);
        max_pool(ctx, patches_of(ctx, streams, 3), std::int64_t{1} << -exponents_[3], own);
        for (std::size_t i = 0; i < pool_bins.size(); i++) {
            const Map bins = take_map(ctx, pool_bins[i], pool_bins[i], dim_);
            const Map pooled = take_map(ctx, pool_bins[i], pool_bins[i], channels_);
            average_pool(ctx, own, bins);
            pooled_[i](ctx, bins, pooled);
            resize_linear(ctx, pooled, all.part(dim_ + static_cast<std::int64_t>(i) * channels_, channels_), false);
        }
        bottleneck_(ctx, all, out);
    }

    Patches2d patches_;
    std::array<int, 4> exponents_;
    bool mixer_;
    std::int64_t dim_, channels_;
    std::array<std::size_t, 4> taps_{}, before_{};  // places in `layers`
    std::array<std::int64_t, 4> heights_{}, widths_{};
    std::array<std::vector<Layer>, 2> up_;
    std::array<Layer, pool_bins.size()> pooled_;
    std::array<Layer, 3> lateral_, fpn_;
    Layer bottleneck_, fusion_, classifier_;
};

}  // namespace

std::unique_ptr<SegmentationHead> make_head(const SegmentationFile& about, const Config& window,
                                            const SafetensorsFile& file, const std::string& path)
{
    const Reader reader(about, file, path);
    if (about.head == SegmentationFile::Head::uper) return std::make_unique<UperHead>(about, window, reader);
    return std::make_unique<FcnHead>(about, window, reader);
}

}  // namespace vimcore
