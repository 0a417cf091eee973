// SPDX-License-Identifier: Apache-2.0
// The plan of memory on the device against what inference and training steps take there, to the byte. Without a GPU
// kernels do not run here: only what is asked for counts. With cuBLASLt the plan is an upper bound.
#include <algorithm>
#include <cstdio>

#include "core/context_internals.h"
#include "core/device_scratch.h"
#include "cublaslt.h"
#include "network/count.h"
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

// Bytes that a context's scratch memory took at the most since the last question: also while it grew, on the shim.
class Reserved {
public:
    std::int64_t most([[maybe_unused]] Context& ctx)
    {
#ifdef VIMCORE_SHIM
        const std::size_t most = shim::most_memory() - before_, now = shim::most_memory();
        CHECK(now - before_ == arena_of(ctx).bytes());
        return static_cast<std::int64_t>(most);
#else
        return static_cast<std::int64_t>(arena_of(ctx).most_bytes());
#endif
    }

private:
#ifdef VIMCORE_SHIM
    std::size_t before_ = (shim::most_memory(), shim::most_memory());
#endif
};

void compare(const char* what, const Case& test, Context& ctx, std::int64_t most, const ScratchBytes& plan, bool first)
{
    const auto held = static_cast<std::int64_t>(arena_of(ctx).bytes());
    const std::int64_t planned_most = first ? plan.most : plan.held;
    const bool as_planned = cuda::has_cublaslt() ? held <= plan.held && most <= std::max(plan.held, plan.most)
                                                 : held == plan.held && most == planned_most;
    if (!as_planned || test.batch == 128)
        std::printf(
            "%4lld px, batch %3lld, N %2lld, %-4s %-5s %-9s: held %lld, planned %lld; most %lld, planned %lld\n",
            static_cast<long long>(test.size), static_cast<long long>(test.batch), static_cast<long long>(test.states),
            name_of(test.dtype), name_of(test.memory), what, static_cast<long long>(held),
            static_cast<long long>(plan.held), static_cast<long long>(most), static_cast<long long>(planned_most));
    CHECK(as_planned);
}

void test_case(const Case& test)
{
    Config c;
    c.img_height = c.img_width = test.size;
    c.depth = 4;  // deeper than what is counted
    c.num_classes = 10;
    c.d_state = test.states;
    test.change(c);
    c.validate();
    Context warm(Device::cuda());  // for as long as others are measured
    NetworkWeights weights = NetworkWeights::zeros(warm, c), gradients = NetworkWeights::zeros(warm, c);
    const Shape shape = c.images_shape(test.batch);
    Buffer pixels(static_cast<std::size_t>(shape.numel()) * size_of(test.dtype), Device::cuda());
    const Tensor images{pixels.data(), shape, test.dtype, Device::cuda()};
    Side side(warm, test.dtype);
    vimcore::Outputs out;
    out.logits = side.result(c.logits_shape(test.batch));
    {  // casts weights, which the plan of scratch memory does not have
        Saved saved;
        forward(warm, c, weights.params, images, out);
        forward(warm, c, weights.params, images, out, &saved);
        backward(warm, c, weights.params, images, saved, out, gradients.params, {});
    }

    const std::int64_t product_bytes = cuda::has_cublaslt() ? device_scratch::blas_workspace : 0;
    const Device device = Device::cuda();
    const ScratchBytes inference = count_forward(c, test.batch, test.dtype, 1, device, product_bytes);
    const ScratchBytes training = count_training(c, test.memory, test.batch, test.dtype, 1, device, product_bytes);
    // What users see has room for the library.
    const std::int64_t room = device_scratch::blas_workspace + device_scratch::blas_alignment;
    for (const auto& [own, public_one] :
         {std::pair(inference, forward_scratch(c, test.batch, test.dtype, 1, device)),
          std::pair(training, training_scratch(c, test.memory, test.batch, test.dtype, 1, device))})
        CHECK(own.held <= public_one.held && public_one.held <= own.held + room);

    Context ctx(Device::cuda());
    Reserved calls;
    for (int call = 0; call < 2; call++) {
        forward(ctx, c, weights.params, images, out);
        compare("inference", test, ctx, calls.most(ctx), inference, call == 0);
    }
    Context trainer(Device::cuda());
    Saved saved;
    saved.memory = test.memory;
    saved.prepare(c, test.batch, test.dtype, Device::cuda());
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) ==
          saved_bytes(c, test.memory, test.batch, test.dtype, Device::cuda()));
    Reserved steps;
    for (int step = 0; step < 2; step++) {
        forward(trainer, c, weights.params, images, out, &saved);
        backward(trainer, c, weights.params, images, saved, out, gradients.params, {});
        compare("training", test, trainer, steps.most(trainer), training, step == 0);
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
    for (DType dtype : {DType::f32, DType::bf16}) {
        test_case({512, 4, dtype, Memory::fast});
        test_case({512, 4, dtype, Memory::least});
    }
    test_case({1024, 1, DType::bf16});
    for (std::int64_t states : {5, 8, 16, 32, 48, 64})
        for (DType dtype : {DType::f32, DType::bf16})
            for (std::int64_t size : {224, 1024})
                for (std::int64_t batch : {1, 8, 64, 128}) test_case({size, batch, dtype, Memory::lean, none, states});
    void (*const changes[])(Config&) = {
        [](Config& c) { c.directions = Directions::none; },
        [](Config& c) { c.directions = Directions::sequence; },
        [](Config& c) { c.directions = Directions::block, c.depth = 8; },
        [](Config& c) { c.directions = Directions::ssm; },
        [](Config& c) { c.class_token = ClassToken::none; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::max, c.layer_scale = 0.1; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::all; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::last, c.num_classes = 0; },
        [](Config& c) { c.class_token = ClassToken::double_; },
        [](Config& c) { c.class_token = ClassToken::head, c.rope = true, c.rope_residual = true; },
        [](Config& c) { c.norm = Norm::layer, c.layer_scale = 0.1, c.pos_embed = false; },
        [](Config& c) { c.table_height = c.table_width = 160; },
        [](Config& c) { c.d_conv = 7, c.num_classes = 5000, c.depth = 1; },
        [](Config& c) { c.embed_dim = 30, c.expand = 1, c.depth = 2; },  // no vectors
        [](Config& c) { c.embed_dim = 31, c.expand = 1, c.dt_rank = 3; },
        [](Config& c) { c.embed_dim = 1280, c.dt_rank = 400; },  // too much for registers and shared memory
    };
    for (const auto change : changes)
        for (DType dtype : {DType::f32, DType::bf16})
            for (std::int64_t states : {16, 32}) test_case({224, 5, dtype, Memory::fast, change, states});
    return check_failures();
}
