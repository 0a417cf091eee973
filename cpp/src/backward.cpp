// SPDX-License-Identifier: Apache-2.0
// The whole network, backward: forward.cpp read from the end.
#include <algorithm>

#include "group_gradients.h"
#include "network.h"

namespace vimcore {

namespace {

// dlogits -> gradient of the normalised tokens, which are computed again.
void head_backward(const Network& net, const Tensor& tokens, const Tensor& dlogits, const Tensor& dtokens,
                   Params& dparams)
{
    Arena::Scope scope(net.ctx.arena());
    const Config& c = net.config;
    const bool per_token = c.class_token == ClassToken::none && (c.pool == Pool::max || c.pool == Pool::all);
    auto apply = [&](const Tensor& x, const Tensor& dy, const Tensor& dx) {
        if (c.num_classes == 0) {
            net.ctx.backend().copy(net.ctx, dy, dx);
            return;
        }
        const LinearBackward args{.x = x,
                                  .weight = net.params.head_weight,
                                  .dy = dy,
                                  .dx = dx,
                                  .dweight = dparams.head_weight,
                                  .dbias = dparams.head_bias};
        linear_backward(net.ctx, {&args, 1});
    };
    Readout readout = net.readout();
    if (!per_token) {
        const Tensor row = net.take({net.batch, net.dim}), drow = net.take({net.batch, net.dim});
        readout.x = tokens;
        readout.out = row;
        readout_forward(net.ctx, readout);
        apply(row, dlogits, drow);
        readout.dout = drow;
        readout.dx = dtokens;
        readout_backward(net.ctx, readout);
    } else if (c.pool == Pool::all) {
        apply(tokens, dlogits, dtokens);
    } else {
        const Shape shape{net.batch, net.len, dlogits.size(1)};
        readout.x = tokens;
        if (c.num_classes > 0) {
            readout.x = net.take(shape);
            const LinearForward args{
                .x = tokens, .weight = net.params.head_weight, .bias = net.params.head_bias, .y = readout.x};
            linear_forward(net.ctx, {&args, 1});
        }
        readout.dout = dlogits;
        readout.dx = net.take(shape);
        readout_backward(net.ctx, readout);
        apply(tokens, readout.dx, dtokens);
    }
}

void embed_backward(const Network& net, const Tensor& images, const Tensor& dh, Params& dparams, const Tensor& dimages)
{
    Arena::Scope scope(net.ctx.arena());
    const Config& c = net.config;
    const Tensor dpatches = net.take({net.batch, c.patches(), net.dim}), weight = net.patch_weight();
    Tokens tokens = net.tokens(dpatches, dh);
    tokens.dclass_token[0] = dparams.class_token;
    tokens.dclass_token[1] = dparams.class_token_tail;
    tokens.dpos_embed = dparams.pos_embed;
    tokens_backward(net.ctx, tokens);
    if (!dparams.patch_weight && !dparams.patch_bias && !dimages) return;
    if (dimages) net.ctx.backend().fill_zero(net.ctx, dimages);
    net.for_each_patch_block([&](std::int64_t b, std::int64_t n, std::int64_t begin, std::int64_t count) {
        Arena::Scope block(net.ctx.arena());
        const Tensor cols = net.take({n, count, weight.size(1)}), x = cols.view({n * count, weight.size(1)});
        Patches patches{
            .images = images.slice(b, b + n), .patch = c.patch_size, .stride = c.stride, .begin = begin, .cols = cols};
        patches_forward(net.ctx, patches);
        const Tensor dx = dimages ? net.take(x.shape) : Tensor{};
        const LinearBackward args{.x = x,
                                  .weight = weight,
                                  .dy = net.patch_rows(dpatches, b, n, begin, count),
                                  .dx = dx,
                                  .dweight = dparams.patch_weight.view(weight.shape),
                                  .dbias = dparams.patch_bias};
        linear_backward(net.ctx, {&args, 1});
        if (!dimages) return;
        patches.images = dimages.slice(b, b + n);
        patches.cols = dx.view(cols.shape);
        patches_backward(net.ctx, patches);
    });
}

// f(context, begin, end, gradients) for groups of images: side by side, one thread each, as far as they divide evenly,
// the others on all threads. Gradients are summed per group and then in the order of the groups, however they ran.
template <class F>
void for_each_group(const Network& net, BlockParams& dblock, F&& f)
{
    const std::int64_t size = net.images_per_group(), groups = (net.batch + size - 1) / size;
    if (groups == 1) return f(net.ctx, 0, net.batch, dblock);
    Arena::Scope scope(net.ctx.arena());
    const int slots = static_cast<int>(net.may_run_apart() ? std::min<std::int64_t>(net.ctx.threads(), groups) : 1);
    const GroupGradients parts(net.ctx, dblock, slots);
    for (int slot = 0; slot < slots; slot++) net.ctx.worker(slot);  // made before going parallel
    struct Work {
        const Network& net;
        const GroupGradients& parts;
        F& f;
        std::int64_t first, size;

        void run(Context& own, int slot) const
        {
            const std::int64_t begin = (first + slot) * size;
            BlockParams part = parts.start(own, slot);
            f(own, begin, std::min(net.batch, begin + size), part);
        }
    } work{net, parts, f, 0, size};
    for (; work.first < groups; work.first += slots) {
        const int count = static_cast<int>(std::min<std::int64_t>(slots, groups - work.first));
        if (count == slots && slots > 1)
            net.ctx.backend().run_workers(
                net.ctx, count,
                [](void* context, int slot) {
                    const Work& w = *static_cast<Work*>(context);
                    w.run(w.net.ctx.worker(slot), slot);
                },
                &work);
        else
            for (int slot = 0; slot < count; slot++) work.run(net.ctx, slot);
        parts.finish(count);
    }
}

void run(const Network& net, const Tensor& images, const Saved& saved, const Outputs& gradients, Params& dparams,
         const Tensor& dimages)
{
    Context& ctx = net.ctx;
    const Config& config = net.config;
    const Params& params = net.params;
    Arena::Scope scope(ctx.arena());
    const std::int64_t step = net.layers_per_step();
    const Tensor dh = net.take(net.sequence()), dresidual = net.take_wide(net.sequence());
    {
        Arena::Scope inner(ctx.arena());
        const Tensor dtokens = net.take(net.sequence());
        ctx.backend().fill_zero(ctx, dtokens);
        if (gradients.logits) {
            const Tensor tokens = net.take(net.sequence());
            norm_forward(ctx, {.h = {},
                               .row_scale = {},
                               .residual = saved.residual,
                               .weight = params.norm_weight,
                               .bias = params.norm_bias,
                               .kind = config.norm,
                               .eps = config.norm_eps,
                               .residual_out = {},
                               .out = tokens});
            head_backward(net, tokens, gradients.logits, dtokens, dparams);
        }
        if (gradients.tokens) add(ctx, dtokens, gradients.tokens, dtokens);
        norm_backward(ctx, {.x = saved.residual,
                            .row_scale = net.drop_path(config.depth - 1),
                            .weight = params.norm_weight,
                            .kind = config.norm,
                            .eps = config.norm_eps,
                            .dout = dtokens,
                            .dresidual_out = {},
                            .dresidual = dresidual,
                            .dh = dh,
                            .dweight = dparams.norm_weight,
                            .dbias = dparams.norm_bias});
    }

    Tensor pair_dh, pair_dresidual;  // of the second layer of a pair
    if (step == 2) {
        pair_dh = net.take(net.sequence());
        pair_dresidual = net.take_wide(net.sequence());
    }
    std::size_t wanted = gradients.layers.size();
    for (std::int64_t layer = config.depth - step; layer >= 0; layer -= step) {
        for (; wanted > 0 && gradients.layers[wanted - 1] >= layer; wanted--) {
            const Tensor& d = gradients.intermediates[wanted - 1];
            add(ctx, dresidual, d, dresidual);
            add(ctx, dh, d, dh, net.drop_path(layer + step - 1));
        }
        for (std::int64_t k = step - 1; k >= 0; k--) {
            const auto i = static_cast<std::size_t>(layer + k);
            const Tensor scale = net.drop_path(layer + k - 1);
            const Tensor own_dh = k == 1 ? pair_dh : dh, own_dresidual = k == 1 ? pair_dresidual : dresidual;
            for_each_group(
                net, dparams.blocks[i], [&](Context& own, std::int64_t begin, std::int64_t end, BlockParams& dblock) {
                    const Block block{.h = {},
                                      .row_scale = scale.slice(begin, end),
                                      .residual = {},
                                      .reverse = net.reverse(layer + k),
                                      .residual_out = {},
                                      .out = {}};
                    block_backward(own, config, params.blocks[i], block, net.group(saved.blocks[i], begin, end),
                                   {.dout = dh.slice(begin, end),
                                    .dresidual_out = dresidual.slice(begin, end),
                                    .dresidual = own_dresidual.slice(begin, end),
                                    .dh = own_dh.slice(begin, end)},
                                   dblock);
                });
        }
        if (step == 2) {
            add(ctx, dh, pair_dh, dh);
            add(ctx, dresidual, pair_dresidual, dresidual);
        }
        if (config.rope) {
            net.rotate(dh, true);
            if (config.rope_residual && layer > 0) net.rotate(dresidual, true);
        }
    }
    embed_backward(net, images, dh, dparams, dimages);
}

}  // namespace

void backward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Saved& saved,
              const Outputs& gradients, Params& dparams, const Tensor& dimages, const Draws& draws)
{
    const Network net(ctx, config, params, images, draws);
    ctx.training = true;
    dparams.blocks.resize(static_cast<std::size_t>(config.depth));
    if (net.batch > 0) run_together(ctx, [&] { run(net, images, saved, gradients, dparams, dimages); });
}

}  // namespace vimcore
