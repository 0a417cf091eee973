// SPDX-License-Identifier: Apache-2.0
// Model: a network loaded from a vimcore file.
#include "vimcore/model.h"

#include <algorithm>

#include "core/activations.h"
#include "core/backend.h"
#include "files/float_types.h"
#include "files/json.h"
#include "network/linear_weights.h"
#include "vimcore/error.h"
#include "vimcore/model_file.h"
#include "vimcore/plan.h"
#include "vimcore/positions.h"
#include "vimcore/safetensors.h"

namespace vimcore {

namespace {

// A file whose network this is for.
Config config_of(const SafetensorsFile& file, const std::string& path)
{
    const Config stored = ModelFile::describe(file.metadata(), path).config;
    if (const std::string task = task_of(file.metadata(), path); task == "segment")
        throw Error("[load] " + json::printable(path, 1000) +
                    ": a network for segmentation; `vim-infer segment` and `vimcore predict` run it");
    else if (task == "clip")
        throw Error("[load] " + json::printable(path, 1000) +
                    ": an image tower and a text tower; `vimcore search` runs them, "
                    "vimcore.clip.export_image_tower writes the image tower for this");
    else if (task != "classify")
        throw Error("[load] " + json::printable(path, 1000) + ": a network for the task \"" + json::printable(task) +
                    "\"; `vimcore predict` runs it");
    check_tensors(file, stored, path);
    return stored;
}

// The numbers of one weight, in float32; the position table for the grid that is wanted.
void read_weight(const SafetensorsFile& file, const Config& stored, const Config& wanted, const std::string& name,
                 const Shape& shape, float* out)
{
    const Tensor& from = *file.find(name);
    if (name != "pos_embed" || stored.grid() == wanted.grid()) return read_floats(file, from, out);
    const Buffer table(static_cast<std::size_t>(from.numel()) * sizeof(float));
    read_floats(file, from, static_cast<float*>(table.data()));
    Context cpu(Device::cpu(), 1);
    positions_forward(cpu, {.table = {table.data(), from.shape, DType::f32, {}},
                            .out = {out, shape, DType::f32, {}},
                            .resize = table_resize(stored.class_token, stored.grid(), wanted.grid())});
}

}  // namespace

std::shared_ptr<const Model> Model::load(const std::string& path, Device device)
{
    return load(path, ModelOptions{.device = device});
}

std::shared_ptr<const Model> Model::load(const std::string& path, Device device, std::int64_t img_height,
                                         std::int64_t img_width)
{
    return load(path, ModelOptions{.device = device, .img_height = img_height, .img_width = img_width});
}

std::shared_ptr<const Model> Model::load(const std::string& path, const ModelOptions& options)
{
    const Device device = options.device;
    Context ctx(device);
    if (options.only) require_activations("load", *options.only, device);
    const SafetensorsFile file = SafetensorsFile::open(path);
    const Config stored = config_of(file, path);

    auto model = std::make_shared<Model>();
    model->device_ = device;
    model->only_ = options.only;
    model->metadata_ = file.metadata();
    model->config_ = stored;
    if (options.img_height > 0) model->config_.img_height = options.img_height;
    if (options.img_width > 0) model->config_.img_width = options.img_width;
    model->config_.validate();

    // All weights in one block of memory, each on a multiple of 64 bytes; for another device, by way of a copy here.
    const bool here = device == Device::cpu();
    if (here) require_memory("load", path, weight_bytes(model->config_, options.only));
    const WeightLayout layout = lay_out_weights(model->config_, model->params_, device, options.only);
    model->storage_.emplace_back(layout.bytes, device);
    auto* const base = static_cast<char*>(model->storage_.back().data());
    const Buffer staging(here ? 0 : layout.bytes), one(layout.largest_panels * sizeof(float));
    char* const host = here ? base : static_cast<char*>(staging.data());
    std::size_t i = 0;
    for_each_param(model->config_, model->params_, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        const std::size_t at = layout.offsets[i++];
        const bool panels = tensor.dtype == DType::bf16_panels;
        auto* const numbers = static_cast<float*>(panels ? one.data() : host + at);
        read_weight(file, stored, model->config_, name, shape, numbers);
        if (panels) backend_of(ctx).make_panels(numbers, shape[0], shape.numel() / shape[0], host + at);
        tensor.data = base + at;
    });
    if (!here) {
        const Shape all{static_cast<std::int64_t>(layout.bytes / sizeof(float))};
        backend_of(ctx).upload(ctx, host, {base, all, DType::f32, device});
    }
    model->params_.changed();
    return model;
}

}  // namespace vimcore
