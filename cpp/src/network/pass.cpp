// SPDX-License-Identifier: Apache-2.0
#include "network/pass.h"

#include <stdexcept>

#include "core/weight_cache.h"

namespace vimcore {

namespace {

DType type_of(const Outputs& outputs, const Tensor& images)
{
    if (outputs.logits) return outputs.logits.dtype;
    if (outputs.tokens) return outputs.tokens.dtype;
    return outputs.intermediates.empty() ? images.dtype : outputs.intermediates[0].dtype;
}

void check_types(const Params& params, const Tensor& images, DType dtype, Device device)
{
    const bool converted = device.type == Device::Type::cpu && images.dtype == wide(dtype);
    if (images.dtype != dtype && !converted)
        throw std::invalid_argument("[forward] images: expected " + std::string(name_of(dtype)) +
                                    " as the outputs, got " + describe(images));
    if (params.norm_weight.dtype != wide(dtype))
        throw std::invalid_argument("[forward] images: expected " + std::string(name_of(params.norm_weight.dtype)) +
                                    " as the parameters, got " + describe(images));
    if (params.patch_weight.dtype == DType::bf16_panels && dtype != DType::bf16)
        throw std::invalid_argument("[forward] outputs: expected bf16, for which alone the weights are kept, got " +
                                    std::string(name_of(dtype)));
}

}  // namespace

Pass::Pass(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Outputs& outputs,
           const Draws& draws)
    : ctx(ctx),
      config(config),
      params(params),
      draws(draws),
      dtype(type_of(outputs, images)),
      batch(images.shape.rank() == (config.frames > 0 ? 5 : 4) ? images.size(0) : 0),
      len(config.tokens()),
      dim(config.embed_dim),
      outer_cache(internals(ctx).cache)
{
    if (!(images.shape == config.images_shape(batch)))
        throw std::invalid_argument("[forward] images: expected " + config.images_axes() + ", got " + describe(images) +
                                    "; Config::at_size is for images of other sizes");
    if (static_cast<std::int64_t>(params.blocks.size()) != config.depth)
        throw std::invalid_argument("[forward] params: expected " + std::to_string(config.depth) + " blocks, got " +
                                    std::to_string(params.blocks.size()));
    check_types(params, images, dtype, ctx.device());
    if (draws.drop_path && !(draws.drop_path.shape == Shape{config.depth, batch}))
        throw std::invalid_argument("[forward] drop_path: expected " + to_string(Shape{config.depth, batch}) +
                                    ", got " + describe(draws.drop_path));
    if (draws.flip && config.directions != Directions::sequence)
        throw std::invalid_argument("[forward] flip: only Directions::sequence runs sequences backwards");
    internals(ctx).cache = params.cache.get();
}

std::int64_t Pass::images_per_group() const
{
    const std::int64_t tile = internals(ctx).tile > 0 ? internals(ctx).tile : backend_of(ctx).tile();
    return std::max<std::int64_t>(1, tile / std::max<std::int64_t>(len, 1));
}

BlockSaved Pass::group(const BlockSaved& saved, std::int64_t begin, std::int64_t end) const
{
    // q and checkpoints lie group by group, so that each group is a contiguous tensor.
    auto piece = [&](const Tensor& tensor) {
        const std::int64_t n = tensor.size(0), row = tensor.numel() / std::max<std::int64_t>(batch, 1);
        return tensor.view({batch, row})
            .slice(begin, end)
            .view({n, end - begin, tensor.size(2), row / (n * tensor.size(2))});
    };
    BlockSaved part;
    part.chunk = saved.chunk;
    part.residual = saved.residual.slice(begin, end);
    part.xz = saved.xz.slice(begin, end);
    part.q = piece(saved.q);
    const Tensor& c = saved.checkpoints;
    part.checkpoints = piece(c).view({c.size(0), end - begin, c.size(2), c.size(3), c.size(4)});
    return part;
}

ClassPlaces Pass::class_places() const
{
    const bool drawn = config.class_token == ClassToken::random && draws.class_position >= 0;
    return drawn ? ClassPlaces::one(draws.class_position) : config.class_places();
}

Selection Pass::selection() const
{
    if (config.class_token == ClassToken::registers) return {Reduce::join, class_places()};
    if (config.class_token != ClassToken::none) return {Reduce::select, class_places()};
    if (config.pool == Pool::last) return {Reduce::select, ClassPlaces::one(len - 1)};
    return {config.pool == Pool::max ? Reduce::max : Reduce::mean, {}};
}

Tensor Pass::flat_images(const Tensor& images) const
{
    if (config.frames == 0 || !images) return images;
    return images.view({batch, config.in_chans, config.frames * config.img_height, config.img_width});
}

Tensor Pass::patch_weight() const
{
    return params.patch_weight.view({dim, config.in_chans * config.patch_size * config.patch_size});
}

}  // namespace vimcore
