// SPDX-License-Identifier: Apache-2.0
#include "vimcore/params.h"

#include "core/weight_cache.h"
#include "vimcore/positions.h"

namespace vimcore {

void Params::changed()
{
    if (cache)
        cache->invalidate();
    else
        cache = std::make_shared<WeightCache>();
}

namespace {

using Visit = std::function<void(const std::string&, Tensor&, const Shape&)>;

void visit_block(const BlockConfig& c, BlockParams& p, const std::string& layer, const Visit& visit)
{
    const std::int64_t D = c.embed_dim, E = c.inner(), N = c.d_state, R = c.rank(), K = c.d_conv;
    const std::string mixer = layer + "mixer.";
    DirectionParams &f = p.forward, &r = p.reverse;
    const bool own_reverse = c.directions == Directions::ssm_conv;
    if (c.layer_scale) visit(mixer + "gamma", p.gamma, {D});
    visit(mixer + "A_log", f.A_log, {E, N});
    visit(mixer + "D", f.D, {E});
    if (c.two_directions()) visit(mixer + "A_b_log", r.A_log, {E, N});
    if (own_reverse) visit(mixer + "D_b", r.D, {E});
    visit(mixer + "in_proj.weight", p.in_proj, {2 * E, D});
    auto direction = [&](DirectionParams& d, const char* suffix) {
        visit(mixer + "conv1d" + suffix + ".weight", d.conv_weight, {E, 1, K});
        visit(mixer + "conv1d" + suffix + ".bias", d.conv_bias, {E});
        visit(mixer + "x_proj" + suffix + ".weight", d.x_proj, {R + 2 * N, E});
        visit(mixer + "dt_proj" + suffix + ".weight", d.dt_weight, {E, R});
        visit(mixer + "dt_proj" + suffix + ".bias", d.dt_bias, {E});
    };
    direction(f, "");
    if (own_reverse) direction(r, "_b");
    visit(mixer + "out_proj.weight", p.out_proj, {D, E});
    visit(layer + "norm.weight", p.norm_weight, {D});
    if (c.norm == Norm::layer) visit(layer + "norm.bias", p.norm_bias, {D});
}

}  // namespace

void for_each_param(const Config& c, Params& p, const Visit& visit)
{
    const std::int64_t D = c.embed_dim, P = c.patch_size;
    p.blocks.resize(static_cast<std::size_t>(c.depth));
    if (c.class_token == ClassToken::double_) {
        visit("cls_token_head", p.class_token, {1, 1, D});
        visit("cls_token_tail", p.class_token_tail, {1, 1, D});
    } else if (c.class_token != ClassToken::none) {
        visit("cls_token", p.class_token, {1, c.class_tokens(), D});
    }
    if (c.pos_embed) {
        const std::int64_t patches = c.table_grid().count();
        if (c.class_token == ClassToken::registers) visit("pos_embed_cls", p.class_positions, {1, c.registers, D});
        visit("pos_embed", p.pos_embed, {1, patches + table_places(c.class_token, patches).count, D});
        if (c.frames > 0) visit("temporal_pos_embedding", p.frame_positions, {1, c.frames, D});
    }
    visit("patch_embed.proj.weight", p.patch_weight,
          c.frames > 0 ? Shape{D, c.in_chans, 1, P, P} : Shape{D, c.in_chans, P, P});
    visit("patch_embed.proj.bias", p.patch_bias, {D});
    if (c.neck_reduction > 1) {
        visit("neck.weight", p.neck_weight, {D / c.neck_reduction, D});
        visit("norm_neck.weight", p.neck_norm_weight, {c.readout_width()});
        if (c.norm == Norm::layer) visit("norm_neck.bias", p.neck_norm_bias, {c.readout_width()});
    }
    if (c.num_classes > 0) {
        visit("head.weight", p.head_weight, {c.num_classes, c.readout_width()});
        visit("head.bias", p.head_bias, {c.num_classes});
    }
    for (std::int64_t i = 0; i < c.depth; i++)
        visit_block(c, p.blocks[static_cast<std::size_t>(i)], "layers." + std::to_string(i) + ".", visit);
    visit("norm_f.weight", p.norm_weight, {D});
    if (c.norm == Norm::layer) visit("norm_f.bias", p.norm_bias, {D});
}

void for_each_param(const Config& config, const Params& params,
                    const std::function<void(const std::string&, const Tensor&, const Shape&)>& visit)
{
    Params views = params;
    for_each_param(config, views,
                   [&](const std::string& name, Tensor& tensor, const Shape& shape) { visit(name, tensor, shape); });
}

void for_each_param(const Config& config, const std::function<void(const std::string&, const Shape&)>& visit)
{
    Params none;
    for_each_param(config, none, [&](const std::string& name, Tensor&, const Shape& shape) { visit(name, shape); });
}

void for_each_param(const BlockConfig& config, BlockParams& params, const Visit& visit)
{
    visit_block(config, params, "", visit);
}

}  // namespace vimcore
