// SPDX-License-Identifier: Apache-2.0
// The plan of memory on the device against what inference and training steps take there. Without a GPU kernels do not
// run here: only what is asked for counts.
#include <cstdio>

#include "core/context_internals.h"
#include "core/device_sizes.h"
#include "cublaslt.h"
#include "network_cuda.h"
#ifdef VIMCORE_SHIM
#include "engine.h"
#include "runtime.h"
#endif

using namespace vimcore;
using namespace vimcore::test;

namespace {

void none(Config&) {}

struct Case {
    std::int64_t size, batch;
    DType dtype;
    Memory memory = Memory::lean;
    void (*change)(Config&) = none;
    std::int64_t states = 16;
};

void compare_bytes(const char* what, const Case& test, std::size_t bytes, std::int64_t planned)
{
    const auto used = static_cast<double>(bytes);
    const auto plan = static_cast<double>(planned - (cuda::has_cublaslt() ? 0 : device_sizes::blas_workspace));
    std::printf("%4lld px, batch %3lld, N %2lld, %-4s %-5s %-10s: used %7.1f MiB, plan %7.1f (%.2f)\n",
                static_cast<long long>(test.size), static_cast<long long>(test.batch),
                static_cast<long long>(test.states), name_of(test.dtype), name_of(test.memory), what, used / (1 << 20),
                plan / (1 << 20), plan / used);
    CHECK(used <= plan);
    // not every product asks for as much as it may have
    const double unused = cuda::has_cublaslt() ? static_cast<double>(device_sizes::blas_workspace) : 0;
    CHECK(plan <= std::max(1.5 * used, used + (4 << 20)) + unused);
}

// Bytes that a context's scratch memory took at the most since the last question: also while it grew, on the shim.
class Reserved {
public:
    std::size_t most([[maybe_unused]] Context& ctx)
    {
#ifdef VIMCORE_SHIM
        const std::size_t most = shim::most_memory() - before_, now = shim::most_memory();
        CHECK(now - before_ == arena_of(ctx).bytes());
        return most;
#else
        return arena_of(ctx).bytes();
#endif
    }

private:
#ifdef VIMCORE_SHIM
    std::size_t before_ = (shim::most_memory(), shim::most_memory());
#endif
};

void test_case(const Case& test)
{
    Config c;
    c.img_height = c.img_width = test.size;
    c.depth = 2;
    c.num_classes = 10;
    c.d_state = test.states;
    test.change(c);
    c.validate();
    Context warm(Device::cuda());
    NetworkWeights weights = NetworkWeights::zeros(warm, c), gradients = NetworkWeights::zeros(warm, c);
    const Shape shape{test.batch, c.in_chans, c.img_height, c.img_width};
    Buffer pixels(static_cast<std::size_t>(shape.numel()) * size_of(test.dtype), Device::cuda());
    const Tensor images{pixels.data(), shape, test.dtype, Device::cuda()};
    Side side(warm, test.dtype);
    vimcore::Outputs out;
    out.logits = side.result(c.logits_shape(test.batch));
    const std::size_t logits = out.logits.bytes();
    forward(warm, c, weights.params, images, out);  // casts weights, which the plan of scratch memory does not have

    Context ctx(Device::cuda());
    Reserved inference;
    for (int step = 0; step < 2; step++) {
        forward(ctx, c, weights.params, images, out);
        compare_bytes(step ? "inference" : "first one", test, inference.most(ctx) + logits,
                      forward_bytes(c, test.batch, test.dtype, 1, Device::cuda()));
    }
    Context training(Device::cuda());
    Saved saved;
    saved.memory = test.memory;
    saved.prepare(c, test.batch, test.dtype, Device::cuda());
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) == saved_bytes(c, test.memory, test.batch, test.dtype));
    Reserved steps;
    for (int step = 0; step < 2; step++) {
        forward(training, c, weights.params, images, out, &saved);
        backward(training, c, weights.params, images, saved, out, gradients.params, {});
        compare_bytes(step ? "training" : "first step", test, steps.most(training),
                      training_bytes(c, test.memory, test.batch, test.dtype, 1, Device::cuda()));
    }
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
    for (std::int64_t states : {8, 16, 32, 64})
        for (DType dtype : {DType::f32, DType::bf16})
            for (std::int64_t size : {224, 1024})
                for (std::int64_t batch : {1, 8, 64, 128}) test_case({size, batch, dtype, Memory::lean, none, states});
    test_case({224, 4, DType::bf16, Memory::lean, [](Config& c) {
                   c.layer_scale = 0.1;
                   c.class_token = ClassToken::none;
                   c.pool = Pool::max;
               }});
    return check_failures();
}
