// SPDX-License-Identifier: Apache-2.0
// Shared by the forward and the backward pass of the network: sizes, tables, cuts.
#pragma once

#include "arena.h"
#include "backend.h"
#include "vimcore/model.h"

namespace vimcore {

struct Network {
    Network(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Draws& draws);
    ~Network() { ctx.cache = outer_cache; }
    Network(const Network&) = delete;
    Network& operator=(const Network&) = delete;

    Context& ctx;
    const Config& config;
    const Params& params;
    const Draws& draws;
    DType dtype;
    std::int64_t batch, len, dim;

    Tensor take(const Shape& shape) const { return ctx.arena().take(shape, dtype); }
    Shape sequence() const { return {batch, len, dim}; }

    // Layers that share one input: one, or a forward and a reverse one ("block").
    std::int64_t layers_per_step() const { return config.directions == Directions::block ? 2 : 1; }
    bool reverse(std::int64_t layer) const
    {
        return config.directions == Directions::block ? layer % 2 == 1 : draws.flip;
    }
    // Drop-path factors of the output of `layer`; none before the first and when nothing is dropped.
    Tensor drop_path(std::int64_t layer) const
    {
        return draws.drop_path && layer >= 0 ? draws.drop_path[layer] : Tensor{};
    }

    // Images that run through a block together, so that their activations stay in the cache.
    std::int64_t images_per_group() const;
    template <class F>
    void for_each_group(F&& f) const
    {
        for (std::int64_t b = 0; b < batch; b += images_per_group()) f(b, std::min(batch, b + images_per_group()));
    }
    // What the images [begin, end) of one group saved.
    BlockSaved group(const BlockSaved& saved, std::int64_t begin, std::int64_t end) const;

    Tokens tokens(const Tensor& patches, const Tensor& out) const;
    Readout readout() const;                           // of normalised tokens, or of logits for Pool::max
    void rotate(const Tensor& x, bool inverse) const;  // RoPE
    Tensor patch_weight() const;                       // (D, C P P)
    // Calls f(image, first patch, count): pieces of the patch matrix that fit the cache.
    template <class F>
    void for_each_patch_block(F&& f) const
    {
        constexpr std::int64_t block = 512;
        for (std::int64_t b = 0; b < batch; b++)
            for (std::int64_t j = 0; j < config.patches(); j += block) f(b, j, std::min(block, config.patches() - j));
    }

private:
    WeightCache* outer_cache;
};

}  // namespace vimcore
