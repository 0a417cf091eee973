// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "core/activations.h"
#include "core/backend.h"
#include "vimcore/model.h"
#include "vimcore/plan.h"

namespace vimcore {

namespace {

Shape result_shape(const Config& c, std::int64_t count, bool features)
{
    return features ? c.tokens_shape(count) : c.logits_shape(count);
}

Outputs outputs_to(const Tensor& result, bool features)
{
    Outputs out;
    (features ? out.tokens : out.logits) = result;
    return out;
}

// x and y are float32; between them activations are of type `dtype`. The CPU converts images as it cuts them.
void compute(Context& ctx, const Model& model, DType dtype, const Tensor& x, const Tensor& y, bool features)
{
    Arena::Scope scope(arena_of(ctx));
    const bool narrow = dtype != DType::f32, copied = narrow && ctx.device().type != Device::Type::cpu;
    const Tensor images = copied ? arena_of(ctx).take(x.shape, dtype) : x;
    const Tensor result = narrow ? arena_of(ctx).take(y.shape, dtype) : y;
    if (copied) backend_of(ctx).copy(ctx, x, images);
    forward(ctx, model.config(), model.params(), images, outputs_to(result, features));
    if (narrow) backend_of(ctx).copy(ctx, result, y);
}

}  // namespace

// Where images and results of a session lie on its device, and what was recorded there.
class Staging {
public:
    Staging(const Model& model, const SessionOptions& options, Context& ctx)
        : model_(model), options_(options), stream_(backend_of(ctx).make_stream(model.device().index))
    {
        ctx.set_stream(stream_.get());
    }

    // The `count` images at `images` to `result`, both in the host's memory.
    void run(Context& ctx, const float* images, std::int64_t count, float* result, bool features)
    {
        Backend& backend = backend_of(ctx);
        const Tensor x = place(images_, model_.config().images_shape(count));
        const Tensor y = place(results_, result_shape(model_.config(), count, features));
        backend.upload(ctx, images, x);
        replay(ctx, x, y, features);
        backend.download(ctx, y, result);
    }

private:
    Tensor place(Buffer& buffer, const Shape& shape)
    {
        Tensor tensor{nullptr, shape, DType::f32, model_.device()};
        if (buffer.bytes() < tensor.bytes()) {
            recordings_.clear();
            buffer = Buffer(tensor.bytes(), model_.device());
        }
        tensor.data = buffer.data();
        return tensor;
    }

    // The first run of a batch size lays out memory and packs weights, the second is recorded.
    void replay(Context& ctx, const Tensor& x, const Tensor& y, bool features)
    {
        if (allocations_ != arena_of(ctx).allocations()) recordings_.clear();  // scratch memory has moved
        auto program = [&] { compute(ctx, model_, options_.dtype, x, y, features); };
        auto found = recordings_.find({x.size(0), features});
        if (!options_.graph || found == recordings_.end()) {
            program();
            allocations_ = arena_of(ctx).allocations();
            if (options_.graph) recordings_[{x.size(0), features}] = nullptr;
            return;
        }
        if (!found->second)
            found->second =
                backend_of(ctx).record(ctx, [](void* f) { (*static_cast<decltype(program)*>(f))(); }, &program);
        backend_of(ctx).replay(ctx, found->second.get());
    }

    const Model& model_;
    const SessionOptions options_;
    std::shared_ptr<void> stream_;
    Buffer images_, results_;
    std::size_t allocations_ = 0;
    std::map<std::pair<std::int64_t, bool>, std::shared_ptr<void>> recordings_;  // none: ran once
};

Session::Session(std::shared_ptr<const Model> model, SessionOptions options)
    : model_(std::move(model)), options_(options), ctx_(model_ ? model_->device() : Device::cpu(), options.threads)
{
    if (!model_) throw std::invalid_argument("[session] model: expected a loaded model, got none");
    if (options_.max_batch < 1)
        throw std::invalid_argument("[session] max_batch: expected at least 1, got " +
                                    std::to_string(options_.max_batch));
    const bool cpu = model_->device() == Device::cpu();
    if (model_->only().value_or(options_.dtype) != options_.dtype)
        throw std::invalid_argument("[session] dtype: expected " + std::string(name_of(*model_->only())) +
                                    ", for which alone the model was loaded, got " + name_of(options_.dtype));
    require_activations("session", options_.dtype, model_->device());
    if (cpu)
        require_memory("session", "batches of " + std::to_string(options_.max_batch) + " images",
                       forward_bytes(model_->config(), options_.max_batch, options_.dtype, ctx_.threads()));
    if (!cpu) staging_ = std::make_shared<Staging>(*model_, options_, ctx_);
}

std::int64_t Session::outputs() const { return model_->config().logits_shape(1).numel(); }

std::vector<float> Session::run(const float* images, std::int64_t batch)
{
    std::vector<float> logits(static_cast<std::size_t>(std::max<std::int64_t>(batch, 0) * outputs()));
    run(images, batch, logits.data());
    return logits;
}

void Session::run(const float* images, std::int64_t batch, float* logits) { run(images, batch, logits, false); }

void Session::features(const float* images, std::int64_t batch, float* tokens) { run(images, batch, tokens, true); }

void Session::run(const float* images, std::int64_t batch, float* result, bool features)
{
    if (batch < 0) throw std::invalid_argument("[session] batch: expected 0 or more, got " + std::to_string(batch));
    const Config& c = model_->config();
    const std::int64_t image = c.images_shape(1).numel(), row = result_shape(c, 1, features).numel();
    for (std::int64_t b = 0; b < batch; b += options_.max_batch) {
        const std::int64_t count = std::min(options_.max_batch, batch - b);
        if (staging_) {
            staging_->run(ctx_, images + b * image, count, result + b * row, features);
            continue;
        }
        const Tensor x{const_cast<float*>(images) + b * image, c.images_shape(count), DType::f32, {}};
        const Tensor y{result + b * row, result_shape(c, count, features), DType::f32, {}};
        compute(ctx_, *model_, options_.dtype, x, y, features);
    }
}

}  // namespace vimcore
