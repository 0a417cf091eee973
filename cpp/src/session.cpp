// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>

#include "vimcore/model.h"

namespace vimcore {

Session::Session(std::shared_ptr<const Model> model, SessionOptions options)
    : model_(std::move(model)), options_(options), ctx_(Device::cpu(), options.threads)
{
    if (!model_) throw std::invalid_argument("[session] model: expected a loaded model, got none");
    if (options_.max_batch < 1)
        throw std::invalid_argument("[session] max_batch: expected at least 1, got " +
                                    std::to_string(options_.max_batch));
}

std::int64_t Session::outputs() const
{
    const Config& c = model_->config();
    const std::int64_t columns = c.num_classes > 0 ? c.num_classes : c.embed_dim;
    return c.class_token == ClassToken::none && c.pool == Pool::all ? c.tokens() * columns : columns;
}

std::vector<float> Session::run(const float* images, std::int64_t batch)
{
    std::vector<float> logits(static_cast<std::size_t>(batch * outputs()));
    run(images, batch, logits.data());
    return logits;
}

namespace {

// Calls f(first image, images in the group, tensor of the group) for groups of at most max_batch images.
template <class F>
void for_each_batch(const Config& c, const float* images, std::int64_t batch, std::int64_t max_batch, F&& f)
{
    if (batch < 0) throw std::invalid_argument("[session] batch: expected 0 or more, got " + std::to_string(batch));
    const Shape image{c.in_chans, c.img_height, c.img_width};
    for (std::int64_t b = 0; b < batch; b += max_batch) {
        const std::int64_t count = std::min(max_batch, batch - b);
        f(b, count,
          Tensor{
              const_cast<float*>(images) + b * image.numel(), {count, image[0], image[1], image[2]}, DType::f32, {}});
    }
}

}  // namespace

void Session::run(const float* images, std::int64_t batch, float* logits)
{
    const Config& c = model_->config();
    const bool per_token = c.class_token == ClassToken::none && c.pool == Pool::all;
    for_each_batch(c, images, batch, options_.max_batch, [&](std::int64_t first, std::int64_t count, const Tensor& x) {
        float* to = logits + first * outputs();
        Outputs out;
        out.logits = per_token ? Tensor{to, {count, c.tokens(), outputs() / c.tokens()}, DType::f32, {}}
                               : Tensor{to, {count, outputs()}, DType::f32, {}};
        forward(ctx_, c, model_->params(), x, out);
    });
}

void Session::features(const float* images, std::int64_t batch, float* tokens)
{
    const Config& c = model_->config();
    for_each_batch(c, images, batch, options_.max_batch, [&](std::int64_t first, std::int64_t count, const Tensor& x) {
        Outputs out;
        out.tokens = {tokens + first * c.tokens() * c.embed_dim, {count, c.tokens(), c.embed_dim}, DType::f32, {}};
        forward(ctx_, c, model_->params(), x, out);
    });
}

}  // namespace vimcore
