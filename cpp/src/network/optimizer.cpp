// SPDX-License-Identifier: Apache-2.0
#include "vimcore/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "vimcore/error.h"

namespace vimcore {

namespace {

bool ends_with(const std::string& text, const char* end)
{
    const std::size_t length = std::strlen(end);
    return text.size() >= length && text.compare(text.size() - length, length, end) == 0;
}

bool is_decayed(const std::string& name, const Shape& shape, const AdamWOptions& options)
{
    if (shape.rank() <= 1 || name == "pos_embed" || name.rfind("cls_token", 0) == 0) return false;
    return options.decay_A_log || !(ends_with(name, ".A_log") || ends_with(name, ".A_b_log"));
}

void check_option(const char* what, double value, bool below_one = false)
{
    if (std::isfinite(value) && value >= 0 && !(below_one && value >= 1)) return;
    throw std::invalid_argument(std::string("[adamw] ") + what + ": expected 0 or more" +
                                (below_one ? " and less than 1" : "") + ", got " + std::to_string(value));
}

void check_tensor(const std::string& what, const Tensor& tensor, const Shape& shape)
{
    if (!(tensor.shape == shape) || tensor.dtype != DType::f32 || tensor.device != Device::cpu())
        throw std::invalid_argument(what + ": expected " + to_string(shape) + " f32 cpu, got " + describe(tensor));
}

// Eight sums side by side: one alone would wait for every addition.
double sum_of_squares(const float* values, std::int64_t count)
{
    double sums[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; k++) sums[k] += static_cast<double>(values[i + k]) * static_cast<double>(values[i + k]);
    for (; i < count; i++) sums[0] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

double cross_entropy(const Tensor& logits, std::span<const std::int64_t> labels, const Tensor& dlogits,
                     double smoothing)
{
    const std::int64_t batch = static_cast<std::int64_t>(labels.size());
    if (!logits || logits.shape.rank() != 2 || logits.size(0) != batch || batch < 1 || logits.size(1) < 1 ||
        logits.dtype != DType::f32 || logits.device != Device::cpu())
        throw std::invalid_argument("[cross_entropy] logits: expected (B, classes) f32 cpu for " +
                                    std::to_string(batch) + " labels, at least 1, got " + describe(logits));
    if (dlogits) check_tensor("[cross_entropy] dlogits", dlogits, logits.shape);
    if (!(smoothing >= 0 && smoothing <= 1))
        throw std::invalid_argument("[cross_entropy] smoothing: expected 0 to 1, got " + std::to_string(smoothing));
    const std::int64_t classes = logits.size(1);
    const double even = smoothing / static_cast<double>(classes);
    double total = 0;
    for (std::int64_t b = 0; b < batch; b++) {
        const std::int64_t label = labels[static_cast<std::size_t>(b)];
        if (label < 0 || label >= classes)
            throw std::invalid_argument("[cross_entropy] labels: expected 0 to " + std::to_string(classes - 1) +
                                        ", got " + std::to_string(label));
        const float* row = logits.as<float>() + b * classes;
        const double highest = *std::max_element(row, row + classes);
        double sum = 0;
        for (std::int64_t c = 0; c < classes; c++) sum += std::exp(row[c] - highest);
        const double log_sum = highest + std::log(sum);
        for (std::int64_t c = 0; c < classes; c++) {
            const double wanted = even + (c == label ? 1 - smoothing : 0.0);
            if (wanted > 0) total -= wanted * (row[c] - log_sum);
            if (dlogits)
                dlogits.as<float>()[b * classes + c] =
                    static_cast<float>((std::exp(row[c] - log_sum) - wanted) / static_cast<double>(batch));
        }
    }
    return total / static_cast<double>(batch);
}

AdamW::AdamW(const Config& config, Params& params, Params& gradients, const AdamWOptions& options)
    : options_(options), params_(&params)
{
    check_option("beta1", options.beta1, true);
    check_option("beta2", options.beta2, true);
    check_option("eps", options.eps);
    check_option("weight_decay", options.weight_decay);
    check_option("clip_norm", options.clip_norm);

    std::vector<Tensor> of_gradients;
    for_each_param(config, gradients,
                   [&](const std::string&, Tensor& tensor, const Shape&) { of_gradients.push_back(tensor); });
    std::size_t next = 0, total = 0;
    for_each_param(config, params, [&](const std::string& name, Tensor& weight, const Shape& shape) {
        const Tensor& gradient = of_gradients[next++];
        if (!gradient) return;
        check_tensor("[adamw] " + name, weight, shape);
        check_tensor("[adamw] gradient of " + name, gradient, shape);
        slots_.push_back({weight.as<float>(), gradient.as<float>(), nullptr, nullptr, shape.numel(),
                          is_decayed(name, shape, options)});
        total += static_cast<std::size_t>(shape.numel());
    });
    moments_ = Buffer(2 * total * sizeof(float));
    if (total > 0) std::memset(moments_.data(), 0, moments_.bytes());
    auto* at = static_cast<float*>(moments_.data());
    for (Slot& slot : slots_) {
        slot.m = at;
        slot.v = at + slot.count;
        at += 2 * slot.count;
    }
}

double AdamW::step(double lr)
{
    check_option("lr", lr);
    double squares = 0;
    for (const Slot& slot : slots_) squares += sum_of_squares(slot.gradient, slot.count);
    const double norm = std::sqrt(squares);
    if (!std::isfinite(norm))
        throw Error("[adamw] gradients: expected finite values, got a norm of " + std::to_string(norm));

    steps_++;
    const auto t = static_cast<double>(steps_);
    const double rest1 = 1 - std::pow(options_.beta1, t), rest2 = 1 - std::pow(options_.beta2, t);
    const auto clip =
        static_cast<float>(options_.clip_norm > 0 && norm > options_.clip_norm ? options_.clip_norm / norm : 1.0);
    const auto beta2 = static_cast<float>(options_.beta2), eps = static_cast<float>(options_.eps);
    const auto new1 = static_cast<float>(1 - options_.beta1), new2 = static_cast<float>(1 - options_.beta2);
    const auto rate = static_cast<float>(lr / rest1), spread = static_cast<float>(1 / std::sqrt(rest2));
    for (const Slot& slot : slots_) {
        const auto keep = static_cast<float>(slot.decayed ? 1 - lr * options_.weight_decay : 1.0);
        for (std::int64_t i = 0; i < slot.count; i++) {
            const float g = clip * slot.gradient[i];
            const float m = slot.m[i] + new1 * (g - slot.m[i]), v = beta2 * slot.v[i] + new2 * g * g;
            slot.m[i] = m;
            slot.v[i] = v;
            slot.weight[i] = keep * slot.weight[i] - rate * m / (std::sqrt(v) * spread + eps);
        }
    }
    params_->changed();
    return norm;
}

}  // namespace vimcore
