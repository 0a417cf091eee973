// SPDX-License-Identifier: Apache-2.0
#include "vimcore/preprocess.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "files/json.h"
#include "vimcore/error.h"

namespace vimcore {
namespace {

// The value of a metadata key, or null where the key is absent.
json::Value metadata_value(const Metadata& metadata, const std::string& key)
{
    const auto found = metadata.find(key);
    if (found == metadata.end()) return {};
    try {
        return json::parse(found->second, 16, std::size_t{1} << 25);  // a label is a value; 2^24 classes at most
    } catch (const std::invalid_argument& error) {
        throw Error("[metadata] " + key + ": " + error.what());
    }
}

}  // namespace

std::optional<Preprocess> default_preprocess(const Config& config)
{
    if (config.in_chans != 1 && config.in_chans != 3) return std::nullopt;
    Preprocess steps;
    steps.resize =
        static_cast<std::int64_t>(static_cast<double>(std::min(config.img_height, config.img_width)) / 0.875);
    steps.crop_height = config.img_height;
    steps.crop_width = config.img_width;
    if (config.in_chans == 1) steps.mean = steps.std = {0.5};
    return steps;
}

Preprocess rescaled(const Preprocess& steps, std::int64_t crop_height, std::int64_t crop_width)
{
    if (steps.crop_height == crop_height && steps.crop_width == crop_width) return steps;
    const auto size = static_cast<double>(std::min(crop_height, crop_width));
    const auto crop = static_cast<double>(std::min(steps.crop_height, steps.crop_width));
    Preprocess other = steps;
    other.resize = std::llrint(static_cast<double>(steps.resize) * size / crop);
    other.crop_height = crop_height;
    other.crop_width = crop_width;
    return other;
}

std::optional<Preprocess> preprocess_of(const Config& config, const Metadata& metadata)
{
    const std::string key = "vimcore.preprocess";
    const json::Value stored = metadata_value(metadata, key);
    const bool empty = stored.kind == json::Kind::object && stored.items.empty();
    if (stored.kind == json::Kind::null || empty) return default_preprocess(config);
    Preprocess steps;
    try {
        steps = Preprocess::from_json(metadata.at(key));
    } catch (const std::invalid_argument& error) {
        throw Error("[metadata] " + key + ": " + error.what());
    }
    if (static_cast<std::int64_t>(steps.mean.size()) != config.in_chans)
        throw Error("[metadata] " + key + ": the network takes " + std::to_string(config.in_chans) +
                    " channels, its preprocessing gives " + std::to_string(steps.mean.size()));
    return rescaled(steps, config.img_height, config.img_width);
}

std::vector<std::string> labels_of(const Config& config, const Metadata& metadata)
{
    const std::string key = "vimcore.labels";
    const json::Value stored = metadata_value(metadata, key);
    std::vector<std::string> labels;
    if (stored.kind == json::Kind::null) return labels;
    try {
        for (const json::Value& item : stored.as_array(key)) labels.push_back(item.as_string(key));
    } catch (const std::invalid_argument& error) {
        throw Error(std::string("[metadata] ") + error.what());
    }
    if (!labels.empty() && static_cast<std::int64_t>(labels.size()) != config.num_classes)
        throw Error("[metadata] " + key + ": expected " + std::to_string(config.num_classes) +
                    ", one for each class, got " + std::to_string(labels.size()));
    return labels;
}

void load_image(const std::string& path, const Preprocess& options, float* out)
{
    preprocess(decode_image(path), options, out);
}

void load_image(const void* bytes, std::size_t size, const std::string& name, const Preprocess& options, float* out)
{
    preprocess(decode_image(bytes, size, name), options, out);
}

}  // namespace vimcore
