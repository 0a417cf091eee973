// SPDX-License-Identifier: Apache-2.0
// vimcore::network as an operator of libtorch, for programs without Python that run packages of AOTInductor: inference
// on the CPU. Schema and meaning are those of python/vimcore/autograd/network_operator.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "vimcore/checksum.h"
#include "vimcore/vimcore.h"

namespace {

vimcore::DType dtype_of(const at::Tensor& tensor)
{
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return vimcore::DType::f32;
        case at::kDouble:
            return vimcore::DType::f64;
        case at::kBFloat16:
            return vimcore::DType::bf16;
        default:
            TORCH_CHECK(false, "[vimcore::network] expected float32, float64 or bfloat16, got ", tensor.scalar_type());
    }
}

vimcore::Tensor view_of(const at::Tensor& tensor)
{
    TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous(),
                "[vimcore::network] expected contiguous CPU tensors");
    TORCH_CHECK(tensor.dim() <= vimcore::Shape::max_rank, "[vimcore::network] expected at most 8 axes");
    return {tensor.data_ptr(), vimcore::Shape(tensor.sizes().data(), static_cast<int>(tensor.dim())), dtype_of(tensor),
            vimcore::Device::cpu()};
}

// A network and its weights, which it keeps.
class Bound {
public:
    Bound(std::string text, const std::vector<at::Tensor>& arrays)
        : text_(std::move(text)), config_(vimcore::Config::from_json(text_)), arrays_(arrays)
    {
        std::vector<vimcore::Tensor> all;
        vimcore::for_each_param(
            config_, params_, [&](const std::string& name, vimcore::Tensor& tensor, const vimcore::Shape& shape) {
                TORCH_CHECK(all.size() < arrays_.size(), "[vimcore::network] ", name, ": missing");
                tensor = view_of(arrays_[all.size()]);
                TORCH_CHECK(tensor.shape == shape && tensor.dtype == dtype_of(arrays_[0]), "[vimcore::network] ", name,
                            ": expected ", vimcore::to_string(shape), ", got ", vimcore::describe(tensor));
                all.push_back(tensor);
            });
        TORCH_CHECK(all.size() == arrays_.size(), "[vimcore::network] parameters: too many");
        checksum_ = std::make_unique<vimcore::Checksum>(all);
        params_.changed();
    }

    bool is_of(const std::string& text, const std::vector<at::Tensor>& arrays) const
    {
        return text == text_ && std::equal(arrays.begin(), arrays.end(), arrays_.begin(), arrays_.end(),
                                           [](const auto& a, const auto& b) { return a.data_ptr() == b.data_ptr(); });
    }

    const vimcore::Config& config() const { return config_; }
    vimcore::DType dtype() const { return dtype_of(arrays_[0]); }

    // Packed forms are made anew where somebody wrote to the weights.
    const vimcore::Params& params(vimcore::Context& context)
    {
        const std::uint64_t now = (*checksum_)(context);
        std::lock_guard lock(mutex_);
        if (now != seen_) params_.changed();
        seen_ = now;
        return params_;
    }

private:
    std::string text_;
    vimcore::Config config_;
    std::vector<at::Tensor> arrays_;
    vimcore::Params params_;
    std::unique_ptr<vimcore::Checksum> checksum_;
    std::mutex mutex_;
    std::uint64_t seen_ = 0;
};

// The networks used last: an operator has no place of its own.
std::shared_ptr<Bound> bound_of(const std::string& config, const std::vector<at::Tensor>& arrays)
{
    constexpr std::size_t limit = 8;
    static std::mutex mutex;
    static std::vector<std::shared_ptr<Bound>> all;
    std::lock_guard lock(mutex);
    auto found = std::find_if(all.begin(), all.end(), [&](const auto& bound) { return bound->is_of(config, arrays); });
    if (found == all.end()) {
        if (all.size() == limit) all.erase(all.begin());
        found = all.insert(all.end(), std::make_shared<Bound>(config, arrays));
    }
    std::rotate(found, found + 1, all.end());
    return all.back();
}

// "logits", "tokens", "layers 1,3"
std::vector<std::int64_t> layers_of(const std::string& outputs)
{
    std::vector<std::int64_t> layers;
    if (!outputs.starts_with("layers ")) return layers;
    std::istringstream rest(outputs.substr(7));
    for (std::string layer; std::getline(rest, layer, ',');) layers.push_back(std::stoll(layer));
    return layers;
}

using Absent = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> network(const at::Tensor& given, const std::vector<at::Tensor>& parameters,
                                           std::string config, std::string outputs, std::string,
                                           const Absent& drop_path, const Absent& dropout, const Absent& choices,
                                           bool save, bool)
{
    TORCH_CHECK(!save && !drop_path && !dropout && !choices,
                "[vimcore::network] this library runs inference only; training needs Python");
    TORCH_CHECK(!parameters.empty(), "[vimcore::network] parameters: none");
    std::vector<at::Tensor> arrays;
    for (const at::Tensor& parameter : parameters) arrays.push_back(parameter.contiguous());
    const std::shared_ptr<Bound> bound = bound_of(config, arrays);
    const at::Tensor images = given.contiguous();
    const vimcore::Tensor x = view_of(images);
    const int rank = bound->config().frames > 0 ? 5 : 4;
    TORCH_CHECK(images.dim() == rank && vimcore::wide(x.dtype) == bound->dtype(),
                "[vimcore::network] images: expected ", rank, " axes in the type of the parameters or bfloat16, got ",
                vimcore::describe(x));
    const vimcore::Config here = bound->config().at_size(images.size(rank - 2), images.size(rank - 1));

    std::vector<std::int64_t> layers = layers_of(outputs);
    const bool logits = outputs == "logits";
    TORCH_CHECK(logits || outputs == "tokens" || !layers.empty(), "[vimcore::network] outputs: got ", outputs);
    const vimcore::Shape one = logits ? here.logits_shape(x.size(0)) : here.tokens_shape(x.size(0));
    std::vector<std::int64_t> shape(one.begin(), one.end());
    if (!layers.empty()) shape.insert(shape.begin(), static_cast<std::int64_t>(layers.size()));
    const at::Tensor out = at::empty(shape, images.options());
    const at::Tensor nothing = at::empty({0}, images.options().dtype(at::kByte));
    if (x.size(0) == 0) return {out, nothing};

    vimcore::Outputs wanted;
    if (logits) wanted.logits = view_of(out);
    if (outputs == "tokens") wanted.tokens = view_of(out);
    for (std::size_t i = 0; i < layers.size(); i++)
        wanted.intermediates.push_back(view_of(out[static_cast<std::int64_t>(i)]));
    wanted.layers = std::move(layers);
    thread_local vimcore::Context context;
    context.set_threads(at::get_num_threads());
    vimcore::forward(context, here, bound->params(context), x, wanted);
    return {out, nothing};
}

}  // namespace

TORCH_LIBRARY(vimcore, library)
{
    library.def(
        "network(Tensor images, Tensor[] parameters, str config, str outputs, str memory, Tensor? drop_path, "
        "Tensor? dropout, Tensor? choices, bool save, bool apart) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vimcore, CPU, library) { library.impl("network", &network); }
