// SPDX-License-Identifier: Apache-2.0
// SegmentationSession: windows and pictures of one caller.
#include <stdexcept>
#include <utility>

#include "segment/picture_runner.h"

namespace vimcore {

class SegmentationSession::Runner {
public:
    Runner(std::shared_ptr<const SegmentationModel> model, const SegmentationNetwork& network, int threads, DType dtype)
        : model_(std::move(model)), windows_(model_->about(), network, threads, dtype), pictures_(windows_)
    {
    }

    void logits(const float* images, std::int64_t batch, float* out)
    {
        const std::int64_t height = windows_.about.window_height, width = windows_.about.window_width;
        each_image(images, batch, [&](std::int64_t b, const float* coarse) {
            with_rows(
                coarse,
                [&](const Places& x, std::int64_t y, const float* row, float* pixels) {
                    stretch_row(row, windows_.classes, x, pixels, false);
                    for (std::int64_t c = 0; c < windows_.classes; c++) {
                        float* to = out + ((b * windows_.classes + c) * height + y) * width;
                        for (std::int64_t i = 0; i < width; i++) to[i] = pixels[i * windows_.classes + c];
                    }
                },
                width * windows_.classes, height);
        });
    }

    void classes(const float* images, std::int64_t batch, std::uint8_t* out)
    {
        const std::int64_t height = windows_.about.window_height, width = windows_.about.window_width;
        each_image(images, batch, [&](std::int64_t b, const float* coarse) {
            with_rows(
                coarse,
                [&](const Places& x, std::int64_t y, const float* row, float*) {
                    arg_max_row(row, windows_.classes, x, out + (b * height + y) * width);
                },
                0, height);
        });
    }

    void segment(const Image& image, ClassMap& result) { pictures_.segment(image, result); }

private:
    // f(image, coarse logits)
    template <class F>
    void each_image(const float* images, std::int64_t batch, F&& f)
    {
        coarse_.resize(static_cast<std::size_t>(std::min(batch, windows_.together) * windows_.coarse()));
        for (std::int64_t b = 0; b < batch; b += windows_.together) {
            const std::int64_t count = std::min(windows_.together, batch - b);
            windows_.run(images + b * windows_.image(), count, coarse_.data());
            for (std::int64_t i = 0; i < count; i++) f(b + i, coarse_.data() + i * windows_.coarse());
        }
    }

    // f(columns, y, the coarse row of pixel row y, `extra` floats of its own) for the first `height` rows of a window.
    template <class F>
    void with_rows(const float* coarse, F&& f, std::int64_t extra, std::int64_t height)
    {
        Arena::Scope scope(arena_of(windows_.ctx));
        const Places y = take_places(windows_.ctx, windows_.rows, windows_.about.window_height);
        const Places x = take_places(windows_.ctx, windows_.columns, windows_.about.window_width);
        const std::int64_t length = windows_.columns * windows_.classes;
        const Tensor own = arena_of(windows_.ctx).take({piece_count(windows_.ctx, height), length + extra}, DType::f32);
        for_pieces(windows_.ctx, height, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
            float* row = own.as<float>() + piece * (length + extra);
            for (std::int64_t r = begin; r < end; r++) {
                const auto i = static_cast<std::size_t>(r);
                blend_row(coarse + y.left[i] * length, coarse + y.right[i] * length, y.part[i], row, length);
                f(x, r, row, row + length);
            }
        });
    }

    const std::shared_ptr<const SegmentationModel> model_;
    WindowRunner windows_;
    PictureRunner pictures_;
    std::vector<float> coarse_;
};

SegmentationSession::SegmentationSession(std::shared_ptr<const SegmentationModel> model, int threads, DType dtype)
{
    if (!model) throw std::invalid_argument("[segment] model: expected a loaded model, got none");
    runner_ = std::make_unique<Runner>(model, *model->network_, threads, dtype);
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
