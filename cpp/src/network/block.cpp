// SPDX-License-Identifier: Apache-2.0
// A Vim block: norm -> in_proj -> per direction (conv1d, x_proj, selective scan) -> gate, sum -> out_proj.
// Long sequences run in tiles that fit the cache: the forward direction starts at the first tile, the reverse one at
// the last, and where the second of them comes to a tile, the tile's output is finished.
#include <algorithm>

#include "network/block_parts.h"

namespace vimcore {

namespace {

void out_projection(Context& ctx, const BlockParams& p, const Tensor& weight, const Tensor& s, const Tensor& out)
{
    WithoutCache guard(ctx, static_cast<bool>(p.gamma));
    const LinearForward args{.x = s, .weight = weight, .y = out};
    linear_forward(ctx, {&args, 1});
}

// All images at once, or one image and tokens [t0, t1) of it. tensor: (B, L, columns)
Tensor rows(const Tensor& tensor, bool whole, std::int64_t image, std::int64_t t0, std::int64_t t1)
{
    if (!tensor || whole) return tensor;
    Tensor part = tensor[image].slice(t0, t1);
    return part.view({1, t1 - t0, part.size(1)});
}

// The forward pass of some images whose sequences are cut into tiles of `tile` tokens.
class Forward {
public:
    Forward(Context& ctx, const BlockConfig& config, const BlockParams& params, const Block& block, BlockSaved* saved,
            std::int64_t tile)
        : ctx_(ctx),
          config_(config),
          params_(params),
          block_(block),
          saved_(saved),
          s_(sizes(config, block.h ? block.h : block.residual)),
          tile_(std::min(tile, s_.len)),
          tiles_((s_.len + tile_ - 1) / tile_),
          routes_(routes(config, params, block.reverse, nullptr)),
          out_proj_(scaled_out_proj(ctx, params))
    {
        xz_ = saved && saved->xz ? saved->xz : take({s_.batch, s_.len, 2 * s_.inner});
        y_ = take({s_.batch, s_.len, s_.inner});
    }

    void run()
    {
        if (tiles_ == 1) {
            step(0, 0, {});
            return;
        }
        const Tensor states = arena_of(ctx_).take({routes_.count, 1, s_.state, s_.inner}, wide(s_.dtype));
        for_each_step(ctx_, 0, s_.batch, 1, [&](std::int64_t image) {
            backend_of(ctx_).fill_zero(ctx_, states);
            for_each_step(ctx_, 0, tiles_, 1, [&](std::int64_t i) { step(image, i, states); });
        });
    }

private:
    Tensor take(const Shape& shape) { return arena_of(ctx_).take(shape, s_.dtype); }

    // The i-th tile of every direction.
    void step(std::int64_t image, std::int64_t i, const Tensor& states)
    {
        Arena::Scope scope(arena_of(ctx_));
        const bool whole = tiles_ == 1;
        std::int64_t tile[2];
        for (int p = 0; p < routes_.count; p++) tile[p] = routes_.route[p].reverse ? tiles_ - 1 - i : i;
        const bool two = routes_.count == 2, same = two && tile[0] == tile[1];
        const bool first_visit = !two || 2 * i < tiles_;          // nobody was here before
        const bool last_visit = !two || same || 2 * i >= tiles_;  // the other direction was
        const int places = same ? 1 : routes_.count;

        for (int p = 0; first_visit && p < places; p++) project_in(image, tile[p]);

        // u, q: of all projections side by side: equal distances let a backend batch their products
        Tensor u_of[2], q_of[2], u, q;
        ConvForwardPass conv[2];
        LinearForward x_proj[2];
        const std::int64_t batch = whole ? s_.batch : 1;
        u = take({routes_.projections, batch * tile_, s_.inner});
        if (!saved_) q = take({routes_.projections, batch * tile_, s_.q});
        auto part = [&](const Tensor& all, int p) {
            const Range range = tokens_of(p, tile[p]);
            const std::int64_t count = range.end - range.begin;
            return all[p].slice(0, batch * count).view({batch, count, all.size(2)});
        };
        for (int p = 0; p < routes_.projections; p++) {
            const DirectionParams& w = routes_.route[p].weights;
            const auto [t0, t1] = tokens_of(p, tile[p]);
            q_of[p] = saved_ ? rows(saved_->q[p], whole, image, t0, t1) : part(q, p);
            u_of[p] = part(u, p);
            const bool reverse = routes_.projections == 1 && two ? false : routes_.route[p].reverse;
            conv[p] = {.reverse = reverse, .weight = w.conv_weight, .bias = w.conv_bias, .begin = t0, .u = u_of[p]};
            x_proj[p] = {.x = u_of[p], .weight = w.x_proj, .y = q_of[p]};
        }
        const auto count = static_cast<std::size_t>(routes_.projections);
        conv1d_forward(ctx_, {.x = rows(xz_, whole, image, 0, s_.len), .passes = {conv, count}});
        linear_forward(ctx_, {x_proj, count});

        ScanForwardPass scan[2];
        for (int p = 0; p < routes_.count; p++) {
            const int source = std::min(p, routes_.projections - 1);
            const DirectionParams& w = routes_.route[p].weights;
            Tensor checkpoints;
            if (saved_ && saved_->checkpoints)
                checkpoints = whole ? saved_->checkpoints[p] : saved_->checkpoints[p].slice(image, image + 1);
            scan[p] = {.reverse = routes_.route[p].reverse,
                       .u = u_of[source],
                       .q = q_of[source],
                       .A_log = w.A_log,
                       .D = w.D,
                       .dt_weight = w.dt_weight,
                       .dt_bias = w.dt_bias,
                       .begin = tokens_of(p, tile[p]).begin,
                       .state = states ? states[p] : Tensor{},
                       .add = last_visit && p > 0,
                       .finish = last_visit,
                       .checkpoints = checkpoints};
            if (two && same) scan[p].finish = p == 1;
            if (two && !same) scan[p].add = last_visit;
        }
        scan_forward(ctx_, {.xz = rows(xz_, whole, image, 0, s_.len),
                            .passes = {scan, static_cast<std::size_t>(routes_.count)},
                            .scale = config_.direction_scale(),
                            .chunk = saved_ ? saved_->chunk : 0,
                            .out = rows(y_, whole, image, 0, s_.len)});

        if (block_.only >= 0) {
            const Tensor y = take({s_.batch, s_.inner});
            readout_forward(ctx_,
                            {.reduce = Reduce::select, .places = ClassPlaces::one(block_.only), .x = y_, .out = y});
            out_projection(ctx_, params_, out_proj_, y, block_.out.view({s_.batch, s_.dim}));
            return;
        }
        for (int p = 0; last_visit && p < places; p++) {
            const std::int64_t t0 = tile[p] * tile_, t1 = std::min(s_.len, t0 + tile_);
            out_projection(ctx_, params_, out_proj_, rows(y_, whole, image, t0, t1),
                           rows(block_.out, whole, image, t0, t1));
        }
    }

    struct Range {
        std::int64_t begin, end;
    };
    // The tokens of a tile that a direction needs: where one output is wanted, none beyond it.
    Range tokens_of(int p, std::int64_t tile) const
    {
        const std::int64_t begin = tile * tile_, end = std::min(s_.len, begin + tile_);
        if (block_.only < 0) return {begin, end};
        return routes_.route[p].reverse ? Range{block_.only, end} : Range{begin, block_.only + 1};
    }

    // Norm and in_proj of one tile.
    void project_in(std::int64_t image, std::int64_t tile)
    {
        Arena::Scope scope(arena_of(ctx_));
        const bool whole = tiles_ == 1;
        const std::int64_t t0 = tile * tile_, t1 = std::min(s_.len, t0 + tile_);
        const Tensor v = take({whole ? s_.batch : 1, t1 - t0, s_.dim});
        const Tensor scale = whole || !block_.row_scale ? block_.row_scale : block_.row_scale.slice(image, image + 1);
        norm_forward(ctx_, {.h = rows(block_.h, whole, image, t0, t1),
                            .row_scale = scale,
                            .residual = rows(block_.residual, whole, image, t0, t1),
                            .weight = params_.norm_weight,
                            .bias = params_.norm_bias,
                            .kind = config_.norm,
                            .eps = config_.norm_eps,
                            .residual_out = rows(block_.residual_out, whole, image, t0, t1),
                            .out = v});
        const LinearForward args{.x = v, .weight = params_.in_proj, .y = rows(xz_, whole, image, t0, t1)};
        linear_forward(ctx_, {&args, 1});
    }

    Context& ctx_;
    const BlockConfig& config_;
    const BlockParams& params_;
    const Block& block_;
    BlockSaved* saved_;
    Sizes s_;
    std::int64_t tile_, tiles_;
    Routes routes_;
    Tensor out_proj_, xz_, y_;
};

constexpr std::int64_t whole_sequence = std::int64_t{1} << 40;

// Tokens of a tile, whole chunks of checkpoints. An even cut was measured and is no faster than a short last tile.
std::int64_t tile_length(Context& ctx, const BlockConfig& config)
{
    // A causal convolution feeds both directions of "ssm", so its reverse scan cannot start at the far end.
    if (config.directions == Directions::ssm) return whole_sequence;
    return ((internals(ctx).tile > 0 ? internals(ctx).tile : backend_of(ctx).tile()) + 63) / 64 * 64;
}

}  // namespace

bool block_may_stop_early(Context& ctx, const Config& config)
{
    return config.directions != Directions::ssm && config.directions != Directions::block &&
           config.tokens() <= tile_length(ctx, config);
}

void block_forward(Context& ctx, const BlockConfig& config, const BlockParams& params, const Block& block,
                   BlockSaved* saved)
{
    if (block.out.numel() == 0) return;
    Arena::Scope scope(arena_of(ctx));
    const std::int64_t tile = tile_length(ctx, config);
    run_together(ctx, [&] { Forward(ctx, config, params, block, saved, tile).run(); });
}

}  // namespace vimcore
