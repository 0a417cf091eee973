// SPDX-License-Identifier: Apache-2.0
// What must not change the network's answers: batch split, threads, tiles, a second run, a second caller. And what
// must not happen after the first step: allocation.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "core/context_internals.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

// Weights or zeros with their memory.
struct Weights {
    Params params;
    std::map<std::string, std::vector<float>> values;

    Weights(const Config& config, bool random)
    {
        std::mt19937 rng(7);
        std::normal_distribution<float> normal;
        for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            std::vector<float>& v = values[name];
            v.resize(static_cast<std::size_t>(shape.numel()));
            const bool decay = name.find("A_log") != std::string::npos || name.find("A_b_log") != std::string::npos;
            for (std::size_t i = 0; random && i < v.size(); i++)
                v[i] = decay ? std::log(1.0f + static_cast<float>(i % static_cast<std::size_t>(config.d_state)))
                             : (name.find("norm") != std::string::npos ? 1.0f : 0.0f) + 0.2f * normal(rng);
            tensor = {v.data(), shape, DType::f32, {}};
        });
        params.changed();
    }
};

Config small(Directions directions)
{
    Config c;
    c.img_height = 40;
    c.img_width = 56;  // 10 x 14 patches: three tiles of 64 tokens
    c.patch_size = c.stride = 4;
    c.embed_dim = 24;
    c.depth = 2;
    c.num_classes = 5;
    c.directions = directions;
    c.validate();
    return c;
}

struct Run {
    std::vector<float> logits, dimages;
    std::map<std::string, std::vector<float>> grads;
};

Run run(const Config& c, Weights& weights, const std::vector<float>& images, std::int64_t batch, int threads,
        std::int64_t tile, bool train)
{
    Context ctx(Device::cpu(), threads);
    internals(ctx).tile = tile;
    Run r;
    r.logits.resize(static_cast<std::size_t>(batch * c.num_classes));
    const Tensor x{const_cast<float*>(images.data()), {batch, c.in_chans, c.img_height, c.img_width}, DType::f32, {}};
    Outputs out;
    out.logits = {r.logits.data(), {batch, c.num_classes}, DType::f32, {}};
    if (!train) {
        forward(ctx, c, weights.params, x, out);
        return r;
    }
    Saved saved;
    Weights gradients(c, false);
    r.dimages.resize(images.size());
    std::vector<float> dlogits(r.logits.size());
    for (std::size_t i = 0; i < dlogits.size(); i++) dlogits[i] = 0.1f * static_cast<float>(i % 7) - 0.3f;
    Outputs dout;
    dout.logits = {dlogits.data(), out.logits.shape, DType::f32, {}};
    forward(ctx, c, weights.params, x, out, &saved);
    backward(ctx, c, weights.params, x, saved, dout, gradients.params, {r.dimages.data(), x.shape, DType::f32, {}});
    r.grads = gradients.values;
    return r;
}

// Normalised tokens of the network. What is wrong at the end of a tile fades within some tokens, and the class token,
// which the logits come from, is far away.
std::vector<float> tokens_of(const Config& c, Weights& weights, const std::vector<float>& images, std::int64_t batch,
                             std::int64_t tile)
{
    Context ctx(Device::cpu(), 2);
    internals(ctx).tile = tile;
    std::vector<float> tokens(static_cast<std::size_t>(batch * c.tokens() * c.embed_dim));
    Outputs out;
    out.tokens = {tokens.data(), {batch, c.tokens(), c.embed_dim}, DType::f32, {}};
    forward(ctx, c, weights.params,
            {const_cast<float*>(images.data()), {batch, c.in_chans, c.img_height, c.img_width}, DType::f32, {}}, out);
    return tokens;
}

// One block over all images at once.
std::vector<float> block_of(const Config& c, Weights& weights, std::int64_t batch, std::int64_t tile)
{
    Context ctx(Device::cpu(), 2);
    internals(ctx).tile = tile;
    const Shape shape{batch, c.tokens(), c.embed_dim};
    std::vector<float> h(static_cast<std::size_t>(shape.numel())), residual(h.size()), out(h.size());
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    for (float& v : h) v = normal(rng);
    block_forward(ctx, c, weights.params.blocks[0],
                  {.h = {h.data(), shape, DType::f32, {}},
                   .residual_out = {residual.data(), shape, DType::f32, {}},
                   .out = {out.data(), shape, DType::f32, {}}},
                  nullptr);
    return out;
}

void test_invariance(Directions directions)
{
    const Config c = small(directions);
    Weights weights(c, true);
    const std::int64_t batch = 5;
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    std::vector<float> images(static_cast<std::size_t>(batch * c.in_chans * c.img_height * c.img_width));
    for (float& v : images) v = normal(rng);
    const std::size_t image = images.size() / static_cast<std::size_t>(batch);

    const Run base = run(c, weights, images, batch, 1, 0, true);
    for (float v : base.logits) CHECK(std::isfinite(v));
    for (int threads : {1, 2, 3, 7}) {
        const Run again = run(c, weights, images, batch, threads, 0, true);
        CHECK(again.logits == base.logits);
        CHECK(again.dimages == base.dimages);
        CHECK(again.grads == base.grads);
    }
    for (int threads : {1, 2, 3, 7})  // logits alone: the last block stops at the class token
        CHECK(run(c, weights, images, batch, threads, 0, false).logits == base.logits);
    const std::vector<float> tokens = tokens_of(c, weights, images, batch, 0), block = block_of(c, weights, batch, 0);
    for (std::int64_t tile : {64, 128, 512}) {
        CHECK(run(c, weights, images, batch, 2, tile, false).logits == base.logits);
        CHECK(run(c, weights, images, batch, 2, tile, true).logits == base.logits);
        CHECK(tokens_of(c, weights, images, batch, tile) == tokens);
        CHECK(block_of(c, weights, batch, tile) == block);
    }
    for (std::int64_t b = 0; b < batch; b++) {
        const auto at = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(b) * image);
        const std::vector<float> one(images.begin() + at, images.begin() + at + static_cast<std::ptrdiff_t>(image));
        const Run alone = run(c, weights, one, 1, 2, 0, false);
        const auto first = base.logits.begin() + static_cast<std::ptrdiff_t>(b * c.num_classes);
        CHECK(std::equal(alone.logits.begin(), alone.logits.end(), first));
    }

    // many callers, one set of weights whose packed forms nobody has made yet
    weights.params.changed();
    std::vector<Run> runs(6);
    std::vector<std::thread> callers;
    for (Run& r : runs) callers.emplace_back([&] { r = run(c, weights, images, batch, 2, 0, false); });
    for (std::thread& caller : callers) caller.join();
    for (const Run& r : runs) CHECK(r.logits == base.logits);
}

void test_weights_change()
{
    const Config c = small(Directions::ssm_conv);
    Weights weights(c, true);
    const std::vector<float> images(static_cast<std::size_t>(c.in_chans * c.img_height * c.img_width), 0.5f);
    const Run before = run(c, weights, images, 1, 1, 0, false);
    weights.values["layers.0.mixer.in_proj.weight"][3] += 1.0f;
    weights.params.changed();
    CHECK(run(c, weights, images, 1, 1, 0, false).logits != before.logits);
}

void test_no_allocation()
{
    const Config c = small(Directions::ssm_conv);
    Weights weights(c, true), gradients(c, false);
    const std::int64_t batch = 3;
    std::vector<float> images(static_cast<std::size_t>(batch * c.in_chans * c.img_height * c.img_width), 0.25f);
    std::vector<float> logits(static_cast<std::size_t>(batch * c.num_classes)), dlogits(logits.size(), 1.0f);
    Context ctx(Device::cpu(), 2);
    Saved saved;
    Outputs out, dout;
    const Tensor x{images.data(), {batch, c.in_chans, c.img_height, c.img_width}, DType::f32, {}};
    out.logits = {logits.data(), {batch, c.num_classes}, DType::f32, {}};
    dout.logits = {dlogits.data(), {batch, c.num_classes}, DType::f32, {}};
    long heap = 0;
    std::size_t arena = 0;
    for (int step = 0; step < 6; step++) {
        weights.params.changed();  // as after an optimiser step: everything is packed again, in place
        forward(ctx, c, weights.params, x, out, &saved);
        backward(ctx, c, weights.params, x, saved, dout, gradients.params, {});
        forward(ctx, c, weights.params, x, out);
        if (step == 2) heap = allocations, arena = arena_of(ctx).allocations();
    }
    CHECK(allocations == heap);
    CHECK(arena_of(ctx).allocations() == arena);
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) == saved_bytes(c, Memory::lean, batch));
}

void test_bad_arguments()
{
    const Config c = small(Directions::ssm_conv);
    Weights weights(c, true);
    Context ctx(Device::cpu(), 1);
    std::vector<float> images(static_cast<std::size_t>(3 * 40 * 57)), logits(5);
    Outputs out;
    out.logits = {logits.data(), {1, 5}, DType::f32, {}};
    CHECK_THROWS(forward(ctx, c, weights.params, {images.data(), {1, 3, 40, 57}, DType::f32, {}}, out),
                 std::invalid_argument);
    CHECK_THROWS(forward(ctx, c, weights.params, {images.data(), {1, 3, 40, 28}, DType::f64, {}}, out),
                 std::invalid_argument);
    out.logits.shape = {1, 4};
    CHECK_THROWS(forward(ctx, c, weights.params, {images.data(), {1, 3, 40, 56}, DType::f32, {}}, out),
                 std::invalid_argument);
    out.logits.shape = {1, 5};
    Params empty;
    CHECK_THROWS(forward(ctx, c, empty, {images.data(), {1, 3, 40, 56}, DType::f32, {}}, out), std::invalid_argument);
    CHECK_THROWS(Context(Device::cuda(0)), Error);
    CHECK_THROWS(Context(Device::cpu(), -1), std::invalid_argument);
    forward(ctx, c, weights.params, {images.data(), {0, 3, 40, 56}, DType::f32, {}}, {});  // an empty batch is no fault
}

}  // namespace

// With an argument, one way of scanning in both directions, which has all kernels: for emulated machines.
int main(int argc, char**)
{
    test_invariance(Directions::ssm_conv);
    for (Directions directions : {Directions::none, Directions::block, Directions::ssm})
        if (argc == 1) test_invariance(directions);
    test_weights_change();
    test_no_allocation();
    test_bad_arguments();
    return check_failures();
}
