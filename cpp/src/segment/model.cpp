// SPDX-License-Identifier: Apache-2.0
// SegmentationModel: a backbone and its head from a file.
#include <stdexcept>

#include "core/weight_cache.h"
#include "segment/network.h"
#include "vimcore/error.h"
#include "vimcore/params.h"
#include "vimcore/plan.h"
#include "vimcore/safetensors.h"

namespace vimcore {

std::shared_ptr<const SegmentationModel> SegmentationModel::load(const std::string& path, Device device)
{
    if (!(device == Device::cpu()))
        throw std::invalid_argument("[load] device: networks for segmentation run on the cpu, got " +
                                    to_string(device));
    const SafetensorsFile file = SafetensorsFile::open(path);
    auto model = std::make_shared<SegmentationModel>();
    model->about_ = SegmentationFile::describe(file.metadata(), path);
    model->metadata_ = file.metadata();
    const SegmentationFile& about = model->about_;
    about.check_tensors(file, path);
    std::int64_t bytes = 0;
    for (const auto& [name, tensor] : file.tensors())
        bytes += tensor.numel() * static_cast<std::int64_t>(sizeof(float));
    require_memory("load", path, 2 * bytes);  // and packed

    auto network = std::make_shared<SegmentationNetwork>(about.config);
    for_each_param(about.config, network->weights.params, [&](const std::string& name, Tensor& tensor, const Shape&) {
        read_floats(file, *file.find("backbone." + name), tensor.as<float>());
    });
    network->weights.params.changed();
    network->window = about.config.at_size(about.window_height, about.window_width);
    network->head = make_head(about, network->window, file, path);
    model->network_ = std::move(network);
    return model;
}

}  // namespace vimcore
