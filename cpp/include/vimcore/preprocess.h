// SPDX-License-Identifier: Apache-2.0
// From a picture file to the input of one network: what the network's file says about its pictures and classes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/image.h"

namespace [[gnu::visibility("default")]] vimcore {

using Metadata = std::map<std::string, std::string>;  // as Model::metadata() and SafetensorsFile::metadata()

// ImageNet's evaluation: short side to size / 0.875, centre crop, ImageNet's mean and standard deviation (one channel:
// 0.5); nothing for networks of neither 1 nor 3 channels, whose input is no picture.
std::optional<Preprocess> default_preprocess(const Config& config);

// The same steps for another crop: the short side before it keeps its proportion.
Preprocess rescaled(const Preprocess& steps, std::int64_t crop_height, std::int64_t crop_width);

// The metadata key vimcore.preprocess, with resize and crop scaled where `config` has another image size than the
// file; without the key default_preprocess(). vimcore::Error where the metadata is damaged or gives another number of
// channels than the network takes.
std::optional<Preprocess> preprocess_of(const Config& config, const Metadata& metadata);

// The metadata key vimcore.labels: one text per class, or nothing. vimcore::Error where the metadata is damaged.
std::vector<std::string> labels_of(const Config& config, const Metadata& metadata);

// decode_image, then preprocess. out: (channels, crop_height, crop_width) float32, as for preprocess().
void load_image(const std::string& path, const Preprocess& options, float* out);
void load_image(const void* bytes, std::size_t size, const std::string& name, const Preprocess& options, float* out);

}  // namespace vimcore
