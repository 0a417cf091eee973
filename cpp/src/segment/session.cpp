// SPDX-License-Identifier: Apache-2.0
// SegmentationSession: windows through the network, and from its coarse logits to the class of every pixel. Logits at
// the resolution of pixels exist a row at a time: what is kept of a window are its coarse ones, and those only until
// the rows of pixels that they reach are done.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/counting.h"
#include "core/weight_cache.h"
#include "images/image_formats.h"
#include "segment/network.h"
#include "segment/windows.h"
#include "vimcore/error.h"
#include "vimcore/plan.h"
#include "vimcore/preprocess.h"

namespace vimcore {

namespace {

// f(piece, begin, end) for a few pieces of [0, count) for each thread, side by side.
std::int64_t piece_count(Context& ctx, std::int64_t count)
{
    return std::min<std::int64_t>(count, ctx.threads() > 1 ? 4 * ctx.threads() : 1);
}
template <class F>
void for_pieces(Context& ctx, std::int64_t count, F&& f)
{
    struct Work {
        F& f;
        std::int64_t count, pieces;
    } work{f, count, piece_count(ctx, count)};
    backend_of(ctx).run_workers(
        ctx, static_cast<int>(work.pieces),
        [](void* context, int index) {
            const Work& w = *static_cast<Work*>(context);
            w.f(static_cast<std::int64_t>(index), index * w.count / w.pieces, (index + 1) * w.count / w.pieces);
        },
        &work);
}

Places slice(const Places& places, std::int64_t begin, std::int64_t end)
{
    const auto at = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
    return {places.left.subspan(at, count), places.right.subspan(at, count), places.part.subspan(at, count)};
}

bool finite(const float* values, std::int64_t count)
{
    constexpr int lanes = 16;
    float zero[lanes] = {};  // a number times 0 is 0 unless it is none
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int k = 0; k < lanes; k++) zero[k] += values[i + k] * 0.0f;
    for (; i < count; i++) zero[0] += values[i] * 0.0f;
    for (int k = 1; k < lanes; k++) zero[0] += zero[k];
    return zero[0] == 0;
}

}  // namespace

std::pair<std::int64_t, std::int64_t> fitted(const SegmentationFile& about, std::int64_t height, std::int64_t width)
{
    if (!about.resize) return {height, width};
    const auto real = [](std::int64_t side) { return static_cast<double>(side); };
    const double scale = std::min(real(about.resize->long_side) / real(std::max(height, width)),
                                  real(about.resize->short_side) / real(std::min(height, width)));
    const auto side = [&](std::int64_t old) {
        return std::max<std::int64_t>(static_cast<std::int64_t>(real(old) * scale + 0.5), 1);
    };
    return {side(height), side(width)};
}

class SegmentationSession::Runner {
public:
    Runner(std::shared_ptr<const SegmentationModel> model, int threads)
        : model_(std::move(model)),
          about_(model_->about_),
          network_(*model_->network_),
          ctx_(Device::cpu(), threads),
          together_(std::clamp<std::int64_t>(ctx_.threads(), 1, 8)),
          classes_(static_cast<std::int64_t>(about_.classes.size())),
          rows_(network_.head->rows),
          columns_(network_.head->columns)
    {
        require_memory("segment", "a window", window_bytes());
    }

    std::int64_t classes() const { return classes_; }
    std::int64_t coarse() const { return rows_ * columns_ * classes_; }

    void logits(const float* images, std::int64_t batch, float* out)
    {
        const std::int64_t height = about_.window_height, width = about_.window_width;
        each_image(images, batch, [&](std::int64_t b, const float* coarse) {
            with_rows(
                coarse,
                [&](const Places& x, std::int64_t y, const float* row, float* pixels) {
                    stretch_row(row, classes_, x, pixels, false);
                    for (std::int64_t c = 0; c < classes_; c++) {
                        float* to = out + ((b * classes_ + c) * height + y) * width;
                        for (std::int64_t i = 0; i < width; i++) to[i] = pixels[i * classes_ + c];
                    }
                },
                width * classes_, height);
        });
    }

    void classes(const float* images, std::int64_t batch, std::uint8_t* out)
    {
        const std::int64_t height = about_.window_height, width = about_.window_width;
        each_image(images, batch, [&](std::int64_t b, const float* coarse) {
            with_rows(
                coarse,
                [&](const Places& x, std::int64_t y, const float* row, float*) {
                    arg_max_row(row, classes_, x, out + (b * height + y) * width);
                },
                0, height);
        });
    }

    void segment(const Image& image, ClassMap& result)
    {
        check(image);
        const auto [height, width] = fitted(about_, image.height, image.width);
        if (height > static_cast<std::int64_t>(max_image_side) || width > static_cast<std::int64_t>(max_image_side) ||
            height * width > static_cast<std::int64_t>(max_image_pixels))
            throw std::invalid_argument("[segment] resize: makes " + std::to_string(height) + " x " +
                                        std::to_string(width) + " pixels of " + std::to_string(image.height) + " x " +
                                        std::to_string(image.width) + ", more than 65535 a side or 2^30 in all");
        const bool same = height == image.height && width == image.width;
        Image resized;
        if (!same) resized = resize_linear(about_.mean.size() == 1 ? grey(image) : image, height, width);
        result.height = image.height;
        result.width = image.width;
        result.classes.resize(static_cast<std::size_t>(image.height * image.width));
        whole(same ? image : resized, result);
    }

private:
    // ---- the network ---------------------------------------------------------------------------------------------
    struct Streams {
        Outputs outputs;                // of all windows
        std::vector<Tensor> of_window;  // (L, D) of one
    };

    // count windows (count, channels, h, w) to their coarse logits (count, rows, columns, classes).
    void run(Context& ctx, Streams& streams, const float* images, std::int64_t count, float* out) const
    {
        const Config& config = network_.window;
        Arena::Scope scope(arena_of(ctx));
        streams.outputs.layers = network_.head->layers;
        streams.outputs.intermediates.clear();
        for (std::size_t i = 0; i < streams.outputs.layers.size(); i++)
            streams.outputs.intermediates.push_back(arena_of(ctx).take(config.tokens_shape(count), DType::f32));
        const Tensor x{const_cast<float*>(images), config.images_shape(count), DType::f32, {}};
        forward(ctx, config, network_.weights.params, x, streams.outputs);
        for_each_step(ctx, 0, count, 1, [&](std::int64_t b) {
            streams.of_window.clear();
            for (const Tensor& tokens : streams.outputs.intermediates) streams.of_window.push_back(tokens[b]);
            const Map logits{out + b * coarse(), rows_, columns_, classes_, classes_, columns_ * classes_};
            run_together(ctx, [&] { network_.head->run(ctx, streams.of_window, logits); });
        });
    }

    void run(const float* images, std::int64_t count, float* out)
    {
        run(ctx_, streams_, images, count, out);
        if (!finite(out, count * coarse()))
            throw Error("[segment] the network gives values that are not finite; its weights are damaged");
    }

    // Counted: scratch memory of the network on `together_` windows, and their logits.
    std::int64_t window_bytes() const
    {
        const std::int64_t backbone = forward_bytes(network_.window, together_, DType::f32, ctx_.threads());
        if (backbone > machine_bytes()) return backbone;
        const std::unique_ptr<Backend> backend = counting_cpu();
        Context counted = ContextInternals::make(*backend, Device::cpu(), ctx_.threads(), Arena::Mode::counting);
        auto* nowhere = static_cast<float*>(placeholder_memory(0));
        Streams streams;
        run(counted, streams, nowhere, together_, nowhere);
        const double scratch = static_cast<double>(arena_of(counted).most_bytes());
        const double results = 4.0 * static_cast<double>(together_) * static_cast<double>(coarse());
        return static_cast<std::int64_t>(std::min(scratch + results, 9e18)) + backbone;
    }

    // f(image, coarse logits)
    template <class F>
    void each_image(const float* images, std::int64_t batch, F&& f)
    {
        const std::int64_t image = network_.window.images_shape(1).numel();
        coarse_.resize(static_cast<std::size_t>(std::min(batch, together_) * coarse()));
        for (std::int64_t b = 0; b < batch; b += together_) {
            const std::int64_t count = std::min(together_, batch - b);
            run(images + b * image, count, coarse_.data());
            for (std::int64_t i = 0; i < count; i++) f(b + i, coarse_.data() + i * coarse());
        }
    }

    // f(columns, y, the coarse row of pixel row y, `extra` floats of its own) for the first `height` rows of a window.
    template <class F>
    void with_rows(const float* coarse, F&& f, std::int64_t extra, std::int64_t height)
    {
        Arena::Scope scope(arena_of(ctx_));
        const Places y = take_places(ctx_, rows_, about_.window_height);
        const Places x = take_places(ctx_, columns_, about_.window_width);
        const std::int64_t length = columns_ * classes_;
        const Tensor own = arena_of(ctx_).take({piece_count(ctx_, height), length + extra}, DType::f32);
        for_pieces(ctx_, height, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
            float* row = own.as<float>() + piece * (length + extra);
            for (std::int64_t r = begin; r < end; r++) {
                const auto i = static_cast<std::size_t>(r);
                blend_row(coarse + y.left[i] * length, coarse + y.right[i] * length, y.part[i], row, length);
                f(x, r, row, row + length);
            }
        });
    }

    // ---- a whole picture -----------------------------------------------------------------------------------------
    void check(const Image& image) const
    {
        if (about_.mean.empty())
            throw std::invalid_argument("[segment] image: the network takes " + std::to_string(about_.config.in_chans) +
                                        " channels, which no picture has; give it windows");
        const bool sides = image.height > 0 && image.width > 0 &&
                           image.height <= static_cast<std::int64_t>(max_image_side) &&
                           image.width <= static_cast<std::int64_t>(max_image_side);
        if (!sides || image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3))
            throw std::invalid_argument(
                "[segment] image: expected 1 to 65535 pixels a side and 3 bytes for each, got " +
                std::to_string(image.height) + " x " + std::to_string(image.width) + " and " +
                std::to_string(image.pixels.size()) + " bytes");
    }

    // The coarse logits of a row of windows.
    struct Band {
        std::int64_t start = 0, end = 0;  // rows of the resized picture
        const float* coarse = nullptr;    // of its windows, one after the other
    };

    void whole(const Image& image, ClassMap& result)
    {
        const Windows down{image.height, about_.window_height, about_.stride_height};
        const Windows right{image.width, about_.window_width, about_.stride_width};
        const std::int64_t bands = down.count(), across = right.count();
        if (bands * across > max_windows)
            throw std::invalid_argument("[segment] image: " + std::to_string(image.height) + " x " +
                                        std::to_string(image.width) + " pixels are " + std::to_string(bands * across) +
                                        " windows, expected at most " + std::to_string(max_windows));
        // A band is needed until the next but one has begun at its end, or a row before it.
        const std::int64_t kept = std::min(bands, (down.window + 1) / down.stride + 2), size = across * coarse();
        require_memory("segment", "a picture of " + std::to_string(across) + " windows in a row",
                       window_bytes() + kept * size * 4 + (3 * image.width + columns_) * classes_ * 64);
        coarse_.resize(static_cast<std::size_t>(kept * size));

        Arena::Scope scope(arena_of(ctx_));
        const Stage stage{.image = image,
                          .result = result,
                          .right = right,
                          .rows = take_places(ctx_, image.height, result.height),
                          .columns = take_places(ctx_, image.width, result.width),
                          .window_rows = take_places(ctx_, rows_, about_.window_height),
                          .window_columns = take_places(ctx_, columns_, about_.window_width)};
        live_.clear();
        std::int64_t done = 0;  // rows of the result
        for (std::int64_t k = 0; k < bands; k++) {
            float* to = coarse_.data() + k % kept * size;
            for (std::int64_t i = 0; i < across; i += together_) {
                const std::int64_t count = std::min(together_, across - i);
                cut(image, down.start(k), right, i, count);
                run(pixels_.data(), count, to + i * coarse());
            }
            if (static_cast<std::int64_t>(live_.size()) == kept) live_.erase(live_.begin());
            live_.push_back({down.start(k), down.end(k), to});
            const std::int64_t ready = k + 1 < bands ? down.start(k + 1) : image.height;
            std::int64_t next = done;
            while (next < result.height && stage.rows.right[static_cast<std::size_t>(next)] < ready) next++;
            finish(stage, done, next);
            done = next;
        }
    }

    // Windows [first, first + count) of a row of them, normalised, zero beyond the picture, to pixels_.
    void cut(const Image& image, std::int64_t top, const Windows& right, std::int64_t first, std::int64_t count)
    {
        const std::int64_t height = about_.window_height, width = about_.window_width;
        const auto channels = static_cast<std::int64_t>(about_.mean.size());
        pixels_.resize(static_cast<std::size_t>(count * channels * height * width));
        if (table_.empty()) {
            for (std::size_t c = 0; c < about_.mean.size(); c++)
                for (int v = 0; v < 256; v++)
                    table_.push_back((static_cast<float>(v) / 255.0f - static_cast<float>(about_.mean[c])) /
                                     static_cast<float>(about_.std[c]));
        }
        for_pieces(ctx_, count * height, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            for (std::int64_t task = begin; task < end; task++) {
                const std::int64_t k = task / height, y = task % height, left = right.start(first + k);
                const std::int64_t there = top + y < image.height ? right.end(first + k) - left : 0;
                const std::uint8_t* from = image.pixels.data() + ((top + y) * image.width + left) * 3;
                for (std::int64_t c = 0; c < channels; c++) {
                    const float* table = table_.data() + 256 * c;
                    float* to = pixels_.data() + ((k * channels + c) * height + y) * width;
                    for (std::int64_t x = 0; x < there; x++)
                        to[x] = table[channels == 3 ? from[3 * x + c] : luminance(from + 3 * x)];
                    std::fill(to + there, to + width, 0.0f);
                }
            }
        });
    }

    static int luminance(const std::uint8_t* rgb)
    {
        return (19595 * rgb[0] + 38470 * rgb[1] + 7471 * rgb[2] + 32768) >> 16;
    }

    // Rounded to 8 bits before it is resized, as a picture of one channel would have been.
    static Image grey(Image image)
    {
        for (std::size_t i = 0; i < image.pixels.size(); i += 3) {
            std::uint8_t* rgb = image.pixels.data() + i;
            rgb[0] = rgb[1] = rgb[2] = static_cast<std::uint8_t>(luminance(rgb));
        }
        return image;
    }

    struct Stage {
        const Image& image;  // resized
        ClassMap& result;
        Windows right;
        Places rows, columns;  // of the result, in the resized picture
        Places window_rows, window_columns;
    };

    // Rows [first, last) of the result, whose windows are all there.
    void finish(const Stage& stage, std::int64_t first, std::int64_t last)
    {
        if (first == last) return;
        Arena::Scope scope(arena_of(ctx_));
        const std::int64_t length = stage.image.width * classes_, room = 3 * length + columns_ * classes_;
        const Tensor own = arena_of(ctx_).take({piece_count(ctx_, last - first), room}, DType::f32);
        for_pieces(ctx_, last - first, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
            float *above = own.as<float>() + piece * room, *below = above + length, *mixed = below + length;
            float* coarse_row = mixed + length;
            std::int64_t at[2] = {-1, -1};  // rows of the resized picture that `above` and `below` hold
            for (std::int64_t r = first + begin; r < first + end; r++) {
                const auto i = static_cast<std::size_t>(r);
                const std::int64_t top = stage.rows.left[i], bottom = stage.rows.right[i];
                const float part = stage.rows.part[i];
                if (at[0] != top && at[1] == top) std::swap(above, below), std::swap(at[0], at[1]);
                if (at[0] != top) average(stage, top, above, coarse_row), at[0] = top;
                if (part > 0 && at[1] != bottom) average(stage, bottom, below, coarse_row), at[1] = bottom;
                if (part > 0) blend_row(above, below, part, mixed, length);
                arg_max_row(part > 0 ? mixed : above, classes_, stage.columns,
                            stage.result.classes.data() + r * stage.result.width);
            }
        });
    }

    // The mean of the windows' logits on row `r` of the resized picture, (width, classes).
    void average(const Stage& stage, std::int64_t r, float* out, float* coarse_row) const
    {
        const std::int64_t across = stage.right.count(), length = columns_ * classes_;
        std::int64_t bands = 0;
        for (const Band& band : live_) {
            if (r < band.start || r >= band.end) continue;
            const auto y = static_cast<std::size_t>(r - band.start);
            std::int64_t covered = bands > 0 ? stage.image.width : 0;  // columns that hold a sum already
            for (std::int64_t k = 0; k < across; k++) {
                const float* coarse = band.coarse + k * this->coarse();
                blend_row(coarse + stage.window_rows.left[y] * length, coarse + stage.window_rows.right[y] * length,
                          stage.window_rows.part[y], coarse_row, length);
                const std::int64_t left = stage.right.start(k), right = stage.right.end(k);
                const std::int64_t middle = std::clamp(covered, left, right);
                stretch_row(coarse_row, classes_, slice(stage.window_columns, 0, middle - left), out + left * classes_,
                            true);
                stretch_row(coarse_row, classes_, slice(stage.window_columns, middle - left, right - left),
                            out + middle * classes_, false);
                covered = std::max(covered, right);
            }
            bands++;
        }
        if (bands == 1 && across == 1) return;
        std::int64_t first = 0, last = 0;  // windows that cover column x
        for (std::int64_t x = 0; x < stage.image.width; x++) {
            while (last < across && stage.right.start(last) <= x) last++;
            while (stage.right.end(first) <= x) first++;
            const auto count = static_cast<float>(bands * (last - first));
            if (count > 1)
                for (std::int64_t c = 0; c < classes_; c++) out[x * classes_ + c] /= count;
        }
    }

    const std::shared_ptr<const SegmentationModel> model_;
    const SegmentationFile& about_;
    const SegmentationModel::Network& network_;
    Context ctx_;
    const std::int64_t together_;  // windows that run through the backbone together
    const std::int64_t classes_, rows_, columns_;
    std::vector<float> coarse_, pixels_, table_;
    std::vector<Band> live_;
    Streams streams_;
};

SegmentationSession::SegmentationSession(std::shared_ptr<const SegmentationModel> model, int threads)
{
    if (!model) throw std::invalid_argument("[segment] model: expected a loaded model, got none");
    runner_ = std::make_unique<Runner>(std::move(model), threads);
}

SegmentationSession::~SegmentationSession() = default;

void SegmentationSession::logits(const float* images, std::int64_t batch, float* logits)
{
    if (batch < 0) throw std::invalid_argument("[segment] batch: expected 0 or more, got " + std::to_string(batch));
    runner_->logits(images, batch, logits);
}

void SegmentationSession::classes(const float* images, std::int64_t batch, std::uint8_t* classes)
{
    if (batch < 0) throw std::invalid_argument("[segment] batch: expected 0 or more, got " + std::to_string(batch));
    runner_->classes(images, batch, classes);
}

void SegmentationSession::segment(const Image& image, ClassMap& result) { runner_->segment(image, result); }

ClassMap SegmentationSession::segment(const Image& image)
{
    ClassMap result;
    runner_->segment(image, result);
    return result;
}

}  // namespace vimcore
