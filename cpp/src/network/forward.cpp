// SPDX-License-Identifier: Apache-2.0
// The whole network, forward: patches, class tokens and positions, blocks, final norm, read-out, head.
#include <algorithm>
#include <stdexcept>

#include "core/weight_cache.h"
#include "network/head.h"
#include "network/pass.h"
#include "network/positions.h"

namespace vimcore {

namespace {

// images -> h: patches through the projection, class tokens, positions.
void embed(const Pass& pass, const Tensor& images, const Tensor& h)
{
    Arena::Scope scope(arena_of(pass.ctx));
    const Config& c = pass.config;
    const Tensor patches = pass.take({pass.batch, c.patches(), pass.dim}), weight = pass.patch_weight();
    pass.for_each_patch_block([&](std::int64_t b, std::int64_t n, std::int64_t begin, std::int64_t count) {
        Arena::Scope block(arena_of(pass.ctx));
        const Tensor cols = pass.take({n, count, weight.size(1)});
        patches_forward(pass.ctx, {.images = pass.flat_images(images).slice(b, b + n),
                                   .patch = c.patch_size,
                                   .stride = c.stride,
                                   .begin = begin,
                                   .cols = cols});
        const LinearForward args{.x = cols.view({n * count, weight.size(1)}),
                                 .weight = weight,
                                 .bias = pass.params.patch_bias,
                                 .y = pass.patch_rows(patches, b, n, begin, count)};
        linear_forward(pass.ctx, {&args, 1});
    });
    const PositionTable positions(pass);
    tokens_forward(pass.ctx, {.patches = patches,
                              .class_token = {pass.params.class_token, pass.params.class_token_tail},
                              .places = pass.class_places(),
                              .pos_embed = positions.tensor(),
                              .dropout = pass.draws.dropout,
                              .out = h});
}

// The residual stream: h, the last mixer output, and residual, none before the first block.
struct Stream {
    Tensor h, residual;
};

// One layer, or a forward and a reverse one on the same input.
Stream run_layers(const Pass& pass, std::int64_t first, Stream in, Saved* saved, const Tensor (&out)[2],
                  const Tensor (&residual_out)[3], std::int64_t only = -1)
{
    const std::int64_t count = pass.layers_per_step();
    auto residual = [&](std::int64_t k) {
        return saved ? saved->blocks[static_cast<std::size_t>(first + k)].residual : residual_out[k];
    };
    for (std::int64_t k = 0; k < count; k++) {
        const std::int64_t layer = first + k;
        const auto i = static_cast<std::size_t>(layer);
        const Tensor scale = pass.drop_path(layer - 1);
        pass.for_each_group(saved != nullptr, [&](Context& ctx, std::int64_t begin, std::int64_t end) {
            BlockSaved part;
            if (saved) part = pass.group(saved->blocks[i], begin, end);
            const Block block{.h = in.h.slice(begin, end),
                              .row_scale = scale.slice(begin, end),
                              .residual = in.residual.slice(begin, end),
                              .reverse = pass.reverse(layer),
                              .residual_out = residual(k).slice(begin, end),
                              .out = out[k].slice(begin, end),
                              .only = only};
            block_forward(ctx, pass.config, pass.params.blocks[i], block, saved ? &part : nullptr);
        });
    }
    if (count == 1) return {out[0], residual(0)};
    add(pass.ctx, {.a = out[0], .b = out[1], .out = in.h});
    add(pass.ctx, {.a = residual(0), .b = residual(1), .out = residual_out[2]});
    return {in.h, residual_out[2]};
}

// The one token of the last layer that reaches the outputs, or -1 where all do.
std::int64_t last_token(const Pass& pass, const Outputs& out, const Saved* saved)
{
    const Selection selection = pass.selection();
    const bool all = saved || out.tokens || !out.logits || !out.layers.empty() || selection.reduce != Reduce::select ||
                     selection.places.count > 1 || !block_may_stop_early(pass.ctx, pass.config);
    return all ? -1 : selection.places.first;
}

void run(const Pass& pass, const Tensor& images, const Outputs& out, Saved* saved)
{
    Context& ctx = pass.ctx;
    const Config& config = pass.config;
    const Params& params = pass.params;
    Arena::Scope scope(arena_of(ctx));
    const std::int64_t step = pass.layers_per_step();
    Stream stream{pass.take(pass.sequence()), {}};
    embed(pass, images, stream.h);
    const Rotation rotation(pass);

    // A single layer writes its output over its input; a pair needs both outputs until they are added.
    const Tensor outs[2] = {step == 2 ? pass.take(pass.sequence()) : stream.h,
                            step == 2 ? pass.take(pass.sequence()) : Tensor{}};
    Tensor residuals[3];  // of the step's layers where nothing is saved; of a pair, the sum
    for (std::int64_t k = 0; k < step && (!saved || config.rope_residual); k++)
        residuals[k] = pass.take_wide(pass.sequence());
    if (step == 2) residuals[2] = pass.take_wide(pass.sequence());
    std::size_t wanted = 0;
    const std::int64_t only = last_token(pass, out, saved);
    Tensor last, row;  // of that token; taken before the blocks take theirs, which then find the same memory every time
    if (only >= 0) last = pass.take({pass.batch, 1, pass.dim}), row = pass.take_wide({pass.batch, pass.dim});
    for (std::int64_t layer = 0; layer < config.depth; layer += step) {
        if (config.rope) {
            rotation.apply(stream.h, false);
            if (config.rope_residual && stream.residual) {
                if (saved && step == 1) {  // what was saved stays as it is
                    backend_of(ctx).copy(ctx, stream.residual, residuals[0]);
                    stream.residual = residuals[0];
                }
                rotation.apply(stream.residual, false);
            }
        }
        if (only >= 0 && layer == config.depth - 1) {
            stream = run_layers(pass, layer, stream, nullptr, {last, {}}, residuals, only);
            readout_forward(
                ctx, {.reduce = Reduce::select, .places = ClassPlaces::one(only), .x = stream.residual, .out = row});
            stream.residual = row.view({pass.batch, 1, pass.dim});
            break;
        }
        stream = run_layers(pass, layer, stream, saved, outs, residuals);
        for (; wanted < out.layers.size() && out.layers[wanted] <= layer + step - 1; wanted++) {
            if (out.layers[wanted] != layer + step - 1)
                throw std::invalid_argument("[forward] layer " + std::to_string(out.layers[wanted]) +
                                            ": outputs exist after layers 0.." + std::to_string(config.depth - 1) +
                                            ", with Directions::block after odd ones");
            add(ctx, {.a = stream.residual,
                      .b = stream.h,
                      .out = out.intermediates[wanted],
                      .row_scale = pass.drop_path(layer + step - 1)});
        }
    }
    if (!out.tokens && !out.logits && !saved) return;

    const Tensor tokens = out.tokens ? out.tokens : pass.take(stream.h.shape);
    norm_forward(ctx, {.h = stream.h,
                       .row_scale = pass.drop_path(config.depth - 1),
                       .residual = stream.residual,
                       .weight = params.norm_weight,
                       .bias = params.norm_bias,
                       .kind = config.norm,
                       .eps = config.norm_eps,
                       .residual_out = saved ? saved->residual : Tensor{},
                       .out = tokens});
    if (only >= 0)
        classify(pass, tokens.view({pass.batch, pass.dim}), out.logits);
    else if (out.logits)
        head_forward(pass, tokens, out.logits);
}

}  // namespace

void forward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Outputs& out,
             Saved* saved, const Draws& draws)
{
    const Pass pass(ctx, config, params, images, out, draws);
    internals(ctx).training = saved != nullptr;
    if (saved && internals(ctx).cache) internals(ctx).cache->begin_step();
    if (saved && !counts(ctx)) saved->prepare(config, pass.batch, pass.dtype, ctx.device());
    if (pass.batch > 0) run_together(ctx, [&] { run(pass, images, out, saved); });
}

}  // namespace vimcore
