// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "clips.h"
#include "progress.h"
#include "text.h"

namespace vim_infer {
namespace {

// "224" or "224x320": height x width.
void parse_size(const std::string& text, std::int64_t& height, std::int64_t& width)
{
    const char *at = text.data(), *last = at + text.size();
    auto side = [&](std::int64_t& value) {
        const auto [end, error] = std::from_chars(at, last, value);
        at = end;
        return error == std::errc() && value > 0;
    };
    bool good = side(height);
    width = height;
    if (good && at != last && *at == 'x') {
        at++;
        good = side(width);
    }
    if (!good || at != last)
        throw UsageError("argument --img-size: expected pixels or HEIGHTxWIDTH, got '" + text + "'");
}

vimcore::Device parse_device(const std::string& text)
{
    try {
        return vimcore::device_from(text);
    } catch (const std::invalid_argument& error) {
        throw UsageError(std::string("argument --") + error.what());
    }
}

vimcore::DType parse_dtype(const std::string& text)
{
    if (text == "float32") return vimcore::DType::f32;
    if (text == "bfloat16") return vimcore::DType::bf16;
    if (text == "float16") return vimcore::DType::f16;
    throw UsageError("argument --dtype: expected float32, bfloat16 or float16, got '" + text + "'");
}

Decode decode_for(const LoadedModel& loaded)
{
    const vimcore::Config& config = loaded.model->config();
    const auto steps = vimcore::preprocess_of(config, loaded.model->metadata());
    if (!steps)
        throw std::runtime_error("the network takes images of " + std::to_string(config.in_chans) +
                                 " channels, which no picture file has");
    return config.frames > 0 ? to_clip(*steps, config.frames) : to_pixels(*steps);
}

}  // namespace

void RunOptions::add_network(Arguments& arguments)
{
    arguments.text("--weights", "FILE", weights, "vimcore safetensors file (required)");
    arguments.custom(
        "--device", "cpu|cuda[:N]", [this](const std::string& text) { device = parse_device(text); },
        "where to compute (default: cpu)");
    arguments.custom(
        "--dtype", "TYPE", [this](const std::string& text) { dtype = parse_dtype(text); },
        "of activations: float32 (default), bfloat16, on cuda float16");
    arguments.positive("--threads", "N", threads, "default: all cores; does not change the result");
}

void RunOptions::add_size(Arguments& arguments)
{
    arguments.custom(
        "--img-size", "N|HxW", [this](const std::string& text) { parse_size(text, img_height, img_width); },
        "another image size than the file's: the position table is resized");
}

void RunOptions::add_pictures(Arguments& arguments, bool batches)
{
    arguments.custom(
        "--list", "FILE", [this](const std::string& text) { images.push_back('@' + text); },
        "pictures and folders, one per line; - is standard input; same as @FILE");
    if (batches) arguments.positive("--batch", "N", batch, "images computed together; does not change the result");
    arguments.flag("--progress", progress, "show progress also where standard error is no terminal");
}

LoadedModel load_model(const RunOptions& options)
{
    if (options.weights.empty()) throw UsageError("the argument --weights is required");
    LoadedModel loaded;
    loaded.model = vimcore::Model::load(options.weights, {.device = options.device,
                                                          .img_height = options.img_height,
                                                          .img_width = options.img_width,
                                                          .only = options.dtype});
    loaded.labels = vimcore::labels_of(loaded.model->config(), loaded.model->metadata());
    return loaded;
}

vimcore::SessionOptions session_options(const RunOptions& options, std::int64_t batch)
{
    return {.max_batch = batch, .threads = static_cast<int>(options.threads), .dtype = options.dtype};
}

Found find_inputs(const RunOptions& options, const LoadedModel& loaded)
{
    return loaded.model->config().frames > 0 ? find_clips(options.images) : find_images(options.images);
}

std::int64_t batch_of(const RunOptions& options, const vimcore::Config& config)
{
    if (options.batch > 0) return options.batch;
    const std::int64_t image = config.images_shape(1).numel();
    return std::clamp<std::int64_t>((std::int64_t{1} << 24) / image, 1, 8);  // 64 MiB of pixels
}

int decoders(const RunOptions& options)
{
    if (options.threads > 0) return static_cast<int>(options.threads);
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Counts run_pictures(
    const RunOptions& options, const LoadedModel& loaded, const Found& found,
    const std::function<void(const float* pixels, std::int64_t count)>& compute,
    const std::function<std::string(const std::string& path, const std::string& error, std::int64_t position)>& emit)
{
    const vimcore::Config& config = loaded.model->config();
    const auto image = static_cast<std::size_t>(config.images_shape(1).numel());
    const auto batch = static_cast<std::size_t>(batch_of(options, config));
    const int threads = decoders(options);
    ImageStream stream(found.paths, decode_for(loaded), threads, batch + static_cast<std::size_t>(threads));
    Progress progress(stream.total(), options.progress);

    Counts counts{.passed_over = found.passed_over, .clips = config.frames > 0};
    std::vector<float> pixels(image * std::min(batch, stream.total()));
    struct Waiting {
        std::string path, error;
    };
    std::vector<Waiting> waiting;
    const auto finish = [&](std::int64_t good) {
        if (good > 0) compute(pixels.data(), good);
        std::int64_t position = 0;
        for (Waiting& picture : waiting) {
            const bool bad = !picture.error.empty();
            const std::string late = emit(picture.path, picture.error, bad ? -1 : position);
            if (!bad) position++;
            counts.total++;
            if (bad || !late.empty()) {
                counts.failed++;
                progress.clear();
                complain(picture.path + ": " + (bad ? picture.error : late));
            }
        }
        waiting.clear();
        progress.advance(counts.total);
    };
    std::size_t good = 0;
    for (Loaded loaded; stream.next(loaded);) {
        if (loaded.error.empty()) std::copy_n(loaded.pixels.data(), image, pixels.data() + image * good++);
        waiting.push_back({loaded.path, loaded.error});
        if (good == batch || waiting.size() == 64 * batch || counts.total + waiting.size() == stream.total()) {
            finish(static_cast<std::int64_t>(good));
            good = 0;
        }
    }
    return counts;
}

bool all_finite(const float* values, std::int64_t count)
{
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

int exit_status(const Counts& counts)
{
    complain_passed_over(counts.passed_over);
    if (counts.total == 0)
        throw std::runtime_error(counts.clips ? "no clips found (folders of pictures, .npy files)"
                                              : "no pictures found (JPEG, PNG, PPM, PGM, WebP, TIFF, BMP, GIF, AVIF)");
    if (counts.failed > 0)
        complain(std::to_string(counts.failed) + " of " + std::to_string(counts.total) +
                 (counts.clips ? " clips failed" : " images failed"));
    return counts.failed > 0 ? 1 : 0;
}

}  // namespace vim_infer
