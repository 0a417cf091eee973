// SPDX-License-Identifier: Apache-2.0
// Shared by the forward and the backward pass of the network: sizes, tables, cuts.
#pragma once

#include <algorithm>
#include <atomic>

#include "core/counting.h"
#include "vimcore/model.h"

namespace vimcore {

// Whether block_forward can compute one token's output alone (Block::only).
bool block_may_stop_early(Context& ctx, const Config& config);

// Points all tensors of `saved` into memory from `base` on; how many bytes they take. saved.cpp
std::size_t lay_out(Saved& saved, const Config& config, std::int64_t batch, DType dtype, Device device, void* base);

// How the network's output is read out of its tokens.
struct Selection {
    Reduce reduce = Reduce::mean;
    ClassPlaces places;  // select, join
};

struct Pass {
    // `outputs`, or their gradients, say which type activations have.
    Pass(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Outputs& outputs,
         const Draws& draws);
    ~Pass()
    {
        internals(ctx).cache = outer_cache;
        internals(ctx).training = false;
    }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

    Context& ctx;
    const Config& config;
    const Params& params;
    const Draws& draws;
    DType dtype;  // of activations; parameters and the residual stream have wide(dtype)
    std::int64_t batch, len, dim;

    Tensor take(const Shape& shape) const { return arena_of(ctx).take(shape, dtype); }
    Tensor take_wide(const Shape& shape) const { return arena_of(ctx).take(shape, wide(dtype)); }
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

    // Side by side means scratch memory for every thread; very long sequences run one after the other instead.
    bool may_run_apart() const { return ctx.threads() > 1 && len <= 8192; }

    // f(context, begin, end) for groups of images. As many as divide evenly run side by side, each on one thread, which
    // keeps an image's activations in one core's cache; what is left runs on all threads. Where nothing is saved for
    // backward, groups may be smaller than usual.
    template <class F>
    void for_each_group(bool saved, F&& f) const
    {
        const std::int64_t threads = ctx.threads();
        std::int64_t size = images_per_group();
        if (!saved) size = std::clamp<std::int64_t>(batch / threads, 1, size);
        const std::int64_t apart = may_run_apart() ? batch / size / threads * threads * size : 0;
        if (apart > 0) run_apart(apart, size, f);
        groups_in_order(apart, size, f);
    }
    // What the images [begin, end) of one group saved.
    BlockSaved group(const BlockSaved& saved, std::int64_t begin, std::int64_t end) const;

    ClassPlaces class_places() const;
    Selection selection() const;  // of normalised tokens, or of logits for Pool::max
    Tensor patch_weight() const;  // (D, C P P)
    // (B, C, H, W); of clips the frames one below the other, whose patches are those of the frames in order.
    Tensor flat_images(const Tensor& images) const;
    // Rows of (B, J, D), whole images or a part of one, as a matrix.
    Tensor patch_rows(const Tensor& patches, std::int64_t b, std::int64_t images, std::int64_t begin,
                      std::int64_t count) const
    {
        return images == 1 ? patches[b].slice(begin, begin + count)
                           : patches.slice(b, b + images).view({images * count, dim});
    }
    // Calls f(first image, images, first patch, patches of each): pieces of the patch matrix that suit the backend,
    // whole images or a part of one.
    template <class F>
    void for_each_patch_block(F&& f) const
    {
        constexpr std::int64_t most = 1 << 17;
        const std::int64_t rows = std::min(backend_of(ctx).tile(), most), patches = config.patches();
        const std::int64_t images = std::max<std::int64_t>(1, rows / std::max<std::int64_t>(patches, 1));
        for_each_step(ctx, 0, batch, images, [&](std::int64_t b) {
            for_each_step(ctx, 0, patches, rows,
                          [&](std::int64_t j) { f(b, std::min(images, batch - b), j, std::min(rows, patches - j)); });
        });
    }

private:
    template <class F>
    void groups_in_order(std::int64_t first, std::int64_t size, F& f) const
    {
        for_each_step(ctx, first, batch, size, [&](std::int64_t b) { f(ctx, b, std::min(batch, b + size)); });
    }

    // Groups [0, end) of `size` images; a worker takes the next group when it is done with one.
    template <class F>
    void run_apart(std::int64_t end, std::int64_t size, F& f) const
    {
        struct Work {
            const Pass& pass;
            F& f;
            std::int64_t end, size;
            std::atomic<std::int64_t> next;
        } work{*this, f, end, size, 0};
        for (int i = 0; i < ctx.threads(); i++) worker_of(ctx, i);  // made before going parallel
        backend_of(ctx).run_workers(
            ctx, ctx.threads(),
            [](void* context, int index) {
                Work& w = *static_cast<Work*>(context);
                for (std::int64_t b; (b = w.next.fetch_add(w.size)) < w.end;) {
                    w.f(worker_of(w.pass.ctx, index), b, b + w.size);
                    if (counts(w.pass.ctx)) break;  // one for each
                }
            },
            &work);
        // Whoever takes the largest group next time finds the memory for it.
        std::size_t most = 0;
        for (int i = 0; i < ctx.threads(); i++) most = std::max(most, arena_of(worker_of(ctx, i)).bytes());
        for (int i = 0; i < ctx.threads(); i++) arena_of(worker_of(ctx, i)).reserve(most);
    }

    WeightCache* outer_cache;
};

}  // namespace vimcore
