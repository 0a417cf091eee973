// SPDX-License-Identifier: Apache-2.0
#include "segment/window_runner.h"

#include "core/activations.h"
#include "core/counting.h"
#include "core/weight_cache.h"
#include "vimcore/error.h"
#include "vimcore/plan.h"

namespace vimcore {

namespace {

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

WindowRunner::WindowRunner(const SegmentationFile& file, const SegmentationNetwork& network, int threads, DType dtype)
    : about(file),
      ctx(Device::cpu(), threads),
      together(std::clamp<std::int64_t>(ctx.threads(), 1, 8)),
      classes(static_cast<std::int64_t>(file.classes.size())),
      rows(network.head->rows),
      columns(network.head->columns),
      network_(network),
      dtype_(dtype)
{
    require_activations("segment", dtype, ctx.device());
    bytes_ = counted_bytes();
    require_memory("segment", "a window", bytes_);
}

void WindowRunner::run(const float* images, std::int64_t count, float* out)
{
    run(ctx, streams_, images, count, out);
    if (!finite(out, count * coarse()))
        throw Error("[segment] the network gives values that are not finite; its weights are damaged");
}

void WindowRunner::run(Context& ctx, Streams& streams, const float* images, std::int64_t count, float* out) const
{
    const Config& config = network_.window;
    Arena::Scope scope(arena_of(ctx));
    streams.outputs.layers = network_.head->layers;
    const bool narrow = dtype_ != DType::f32;
    streams.tokens.clear();
    for (std::size_t i = 0; i < streams.outputs.layers.size(); i++)
        streams.tokens.push_back(arena_of(ctx).take(config.tokens_shape(count), DType::f32));
    streams.outputs.intermediates = streams.tokens;
    const Tensor x{const_cast<float*>(images), config.images_shape(count), DType::f32, {}};
    if (narrow)
        for (Tensor& tokens : streams.outputs.intermediates) tokens = arena_of(ctx).take(tokens.shape, dtype_);
    forward(ctx, config, network_.weights.params, x, streams.outputs);
    for (std::size_t i = 0; narrow && i < streams.tokens.size(); i++)
        backend_of(ctx).copy(ctx, streams.outputs.intermediates[i], streams.tokens[i]);
    for_each_step(ctx, 0, count, 1, [&](std::int64_t b) {
        streams.of_window.clear();
        for (const Tensor& tokens : streams.tokens) streams.of_window.push_back(tokens[b]);
        const Map logits{out + b * coarse(), rows, columns, classes, classes, columns * classes};
        run_together(ctx, [&] { network_.head->run(ctx, streams.of_window, logits); });
    });
}

// Scratch memory of the network on `together` windows, and their logits.
std::int64_t WindowRunner::counted_bytes() const
{
    const std::int64_t backbone = forward_bytes(network_.window, together, dtype_, ctx.threads());
    if (backbone > machine_bytes()) return backbone;
    const std::unique_ptr<Backend> backend = counting_cpu();
    Context counted = ContextInternals::make(*backend, Device::cpu(), ctx.threads(), Arena::Mode::counting);
    auto* nowhere = static_cast<float*>(placeholder_memory(0));
    Streams streams;
    run(counted, streams, nowhere, together, nowhere);
    const double scratch = static_cast<double>(arena_of(counted).most_bytes());
    const double results = 4.0 * static_cast<double>(together) * static_cast<double>(coarse());
    return static_cast<std::int64_t>(std::min(scratch + results, 9e18)) + backbone;
}

}  // namespace vimcore
