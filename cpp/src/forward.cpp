// SPDX-License-Identifier: Apache-2.0
// The whole network, forward: patches, class tokens and positions, blocks, final norm, read-out, head.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "network.h"

namespace vimcore {

std::int64_t Saved::chunk(Memory memory) { return memory == Memory::lean ? 64 : 16; }

std::int64_t Saved::bytes_per_block(const Config& c, Memory memory, std::int64_t batch, DType dtype)
{
    const std::int64_t n = c.two_directions() ? 2 : 1, projections = c.directions == Directions::ssm_conv ? 2 : 1;
    const std::int64_t chunks = (c.tokens() + chunk(memory) - 1) / chunk(memory);
    const std::int64_t per_token = c.embed_dim + 2 * c.inner() + projections * (c.rank() + 2 * c.d_state);
    return batch * (c.tokens() * per_token + n * chunks * c.d_state * c.inner()) *
           static_cast<std::int64_t>(size_of(dtype));
}

void Saved::prepare(const Config& c, std::int64_t images, DType dtype)
{
    batch = images;
    const std::int64_t n = c.two_directions() ? 2 : 1, projections = c.directions == Directions::ssm_conv ? 2 : 1;
    const std::int64_t len = c.tokens(), chunks = (len + chunk(memory) - 1) / chunk(memory);
    auto lay_out = [&](char* base) {
        std::size_t used = 0;
        auto place = [&](const Shape& shape) {
            Tensor tensor{base + used, shape, dtype, Device::cpu()};
            used += (tensor.bytes() + 63) / 64 * 64;
            return tensor;
        };
        blocks.resize(static_cast<std::size_t>(c.depth));
        for (BlockSaved& block : blocks) {
            block.chunk = chunk(memory);
            block.residual = place({batch, len, c.embed_dim});
            block.xz = place({batch, len, 2 * c.inner()});
            block.q = place({projections, batch, len, c.rank() + 2 * c.d_state});
            block.checkpoints = place({n, batch, chunks, c.d_state, c.inner()});
        }
        residual = place({batch, len, c.embed_dim});
        return used;
    };
    const std::size_t needed = lay_out(static_cast<char*>(storage.data()));
    if (needed <= storage.bytes()) return;
    storage = Buffer(needed);
    lay_out(static_cast<char*>(storage.data()));
}

namespace {

// images -> h: patches through the projection, class tokens, positions.
void embed(const Network& net, const Tensor& images, const Tensor& h)
{
    Arena::Scope scope(net.ctx.arena());
    const Config& c = net.config;
    const Tensor patches = net.take({net.batch, c.patches(), net.dim}), weight = net.patch_weight();
    net.for_each_patch_block([&](std::int64_t b, std::int64_t begin, std::int64_t count) {
        Arena::Scope block(net.ctx.arena());
        const Tensor cols = net.take({1, count, weight.size(1)});
        patches_forward(net.ctx, {.images = images.slice(b, b + 1),
                                  .patch = c.patch_size,
                                  .stride = c.stride,
                                  .begin = begin,
                                  .cols = cols});
        const LinearForward args{.x = cols.view({count, weight.size(1)}),
                                 .weight = weight,
                                 .bias = net.params.patch_bias,
                                 .y = patches[b].slice(begin, begin + count)};
        linear_forward(net.ctx, {&args, 1});
    });
    tokens_forward(net.ctx, net.tokens(patches, h));
}

void copy(const Tensor& from, const Tensor& to) { std::memcpy(to.data, from.data, to.bytes()); }

// The residual stream: h, the last mixer output, and residual, none before the first block.
struct Stream {
    Tensor h, residual;
};

// One layer, or a forward and a reverse one on the same input.
Stream run_layers(const Network& net, std::int64_t first, Stream in, Saved* saved, const Tensor (&out)[2],
                  const Tensor (&residual_out)[3])
{
    const std::int64_t count = net.layers_per_step();
    auto residual = [&](std::int64_t k) {
        return saved ? saved->blocks[static_cast<std::size_t>(first + k)].residual : residual_out[k];
    };
    for (std::int64_t k = 0; k < count; k++) {
        const std::int64_t layer = first + k;
        const auto i = static_cast<std::size_t>(layer);
        const Tensor scale = net.drop_path(layer - 1);
        net.for_each_group(saved != nullptr, [&](Context& ctx, std::int64_t begin, std::int64_t end) {
            BlockSaved part;
            if (saved) part = net.group(saved->blocks[i], begin, end);
            const Block block{.h = in.h.slice(begin, end),
                              .row_scale = scale.slice(begin, end),
                              .residual = in.residual.slice(begin, end),
                              .reverse = net.reverse(layer),
                              .residual_out = residual(k).slice(begin, end),
                              .out = out[k].slice(begin, end)};
            block_forward(ctx, net.config, net.params.blocks[i], block, saved ? &part : nullptr);
        });
    }
    if (count == 1) return {out[0], residual(0)};
    add(net.ctx, out[0], out[1], in.h);
    add(net.ctx, residual(0), residual(1), residual_out[2]);
    return {in.h, residual_out[2]};
}

void head(const Network& net, const Tensor& tokens, const Tensor& logits)
{
    Arena::Scope scope(net.ctx.arena());
    const Config& c = net.config;
    const bool per_token = c.class_token == ClassToken::none && (c.pool == Pool::max || c.pool == Pool::all);
    auto apply = [&](const Tensor& x, const Tensor& y) {
        if (c.num_classes == 0) return copy(x, y);
        const LinearForward args{.x = x, .weight = net.params.head_weight, .bias = net.params.head_bias, .y = y};
        linear_forward(net.ctx, {&args, 1});
    };
    const std::int64_t outputs = c.num_classes > 0 ? c.num_classes : net.dim;
    Readout readout = net.readout();
    if (!per_token) {
        const Tensor row = net.take({net.batch, net.dim});
        readout.x = tokens;
        readout.out = row;
        readout_forward(net.ctx, readout);
        apply(row, logits);
    } else if (c.pool == Pool::all) {
        apply(tokens, logits);
    } else {
        readout.x = net.take({net.batch, net.len, outputs});
        readout.out = logits;
        apply(tokens, readout.x);
        readout_forward(net.ctx, readout);
    }
}

void run(const Network& net, const Tensor& images, const Outputs& out, Saved* saved)
{
    Context& ctx = net.ctx;
    const Config& config = net.config;
    const Params& params = net.params;
    Arena::Scope scope(ctx.arena());
    const std::int64_t step = net.layers_per_step();
    Stream stream{net.take(net.sequence()), {}};
    embed(net, images, stream.h);

    // A single layer writes its output over its input; a pair needs both outputs until they are added.
    const Tensor outs[2] = {step == 2 ? net.take(net.sequence()) : stream.h,
                            step == 2 ? net.take(net.sequence()) : Tensor{}};
    Tensor residuals[3];  // of the step's layers where nothing is saved; of a pair, the sum
    for (std::int64_t k = 0; k < step && (!saved || config.rope_residual); k++) residuals[k] = net.take(net.sequence());
    if (step == 2) residuals[2] = net.take(net.sequence());
    std::size_t wanted = 0;
    for (std::int64_t layer = 0; layer < config.depth; layer += step) {
        if (config.rope) {
            net.rotate(stream.h, false);
            if (config.rope_residual && stream.residual) {
                if (saved && step == 1) {  // what was saved stays as it is
                    copy(stream.residual, residuals[0]);
                    stream.residual = residuals[0];
                }
                net.rotate(stream.residual, false);
            }
        }
        stream = run_layers(net, layer, stream, saved, outs, residuals);
        for (; wanted < out.layers.size() && out.layers[wanted] <= layer + step - 1; wanted++) {
            if (out.layers[wanted] != layer + step - 1)
                throw std::invalid_argument("[forward] layer " + std::to_string(out.layers[wanted]) +
                                            ": outputs exist after layers 0.." + std::to_string(config.depth - 1) +
                                            ", with Directions::block after odd ones");
            add(ctx, stream.residual, stream.h, out.intermediates[wanted], net.drop_path(layer + step - 1));
        }
    }
    if (!out.tokens && !out.logits && !saved) return;

    const Tensor tokens = out.tokens ? out.tokens : net.take(net.sequence());
    norm_forward(ctx, {.h = stream.h,
                       .row_scale = net.drop_path(config.depth - 1),
                       .residual = stream.residual,
                       .weight = params.norm_weight,
                       .bias = params.norm_bias,
                       .kind = config.norm,
                       .eps = config.norm_eps,
                       .residual_out = saved ? saved->residual : Tensor{},
                       .out = tokens});
    if (out.logits) head(net, tokens, out.logits);
}

}  // namespace

void forward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Outputs& out,
             Saved* saved, const Draws& draws)
{
    const Network net(ctx, config, params, images, draws);
    if (saved) saved->prepare(config, net.batch, net.dtype);
    if (net.batch > 0) run_together(ctx, [&] { run(net, images, out, saved); });
}

}  // namespace vimcore
