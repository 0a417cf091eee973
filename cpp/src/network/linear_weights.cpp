// SPDX-License-Identifier: Apache-2.0
#include "network/linear_weights.h"

#include <algorithm>
#include <limits>
#include <set>

#include "core/backend.h"
#include "vimcore/plan.h"

namespace vimcore {

namespace {

// Weights that an inference reads by linear_forward alone. With layer scale out_proj is multiplied first.
std::set<const Tensor*> linear_weights(const Config& config, Params& p, Device device, std::optional<DType> only)
{
    p.blocks.resize(static_cast<std::size_t>(config.depth));
    if (only != DType::bf16 || device.type != Device::Type::cpu) return {};
    std::set<const Tensor*> found{&p.patch_weight, &p.neck_weight, &p.head_weight};
    for (const BlockParams& block : p.blocks) {
        found.insert({&block.in_proj, &block.forward.x_proj, &block.reverse.x_proj});
        if (!config.layer_scale) found.insert(&block.out_proj);
    }
    return found;
}

}  // namespace

WeightLayout lay_out_weights(const Config& config, Params& params, Device device, std::optional<DType> only)
{
    const std::set<const Tensor*> linear = linear_weights(config, params, device, only);
    WeightLayout layout;
    for_each_param(config, params, [&](const std::string&, Tensor& tensor, const Shape& shape) {
        tensor = {nullptr, shape, DType::f32, device};
        std::size_t bytes = tensor.bytes();
        if (linear.contains(&tensor)) {
            const std::int64_t n = shape[0], k = shape.numel() / std::max<std::int64_t>(n, 1);
            tensor.dtype = DType::bf16_panels;
            bytes = backend_of(device).panel_bytes(n, k);
            layout.largest_panels = std::max(layout.largest_panels, static_cast<std::size_t>(shape.numel()));
        }
        layout.offsets.push_back(layout.bytes);
        layout.bytes += (bytes + 63) / 64 * 64;
    });
    return layout;
}

std::int64_t weight_bytes(const Config& config, std::optional<DType> only)
{
    Params params;
    const std::set<const Tensor*> linear = linear_weights(config, params, Device::cpu(), only);
    double bytes = 0;  // holds absurd sizes, too
    for_each_param(config, params, [&](const std::string&, Tensor& tensor, const Shape& shape) {
        double size = 1;
        for (const std::int64_t side : shape) size *= static_cast<double>(side);
        if (!linear.contains(&tensor))
            bytes += size * sizeof(float);
        else if (size < 0x1p50)
            bytes += static_cast<double>(
                cpu_backend().panel_bytes(shape[0], shape.numel() / std::max<std::int64_t>(shape[0], 1)));
        else
            bytes += size * 2;
    });
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    return bytes < static_cast<double>(largest) ? static_cast<std::int64_t>(bytes) : largest;
}

}  // namespace vimcore
