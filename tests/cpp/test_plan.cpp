// SPDX-License-Identifier: Apache-2.0
// The plan of a training step against the memory that it takes: scratch memory, and what is saved.
#include <cstdio>
#include <vector>

#include "arena.h"
#include "check.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

std::size_t arenas(Context& ctx)
{
    std::size_t bytes = ctx.arena().bytes();
    for (int i = 0; ctx.threads() > 1 && i < ctx.threads(); i++) bytes += ctx.worker(i).arena().bytes();
    return bytes;
}

struct Case {
    std::int64_t size, batch;
    int threads;
    Memory memory = Memory::lean;
    void (*change)(Config&) = [](Config&) {};
};

void test(const Case& test)
{
    Config config;
    config.img_height = config.img_width = test.size;
    config.depth = 2;
    config.num_classes = 10;
    test.change(config);
    std::vector<std::vector<float>> values;
    Params params, gradients;
    for (Params* p : {&params, &gradients})
        for_each_param(config, *p, [&](const std::string&, Tensor& tensor, const Shape& shape) {
            values.emplace_back(static_cast<std::size_t>(shape.numel()), p == &params ? 0.01f : 0.0f);
            tensor = {values.back().data(), shape, DType::f32, {}};
        });
    params.changed();
    Context ctx(Device::cpu(), test.threads);
    std::vector<float> pixels(static_cast<std::size_t>(test.batch * 3 * test.size * test.size), 0.1f);
    std::vector<float> logits(static_cast<std::size_t>(test.batch * 10), 0.1f);
    const Tensor images{pixels.data(), {test.batch, 3, test.size, test.size}, DType::f32, {}};
    Outputs out;
    out.logits = {logits.data(), {test.batch, 10}, DType::f32, {}};
    Saved saved;
    saved.memory = test.memory;
    for (int step = 0; step < 2; step++) {
        forward(ctx, config, params, images, out, &saved);
        backward(ctx, config, params, images, saved, out, gradients, {});
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

}  // namespace

int main()
{
    test({224, 1, 1});
    test({224, 8, 1});
    test({224, 8, 3});
    test({224, 8, 2, Memory::fast});
    test({512, 2, 1});
    test({1024, 1, 1});
    test({512, 2, 2, Memory::least});
    test({1024, 1, 1, Memory::least});
    test({1024, 2, 2});
    test({1024, 1, 1, Memory::lean, [](Config& c) { c.directions = Directions::ssm; }});
    test({512, 3, 2, Memory::lean, [](Config& c) { c.directions = Directions::block; }});
    test({1024, 1, 1, Memory::lean, [](Config& c) { c.directions = Directions::none; }});
    test({224, 4, 1, Memory::fast,
          [](Config& c) { c.layer_scale = 0.1, c.class_token = ClassToken::none, c.pool = Pool::max; }});
    Config huge;
    huge.img_height = huge.img_width = 1 << 16;
    CHECK(training_bytes(huge, Memory::lean, std::int64_t{1} << 60) == std::numeric_limits<std::int64_t>::max());
    CHECK(saved_bytes(huge, Memory::lean, std::int64_t{1} << 60) == std::numeric_limits<std::int64_t>::max());
    CHECK_THROWS(training_bytes(huge, Memory::lean, 0), std::invalid_argument);
    CHECK_THROWS(saved_bytes(huge, Memory::lean, -1), std::invalid_argument);
    return check_failures();
}
