// SPDX-License-Identifier: Apache-2.0
// The plan of memory on the device against what inference and training steps take there. Without a GPU kernels do not
// run here: only what is asked for counts.
#include <cstdio>

#include "arena.h"
#include "network_cuda.h"
#ifdef VIMCORE_SHIM
#include "engine.h"
#endif

using namespace vimcore;
using namespace vimcore::test;

namespace {

struct Case {
    std::int64_t size, batch;
    DType dtype;
    Memory memory = Memory::lean;
    void (*change)(Config&) = [](Config&) {};
};

void compare_bytes(const char* what, const Case& test, std::size_t bytes, std::int64_t planned)
{
    const auto used = static_cast<double>(bytes), plan = static_cast<double>(planned);
    std::printf("%4lld px, batch %2lld, %-4s %s %-9s: used %7.1f MiB, plan %7.1f (%.2f)\n",
                static_cast<long long>(test.size), static_cast<long long>(test.batch), name_of(test.dtype),
                name_of(test.memory), what, used / (1 << 20), plan / (1 << 20), plan / used);
    CHECK(used <= plan);
    // 32 MiB are for cuBLASLt, which is not here
    CHECK(plan <= std::max(1.5 * used, used + (4 << 20)) + (32 << 20));
}

void test_case(const Case& test)
{
    Config c;
    c.img_height = c.img_width = test.size;
    c.depth = 2;
    c.num_classes = 10;
    test.change(c);
    c.validate();
    Context ctx(Device::cuda());
    NetworkWeights weights = NetworkWeights::zeros(ctx, c), gradients = NetworkWeights::zeros(ctx, c);
    const Shape shape{test.batch, c.in_chans, c.img_height, c.img_width};
    Buffer pixels(static_cast<std::size_t>(shape.numel()) * size_of(test.dtype), Device::cuda());
    const Tensor images{pixels.data(), shape, test.dtype, Device::cuda()};
    Side side(ctx, test.dtype);
    vimcore::Outputs out;
    out.logits = side.result(logits_shape(c, test.batch));
    const std::size_t logits = out.logits.bytes();
    for (int step = 0; step < 2; step++) forward(ctx, c, weights.params, images, out);
    compare_bytes("inference", test, ctx.arena().bytes() + logits,
                  forward_bytes(c, test.batch, test.dtype, 1, Device::cuda()));
    Context training(Device::cuda());
    Saved saved;
    saved.memory = test.memory;
    for (int step = 0; step < 2; step++) {
        forward(training, c, weights.params, images, out, &saved);
        backward(training, c, weights.params, images, saved, out, gradients.params, {});
    }
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) == saved_bytes(c, test.memory, test.batch, test.dtype));
    compare_bytes("training", test, training.arena().bytes(),
                  training_bytes(c, test.memory, test.batch, test.dtype, 1, Device::cuda()));
}

}  // namespace

int main()
{
#ifdef VIMCORE_SHIM
    shim::set_running(false);
#endif
    for (DType dtype : device_types) {
        test_case({224, 1, dtype});
        test_case({224, 16, dtype});
    }
    test_case({512, 4, DType::bf16, Memory::fast});
    test_case({512, 4, DType::bf16, Memory::least});
    test_case({1024, 1, DType::bf16});
    test_case({512, 2, DType::bf16, Memory::lean, [](Config& c) { c.directions = Directions::ssm; }});
    test_case({512, 2, DType::bf16, Memory::lean, [](Config& c) { c.directions = Directions::block; }});
    test_case({512, 2, DType::f32, Memory::fast, [](Config& c) { c.directions = Directions::none; }});
    test_case({512, 2, DType::f32, Memory::lean, [](Config& c) { c.d_state = 64; }});
    test_case({224, 4, DType::bf16, Memory::lean, [](Config& c) {
                   c.layer_scale = 0.1;
                   c.class_token = ClassToken::none;
                   c.pool = Pool::max;
               }});
    return check_failures();
}
