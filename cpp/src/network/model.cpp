// SPDX-License-Identifier: Apache-2.0
// Model: a network loaded from a vimcore file.
#include "vimcore/model.h"
#include "core/backend.h"
#include "files/float_types.h"
#include "files/json.h"
#include "vimcore/error.h"
#include "vimcore/model_file.h"
#include "vimcore/plan.h"
#include "vimcore/positions.h"
#include "vimcore/safetensors.h"

namespace vimcore {

std::shared_ptr<const Model> Model::load(const std::string& path, Device device) { return load(path, device, 0, 0); }

std::shared_ptr<const Model> Model::load(const std::string& path, Device device, std::int64_t img_height,
                                         std::int64_t img_width)
{
    Context ctx(device);
    const SafetensorsFile file = SafetensorsFile::open(path);
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

    auto model = std::make_shared<Model>();
    model->device_ = device;
    model->metadata_ = file.metadata();
    model->config_ = stored;
    if (img_height > 0) model->config_.img_height = img_height;
    if (img_width > 0) model->config_.img_width = img_width;
    model->config_.validate();

    check_tensors(file, stored, path);

    // All weights in one block of memory, each on a multiple of 64 bytes; for another device, by way of a copy here.
    const auto room = [](const Shape& shape) { return (shape.numel() + 15) / 16 * 16; };
    std::int64_t size = 0;
    for_each_param(model->config_, model->params_, [&](const std::string&, Tensor& tensor, const Shape& shape) {
        tensor = {nullptr, shape, DType::f32, device};
        size += room(shape);
    });
    if (device == Device::cpu()) require_memory("load", path, weight_bytes(model->config_));
    model->storage_.emplace_back(static_cast<std::size_t>(size) * sizeof(float), device);
    auto* const base = static_cast<float*>(model->storage_.back().data());
    const bool here = device == Device::cpu();
    const Buffer staging(here ? 0 : model->storage_.back().bytes());
    float* const host = here ? base : static_cast<float*>(staging.data());
    const Grid grid = model->config_.grid();
    std::int64_t at = 0;
    for_each_param(model->config_, model->params_, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        const Tensor& from = *file.find(name);
        if (name == "pos_embed" && !(stored.grid() == grid)) {
            const Buffer table(static_cast<std::size_t>(from.numel()) * sizeof(float));
            read_floats(file, from, static_cast<float*>(table.data()));
            Context cpu(Device::cpu(), 1);
            positions_forward(cpu, {.table = {table.data(), from.shape, DType::f32, {}},
                                    .out = {host + at, shape, DType::f32, {}},
                                    .resize = table_resize(stored.class_token, stored.grid(), grid)});
        } else {
            read_floats(file, from, host + at);
        }
        tensor.data = base + at;
        at += room(shape);
    });
    if (!here) backend_of(ctx).upload(ctx, host, {base, {size}, DType::f32, device});
    model->params_.changed();
    return model;
}

}  // namespace vimcore
