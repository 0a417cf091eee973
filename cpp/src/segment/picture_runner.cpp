// SPDX-License-Identifier: Apache-2.0
#include "segment/picture_runner.h"

#include <stdexcept>
#include <utility>

#include "images/image_formats.h"
#include "vimcore/plan.h"

namespace vimcore {

namespace {

Places slice(const Places& places, std::int64_t begin, std::int64_t end)
{
    const auto at = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
    return {places.left.subspan(at, count), places.right.subspan(at, count), places.part.subspan(at, count)};
}

int luminance(const std::uint8_t* rgb) { return (19595 * rgb[0] + 38470 * rgb[1] + 7471 * rgb[2] + 32768) >> 16; }

// Rounded to 8 bits before it is resized, as a picture of one channel would have been.
Image grey(Image image)
{
    for (std::size_t i = 0; i < image.pixels.size(); i += 3) {
        std::uint8_t* rgb = image.pixels.data() + i;
        rgb[0] = rgb[1] = rgb[2] = static_cast<std::uint8_t>(luminance(rgb));
    }
    return image;
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

void PictureRunner::segment(const Image& image, ClassMap& result)
{
    check(image);
    const auto [height, width] = fitted(windows_.about, image.height, image.width);
    if (height > static_cast<std::int64_t>(max_image_side) || width > static_cast<std::int64_t>(max_image_side) ||
        height * width > static_cast<std::int64_t>(max_image_pixels))
        throw std::invalid_argument("[segment] resize: makes " + std::to_string(height) + " x " +
                                    std::to_string(width) + " pixels of " + std::to_string(image.height) + " x " +
                                    std::to_string(image.width) + ", more than 65535 a side or 2^30 in all");
    const bool same = height == image.height && width == image.width;
    Image resized;
    if (!same) resized = resize_linear(windows_.about.mean.size() == 1 ? grey(image) : image, height, width);
    result.height = image.height;
    result.width = image.width;
    result.classes.resize(static_cast<std::size_t>(image.height * image.width));
    whole(same ? image : resized, result);
}

void PictureRunner::check(const Image& image) const
{
    if (windows_.about.mean.empty())
        throw std::invalid_argument("[segment] image: the network takes " +
                                    std::to_string(windows_.about.config.in_chans) +
                                    " channels, which no picture has; give it windows");
    const bool sides = image.height > 0 && image.width > 0 &&
                       image.height <= static_cast<std::int64_t>(max_image_side) &&
                       image.width <= static_cast<std::int64_t>(max_image_side);
    if (!sides || image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3))
        throw std::invalid_argument("[segment] image: expected 1 to 65535 pixels a side and 3 bytes for each, got " +
                                    std::to_string(image.height) + " x " + std::to_string(image.width) + " and " +
                                    std::to_string(image.pixels.size()) + " bytes");
}

void PictureRunner::whole(const Image& image, ClassMap& result)
{
    const Windows down{image.height, windows_.about.window_height, windows_.about.stride_height};
    const Windows right{image.width, windows_.about.window_width, windows_.about.stride_width};
    const std::int64_t bands = down.count(), across = right.count();
    if (bands * across > SegmentationSession::max_windows)
        throw std::invalid_argument("[segment] image: " + std::to_string(image.height) + " x " +
                                    std::to_string(image.width) + " pixels are " + std::to_string(bands * across) +
                                    " windows, expected at most " + std::to_string(SegmentationSession::max_windows));
    // A band is needed until the next but one has begun at its end, or a row before it.
    const std::int64_t kept = std::min(bands, (down.window + 1) / down.stride + 2), size = across * windows_.coarse();
    const std::int64_t rows = piece_count(windows_.ctx, result.height) * row_floats(image.width);
    require_memory("segment", "a picture of " + std::to_string(across) + " windows in a row",
                   windows_.bytes() + 4 * (kept * size + rows));
    coarse_.resize(static_cast<std::size_t>(kept * size));

    Arena::Scope scope(arena_of(windows_.ctx));
    const Stage stage{.image = image,
                      .result = result,
                      .right = right,
                      .rows = take_places(windows_.ctx, image.height, result.height),
                      .columns = take_places(windows_.ctx, image.width, result.width),
                      .window_rows = take_places(windows_.ctx, windows_.rows, windows_.about.window_height),
                      .window_columns = take_places(windows_.ctx, windows_.columns, windows_.about.window_width)};
    live_.clear();
    std::int64_t done = 0;  // rows of the result
    for (std::int64_t k = 0; k < bands; k++) {
        float* to = coarse_.data() + k % kept * size;
        for (std::int64_t i = 0; i < across; i += windows_.together) {
            const std::int64_t count = std::min(windows_.together, across - i);
            cut(image, down.start(k), right, i, count);
            windows_.run(pixels_.data(), count, to + i * windows_.coarse());
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
void PictureRunner::cut(const Image& image, std::int64_t top, const Windows& right, std::int64_t first,
                        std::int64_t count)
{
    const std::int64_t height = windows_.about.window_height, width = windows_.about.window_width;
    const auto channels = static_cast<std::int64_t>(windows_.about.mean.size());
    pixels_.resize(static_cast<std::size_t>(count * channels * height * width));
    if (table_.empty()) {
        for (std::size_t c = 0; c < windows_.about.mean.size(); c++)
            for (int v = 0; v < 256; v++)
                table_.push_back((static_cast<float>(v) / 255.0f - static_cast<float>(windows_.about.mean[c])) /
                                 static_cast<float>(windows_.about.std[c]));
    }
    for_pieces(windows_.ctx, count * height, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
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

// Rows [first, last) of the result, whose windows are all there.
void PictureRunner::finish(const Stage& stage, std::int64_t first, std::int64_t last)
{
    if (first == last) return;
    Arena::Scope scope(arena_of(windows_.ctx));
    const std::int64_t length = stage.image.width * windows_.classes, room = row_floats(stage.image.width);
    const Tensor own = arena_of(windows_.ctx).take({piece_count(windows_.ctx, last - first), room}, DType::f32);
    for_pieces(windows_.ctx, last - first, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
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
            arg_max_row(part > 0 ? mixed : above, windows_.classes, stage.columns,
                        stage.result.classes.data() + r * stage.result.width);
        }
    });
}

// The mean of the windows' logits on row `r` of the resized picture, (width, classes).
void PictureRunner::average(const Stage& stage, std::int64_t r, float* out, float* coarse_row) const
{
    const std::int64_t across = stage.right.count(), length = windows_.columns * windows_.classes;
    std::int64_t bands = 0;
    for (const Band& band : live_) {
        if (r < band.start || r >= band.end) continue;
        const auto y = static_cast<std::size_t>(r - band.start);
        std::int64_t covered = bands > 0 ? stage.image.width : 0;  // columns that hold a sum already
        for (std::int64_t k = 0; k < across; k++) {
            const float* coarse = band.coarse + k * windows_.coarse();
            blend_row(coarse + stage.window_rows.left[y] * length, coarse + stage.window_rows.right[y] * length,
                      stage.window_rows.part[y], coarse_row, length);
            const std::int64_t left = stage.right.start(k), right = stage.right.end(k);
            const std::int64_t middle = std::clamp(covered, left, right);
            stretch_row(coarse_row, windows_.classes, slice(stage.window_columns, 0, middle - left),
                        out + left * windows_.classes, true);
            stretch_row(coarse_row, windows_.classes, slice(stage.window_columns, middle - left, right - left),
                        out + middle * windows_.classes, false);
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
            for (std::int64_t c = 0; c < windows_.classes; c++) out[x * windows_.classes + c] /= count;
    }
}

}  // namespace vimcore
