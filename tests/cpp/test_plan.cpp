// SPDX-License-Identifier: Apache-2.0
// The plans of a forward and of a training step against the memory that they take: scratch memory, and what is saved.
#include <cstdio>
#include <vector>

#include "check.h"
#include "core/context_internals.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

std::size_t arenas(Context& ctx)
{
    std::size_t bytes = arena_of(ctx).bytes();
    for (int i = 0; ctx.threads() > 1 && i < ctx.threads(); i++) bytes += arena_of(worker_of(ctx, i)).bytes();
    return bytes;
}

// Weights for a network, and a second set of tensors for its gradients.
struct Network {
    explicit Network(const Config& config)
    {
        for (Params* p : {&params, &gradients})
            for_each_param(config, *p, [&](const std::string&, Tensor& tensor, const Shape& shape) {
                values.emplace_back(static_cast<std::size_t>(shape.numel()), p == &params ? 0.01f : 0.0f);
                tensor = {values.back().data(), shape, DType::f32, {}};
            });
        params.changed();
    }

    std::vector<std::vector<float>> values;
    Params params, gradients;
};

struct Case {
    std::int64_t size, batch;
    int threads;
    Memory memory = Memory::lean;
    void (*change)(Config&) = [](Config&) {};
};

Config config_of(const Case& test)
{
    Config config;
    config.img_height = config.img_width = test.size;
    config.depth = 2;
    config.num_classes = 10;
    test.change(config);
    return config;
}

void test_training(const Case& test)
{
    const Config config = config_of(test);
    Network net(config);
    Context ctx(Device::cpu(), test.threads);
    std::vector<float> pixels(static_cast<std::size_t>(test.batch * 3 * test.size * test.size), 0.1f);
    std::vector<float> logits(static_cast<std::size_t>(test.batch * 10), 0.1f);
    const Tensor images{pixels.data(), {test.batch, 3, test.size, test.size}, DType::f32, {}};
    Outputs out;
    out.logits = {logits.data(), {test.batch, 10}, DType::f32, {}};
    Saved saved;
    saved.memory = test.memory;
    for (int step = 0; step < 2; step++) {
        forward(ctx, config, net.params, images, out, &saved);
        backward(ctx, config, net.params, images, saved, out, net.gradients, {});
    }
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) == saved_bytes(config, test.memory, test.batch));
    const auto used = static_cast<double>(arenas(ctx));
    const auto plan = static_cast<double>(training_bytes(config, test.memory, test.batch, DType::f32, test.threads));
    std::printf("%4lld px, batch %lld, %d threads, %s, directions %d: used %.1f MiB, plan %.1f (%.2f)\n",
                static_cast<long long>(test.size), static_cast<long long>(test.batch), test.threads,
                name_of(test.memory), static_cast<int>(config.directions), used / (1 << 20), plan / (1 << 20),
                plan / used);
    CHECK(used <= plan);
    CHECK(plan <= std::max(1.5 * used, used + (1 << 22)));
}

void test_forward(const Case& test)
{
    const Config config = config_of(test);
    const Network net(config);
    Context ctx(Device::cpu(), test.threads);
    const std::vector<float> pixels(static_cast<std::size_t>(test.batch * 3 * test.size * test.size), 0.1f);
    std::vector<float> logits(static_cast<std::size_t>(test.batch * 10));
    Outputs out;
    out.logits = {logits.data(), {test.batch, 10}, DType::f32, {}};
    const Tensor images{const_cast<float*>(pixels.data()), {test.batch, 3, test.size, test.size}, DType::f32, {}};
    forward(ctx, config, net.params, images, out);
    const auto used = static_cast<double>(arenas(ctx) + logits.size() * sizeof(float));
    const auto plan = static_cast<double>(forward_bytes(config, test.batch, DType::f32, test.threads));
    std::printf("%4lld px, batch %lld, %d threads, forward, directions %d: used %.1f MiB, plan %.1f (%.2f)\n",
                static_cast<long long>(test.size), static_cast<long long>(test.batch), test.threads,
                static_cast<int>(config.directions), used / (1 << 20), plan / (1 << 20), plan / used);
    CHECK(used <= plan);
    CHECK(plan <= std::max(1.5 * used, used + (1 << 22)));
}

}  // namespace

int main()
{
    test_forward({224, 1, 1});
    test_forward({224, 8, 1});
    test_forward({224, 8, 3});
    test_forward({1024, 1, 1});
    test_forward({512, 2, 1, {}, [](Config& c) { c.class_token = ClassToken::head; }});
    test_forward({1024, 2, 2, {}, [](Config& c) { c.class_token = ClassToken::none; }});
    test_forward(
        {1024, 1, 1, {}, [](Config& c) { c.directions = Directions::ssm, c.class_token = ClassToken::double_; }});
    test_forward(
        {512, 3, 2, {}, [](Config& c) { c.directions = Directions::block, c.class_token = ClassToken::head; }});
    test_forward(
        {1024, 1, 1, {}, [](Config& c) { c.directions = Directions::none, c.class_token = ClassToken::none; }});
    test_training({224, 1, 1});
    test_training({224, 8, 1});
    test_training({224, 8, 3});
    test_training({224, 8, 2, Memory::fast});
    test_training({512, 2, 1});
    test_training({1024, 1, 1});
    test_training({512, 2, 2, Memory::least});
    test_training({1024, 1, 1, Memory::least});
    test_training({1024, 2, 2});
    test_training({1024, 1, 1, Memory::lean, [](Config& c) { c.directions = Directions::ssm; }});
    test_forward({512, 2, 2, {}, [](Config& c) { c.table_height = c.table_width = 224; }});
    test_training({512, 2, 2, Memory::lean, [](Config& c) { c.table_height = c.table_width = 224; }});
    test_training({32, 1, 1, Memory::lean, [](Config& c) { c.table_height = 512, c.table_width = 1024; }});
    test_training({512, 3, 2, Memory::lean, [](Config& c) { c.directions = Directions::block; }});
    test_training({1024, 1, 1, Memory::lean, [](Config& c) { c.directions = Directions::none; }});
    test_training({224, 4, 1, Memory::fast,
                   [](Config& c) { c.layer_scale = 0.1, c.class_token = ClassToken::none, c.pool = Pool::max; }});
    Config huge;
    huge.img_height = huge.img_width = 1 << 16;
    CHECK(training_bytes(huge, Memory::lean, std::int64_t{1} << 60) == std::numeric_limits<std::int64_t>::max());
    CHECK(saved_bytes(huge, Memory::lean, std::int64_t{1} << 60) == std::numeric_limits<std::int64_t>::max());
    CHECK_THROWS(training_bytes(huge, Memory::lean, 0), std::invalid_argument);
    CHECK_THROWS(saved_bytes(huge, Memory::lean, -1), std::invalid_argument);
    return check_failures();
}
