// SPDX-License-Identifier: Apache-2.0
#include "vimcore/weights.h"

#include <cmath>
#include <cstring>
#include <numbers>
#include <stdexcept>

#include "files/float_types.h"
#include "files/json.h"
#include "vimcore/error.h"
#include "vimcore/safetensors.h"

namespace vimcore {

namespace {

// splitmix64: the standard library's distributions differ from one implementation to the next.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    double uniform()  // in (0, 1)
    {
        std::uint64_t x = state_ += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return (static_cast<double>((x ^ x >> 31) >> 12) + 0.5) * 0x1p-52;
    }

    double normal(double deviation)  // cut at -2 and 2, as timm's trunc_normal_
    {
        for (;;) {
            const double radius = std::sqrt(-2 * std::log(uniform()));
            const double value = deviation * radius * std::cos(2 * std::numbers::pi * uniform());
            if (std::fabs(value) <= 2) return value;
        }
    }

private:
    std::uint64_t state_;
};

template <class Draw>
void fill(const Tensor& tensor, Draw&& draw)
{
    for (std::int64_t i = 0; i < tensor.numel(); i++) tensor.as<float>()[i] = static_cast<float>(draw(i));
}

void initialize_tensor(const Config& config, const std::string& name, const Tensor& tensor, Random& random)
{
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const auto constant = [&](double value) { fill(tensor, [=](std::int64_t) { return value; }); };
    const auto normal = [&](double deviation) { fill(tensor, [&](std::int64_t) { return random.normal(deviation); }); };
    const auto uniform = [&](double bound) {
        fill(tensor, [&](std::int64_t) { return bound * (2 * random.uniform() - 1); });
    };
    const bool is_bias = has(".bias"), is_reverse = has("_b.");
    const auto fan_in = static_cast<double>(tensor.numel() / tensor.size(0));

    if (has("A_log") || has("A_b_log")) {
        fill(tensor, [&](std::int64_t i) { return std::log(1.0 + static_cast<double>(i % config.d_state)); });
    } else if (has("temporal_pos_embedding")) {
        constant(0);
    } else if (has("mixer.D")) {
        constant(1);
    } else if (has("mixer.gamma")) {
        constant(config.layer_scale.value());
    } else if (has("norm")) {
        constant(is_bias ? 0 : 1);
    } else if (has("conv1d")) {
        uniform(1 / std::sqrt(static_cast<double>(config.d_conv)));
    } else if (has("dt_proj") && is_bias) {
        fill(tensor, [&](std::int64_t) {  // softplus of it is the time step
            const double step = 0.001 * std::pow(100.0, random.uniform());
            return is_reverse ? 0.0 : step + std::log(-std::expm1(-step));
        });
    } else if (is_bias) {
        constant(0);
    } else if (has("patch_embed")) {
        normal(1 / (0.87962566103423978 * std::sqrt(fan_in)));  // the deviation that cutting at 2 of it leaves
    } else if (has("mixer.")) {
        uniform(1 / std::sqrt(has("out_proj") ? fan_in * static_cast<double>(config.depth) : fan_in));
    } else {
        normal(0.02);  // class tokens, position tables, neck, head
    }
}

// Whether computing in 16 bits rounds this parameter: a matrix, or a convolution that is one; of text towers also by
// torch's names for attention. Those along the tokens, the projection of time steps and embeddings are not.
bool is_rounded(const std::string& name, const Shape& shape)
{
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const bool matrix =
        name.ends_with(".weight") || name.ends_with(".attn.in_proj_weight") || name == "text_projection";
    return shape.rank() >= 2 && matrix && !has("conv1d") && !has("dt_proj") && !has("token_embedding");
}

}  // namespace

Weights::Weights(const Config& config)
{
    config.validate();  // made by hand, most likely, and on the way to memory
    std::size_t bytes = 0;
    const auto lay_out = [&](char* base) {
        bytes = 0;
        count_ = 0;
        for_each_param(config, params, [&](const std::string&, Tensor& tensor, const Shape& shape) {
            tensor = {base ? base + bytes : nullptr, shape, DType::f32, Device::cpu()};
            bytes += (tensor.bytes() + 63) / 64 * 64;
            count_ += shape.numel();
        });
    };
    lay_out(nullptr);
    storage_ = Buffer(bytes);
    lay_out(static_cast<char*>(storage_.data()));
    zero();
}

void Weights::zero()
{
    std::memset(storage_.data(), 0, storage_.bytes());
    params.changed();
}

void initialize(const Config& config, Params& params, std::uint64_t seed)
{
    Random random(seed);
    for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        if (!tensor || !(tensor.shape == shape) || tensor.dtype != DType::f32 || tensor.device != Device::cpu())
            throw std::invalid_argument("[initialize] " + name + ": expected " + to_string(shape) + " f32 cpu, got " +
                                        (tensor ? describe(tensor) : "none"));
        initialize_tensor(config, name, tensor, random);
    });
    params.changed();
}

void save_model(const std::string& path, const Config& config, const Params& params,
                const std::vector<std::string>& labels, const std::optional<Preprocess>& preprocess,
                std::optional<DType> dtype)
{
    std::map<std::string, std::string> metadata{{"vimcore.config", config.to_json()}};
    if (!labels.empty()) {
        if (static_cast<std::int64_t>(labels.size()) != config.num_classes)
            throw std::invalid_argument("[save_model] labels: expected " + std::to_string(config.num_classes) +
                                        ", one for each class, got " + std::to_string(labels.size()));
        std::string list;
        for (const std::string& label : labels) list += (list.empty() ? "[" : ", ") + json::quote(label);
        metadata["vimcore.labels"] = list + ']';
    }
    if (preprocess) metadata["vimcore.preprocess"] = preprocess->to_json();

    std::vector<std::pair<std::string, Tensor>> tensors;
    for_each_param(config, params, [&](const std::string& name, const Tensor& tensor, const Shape& shape) {
        if (!tensor || !(tensor.shape == shape) || tensor.device != Device::cpu())
            throw std::invalid_argument("[save_model] " + name + ": expected " + to_string(shape) +
                                        " on the cpu, got " + (tensor ? describe(tensor) : "none"));
        tensors.emplace_back(name, tensor);
    });
    if (dtype)
        save_weights(path, tensors, metadata, *dtype);
    else
        save_safetensors(path, tensors, metadata);
}

void save_weights(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& tensors,
                  const std::map<std::string, std::string>& metadata, DType dtype)
{
    if (dtype != DType::f32 && dtype != DType::f16 && dtype != DType::bf16)
        throw std::invalid_argument(std::string("[save] dtype: expected f32, f16 or bf16, got ") + name_of(dtype));
    std::vector<std::pair<std::string, Tensor>> stored = tensors;
    std::vector<Buffer> storage;
    const auto make = [&](Tensor& tensor, DType type) {
        const Tensor from = tensor;
        tensor.dtype = type;
        storage.emplace_back(tensor.bytes());
        tensor.data = storage.back().data();
        return from;
    };
    for (auto& [name, tensor] : stored) {
        if (tensor.device != Device::cpu() || !is_float(tensor.dtype)) continue;  // the former is refused below
        if (tensor.dtype != DType::f32) to_float(make(tensor, DType::f32), tensor.as<float>());
        if (dtype == DType::f32 || !is_rounded(name, tensor.shape)) continue;
        const Tensor from = make(tensor, dtype);
        if (!from_float(from.as<float>(), from.numel(), dtype, tensor.data))
            throw Error("[save] " + name + ": holds a number too large for " + name_of(dtype) +
                        "; bf16 has the range of f32");
    }
    save_safetensors(path, stored, metadata);
}

}  // namespace vimcore
