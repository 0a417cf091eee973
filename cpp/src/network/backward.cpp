// SPDX-License-Identifier: Apache-2.0
// The whole network, backward: forward.cpp read from the end.
#include <algorithm>

#include "network/group_gradients.h"
#include "network/head.h"
#include "network/pass.h"
#include "network/positions.h"

namespace vimcore {

namespace {

void embed_backward(const Pass& pass, const Tensor& images, const Tensor& dh, Params& dparams, const Tensor& dimages)
{
    Arena::Scope scope(arena_of(pass.ctx));
    const Config& c = pass.config;
    const Tensor dpatches = pass.take({pass.batch, c.patches(), pass.dim}), weight = pass.patch_weight();
    // Where positions are composed, their gradient is divided among the tables.
    const bool composed =
        c.composes_positions() && (dparams.pos_embed || dparams.class_positions || dparams.frame_positions);
    const Tensor dpositions = composed ? pass.take_wide({1, pass.len, pass.dim}) : dparams.pos_embed;
    if (composed) backend_of(pass.ctx).fill_zero(pass.ctx, dpositions);
    tokens_backward(pass.ctx, {.places = pass.class_places(),
                               .dropout = pass.draws.dropout,
                               .dout = dh,
                               .dpatches = dpatches,
                               .dclass_token = {dparams.class_token, dparams.class_token_tail},
                               .dpos_embed = dpositions});
    if (composed)
        positions_backward(pass.ctx, {.dout = dpositions,
                                      .dtable = dparams.pos_embed,
                                      .dclass_rows = dparams.class_positions,
                                      .dframe_rows = dparams.frame_positions,
                                      .resize = table_resize(c)});
    if (!dparams.patch_weight && !dparams.patch_bias && !dimages) return;
    if (dimages) backend_of(pass.ctx).fill_zero(pass.ctx, dimages);
    pass.for_each_patch_block([&](std::int64_t b, std::int64_t n, std::int64_t begin, std::int64_t count) {
        Arena::Scope block(arena_of(pass.ctx));
        const Tensor cols = pass.take({n, count, weight.size(1)}), x = cols.view({n * count, weight.size(1)});
        Patches patches{.images = pass.flat_images(images).slice(b, b + n),
                        .patch = c.patch_size,
                        .stride = c.stride,
                        .begin = begin,
                        .cols = cols};
        patches_forward(pass.ctx, patches);
        const Tensor dx = dimages ? pass.take(x.shape) : Tensor{};
        const LinearBackward args{.x = x,
                                  .weight = weight,
                                  .dy = pass.patch_rows(dpatches, b, n, begin, count),
                                  .dx = dx,
                                  .dweight = dparams.patch_weight.view(weight.shape),
                                  .dbias = dparams.patch_bias};
        linear_backward(pass.ctx, {&args, 1});
        if (!dimages) return;
        patches.images = pass.flat_images(dimages).slice(b, b + n);
        patches.cols = dx.view(cols.shape);
        patches_backward(pass.ctx, patches);
    });
}

// f(context, begin, end, gradients) for groups of images: side by side, one thread each, as far as they divide evenly,
// the others on all threads. Gradients are summed per group and then in the order of the groups, however they ran.
template <class F>
void for_each_group(const Pass& pass, BlockParams& dblock, F&& f)
{
    const std::int64_t size = pass.images_per_group(), groups = (pass.batch + size - 1) / size;
    if (groups == 1) return f(pass.ctx, 0, pass.batch, dblock);
    Arena::Scope scope(arena_of(pass.ctx));
    const int slots = static_cast<int>(pass.may_run_apart() ? std::min<std::int64_t>(pass.ctx.threads(), groups) : 1);
    const GroupGradients parts(pass.ctx, dblock, slots);
    for (int slot = 0; slot < slots; slot++) worker_of(pass.ctx, slot);  // made before going parallel
    struct Work {
        const Pass& pass;
        const GroupGradients& parts;
        F& f;
        std::int64_t first, size;

        void run(Context& own, int slot) const
        {
            const std::int64_t begin = (first + slot) * size;
            BlockParams part = parts.start(own, slot);
            f(own, begin, std::min(pass.batch, begin + size), part);
        }
    } work{pass, parts, f, 0, size};
    for_each_step(pass.ctx, 0, groups, slots, [&](std::int64_t first) {
        work.first = first;
        const int count = static_cast<int>(std::min<std::int64_t>(slots, groups - first));
        if (count == slots && slots > 1)
            backend_of(pass.ctx).run_workers(
                pass.ctx, count,
                [](void* context, int slot) {
                    const Work& w = *static_cast<Work*>(context);
                    w.run(worker_of(w.pass.ctx, slot), slot);
                },
                &work);
        else
            for_each_step(pass.ctx, 0, count, 1,
                          [&](std::int64_t slot) { work.run(pass.ctx, static_cast<int>(slot)); });
        parts.finish(count);
    });
}

void run(const Pass& pass, const Tensor& images, const Saved& saved, const Outputs& gradients, Params& dparams,
         const Tensor& dimages)
{
    Context& ctx = pass.ctx;
    const Config& config = pass.config;
    const Params& params = pass.params;
    Arena::Scope scope(arena_of(ctx));
    const std::int64_t step = pass.layers_per_step();
    const Tensor dh = pass.take(pass.sequence()), dresidual = pass.take_wide(pass.sequence());
    const Rotation rotation(pass);
    {
        Arena::Scope inner(arena_of(ctx));
        const Tensor dtokens = pass.take(pass.sequence());
        backend_of(ctx).fill_zero(ctx, dtokens);
        if (gradients.logits) {
            const Tensor tokens = pass.take(pass.sequence());
            norm_forward(ctx, {.residual = saved.residual,
                               .weight = params.norm_weight,
                               .bias = params.norm_bias,
                               .kind = config.norm,
                               .eps = config.norm_eps,
                               .out = tokens});
            head_backward(pass, tokens, gradients.logits, dtokens, dparams);
        }
        if (gradients.tokens) add(ctx, {.a = dtokens, .b = gradients.tokens, .out = dtokens});
        norm_backward(ctx, {.x = saved.residual,
                            .row_scale = pass.drop_path(config.depth - 1),
                            .weight = params.norm_weight,
                            .kind = config.norm,
                            .eps = config.norm_eps,
                            .dout = dtokens,
                            .dresidual = dresidual,
                            .dh = dh,
                            .dweight = dparams.norm_weight,
                            .dbias = dparams.norm_bias});
    }

    Tensor pair_dh, pair_dresidual;  // of the second layer of a pair
    if (step == 2) {
        pair_dh = pass.take(pass.sequence());
        pair_dresidual = pass.take_wide(pass.sequence());
    }
    std::size_t wanted = gradients.layers.size();
    for (std::int64_t layer = config.depth - step; layer >= 0; layer -= step) {
        for (; wanted > 0 && gradients.layers[wanted - 1] >= layer; wanted--) {
            const Tensor& d = gradients.intermediates[wanted - 1];
            add(ctx, {.a = dresidual, .b = d, .out = dresidual});
            add(ctx, {.a = dh, .b = d, .out = dh, .row_scale = pass.drop_path(layer + step - 1)});
        }
        for (std::int64_t k = step - 1; k >= 0; k--) {
            const auto i = static_cast<std::size_t>(layer + k);
            const Tensor scale = pass.drop_path(layer + k - 1);
            const Tensor own_dh = k == 1 ? pair_dh : dh, own_dresidual = k == 1 ? pair_dresidual : dresidual;
            for_each_group(
                pass, dparams.blocks[i], [&](Context& own, std::int64_t begin, std::int64_t end, BlockParams& dblock) {
                    const Block block{.row_scale = scale.slice(begin, end), .reverse = pass.reverse(layer + k)};
                    block_backward(own, config, params.blocks[i], block, pass.group(saved.blocks[i], begin, end),
                                   {.dout = dh.slice(begin, end),
                                    .dresidual_out = dresidual.slice(begin, end),
                                    .dresidual = own_dresidual.slice(begin, end),
                                    .dh = own_dh.slice(begin, end)},
                                   dblock);
                });
        }
        if (step == 2) {
            add(ctx, {.a = dh, .b = pair_dh, .out = dh});
            add(ctx, {.a = dresidual, .b = pair_dresidual, .out = dresidual});
        }
        if (config.rope) {
            rotation.apply(dh, true);
            if (config.rope_residual && layer > 0) rotation.apply(dresidual, true);
        }
    }
    embed_backward(pass, images, dh, dparams, dimages);
}

}  // namespace

void backward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Saved& saved,
              const Outputs& gradients, Params& dparams, const Tensor& dimages, const Draws& draws)
{
    const Pass pass(ctx, config, params, images, gradients, draws);
    internals(ctx).training = true;
    dparams.blocks.resize(static_cast<std::size_t>(config.depth));
    if (pass.batch > 0) run_together(ctx, [&] { run(pass, images, saved, gradients, dparams, dimages); });
}

}  // namespace vimcore
