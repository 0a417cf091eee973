// SPDX-License-Identifier: Apache-2.0
// The plans of a forward and of a training step against the memory that they take, to the byte: scratch memory that
// stays, the most of it in the first call, and what is saved.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "core/context_internals.h"
#include "core/counting.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

struct Case {
    std::int64_t size, batch;
    int threads = 1;
    Memory memory = Memory::lean;
    void (*change)(Config&) = [](Config&) {};
    DType dtype = DType::f32;
};

// Patches of 4 x 4: 32 pixels are 64 of them, so that several images make a group; 96 pixels are 576, more than a tile.
// Deeper than what is counted.
Config config_of(const Case& test)
{
    Config c;
    c.img_height = c.img_width = test.size;
    c.patch_size = c.stride = 4;
    c.embed_dim = 48;
    c.d_state = 8;
    c.depth = 4;
    c.num_classes = 10;
    test.change(c);
    c.validate();
    return c;
}

// Weights or gradients, images or logits: values do not matter.
class Values {
public:
    Values(const Config& config, DType dtype) : dtype_(dtype)
    {
        for_each_param(config, params, [&](const std::string&, Tensor& tensor, const Shape& shape) {
            tensor = make(shape, wide(dtype_));
        });
        params.changed();
    }
    Tensor make(const Shape& shape) { return make(shape, dtype_); }
    Tensor make(const Shape& shape, DType dtype)
    {
        Tensor tensor{nullptr, shape, dtype, {}};
        tensor.data = memory_.emplace_back(tensor.bytes()).data();
        for (std::int64_t i = 0; i < shape.numel(); i++) {
            if (dtype == DType::f64)
                tensor.as<double>()[i] = 0.01;
            else if (dtype == DType::f32)
                tensor.as<float>()[i] = 0.01f;
            else
                tensor.as<std::uint16_t>()[i] = 0x3c24;  // bf16
        }
        return tensor;
    }
    Params params;

private:
    DType dtype_;
    std::vector<Buffer> memory_;
};

// Bytes of a context and its workers.
ScratchBytes used(Context& ctx)
{
    ScratchBytes bytes;
    auto add = [&](Context& own) {
        bytes.held += static_cast<std::int64_t>(arena_of(own).bytes());
        bytes.most += static_cast<std::int64_t>(arena_of(own).most_bytes());
    };
    add(ctx);
    for (const auto& worker : internals(ctx).workers) add(*worker);
    return bytes;
}

void compare(const char* what, const Case& test, const ScratchBytes& used, const ScratchBytes& plan)
{
    const Config c = config_of(test);
    const bool equal = used.held == plan.held && (test.threads == 1 ? used.most == plan.most : used.most <= plan.most);
    if (!equal || test.size == 224)
        std::printf("%s, %lld px, batch %lld, %d threads, %s, %s, N %lld: held %lld, planned %lld; most %lld, %lld\n",
                    what, static_cast<long long>(test.size), static_cast<long long>(test.batch), test.threads,
                    name_of(test.memory), name_of(c.directions), static_cast<long long>(c.d_state),
                    static_cast<long long>(used.held), static_cast<long long>(plan.held),
                    static_cast<long long>(used.most), static_cast<long long>(plan.most));
    CHECK(equal);
    CHECK(plan.most >= plan.held);
}

void test_case(const Case& test)
{
    const Config config = config_of(test);
    Values weights(config, test.dtype), gradients(config, test.dtype);
    const Tensor images = weights.make(config.images_shape(test.batch));
    Outputs out;
    out.logits = weights.make(config.logits_shape(test.batch));
    const ScratchBytes inference = forward_scratch(config, test.batch, test.dtype, test.threads);
    const ScratchBytes training = training_scratch(config, test.memory, test.batch, test.dtype, test.threads);
    CHECK(forward_bytes(config, test.batch, test.dtype, test.threads) ==
          inference.most + static_cast<std::int64_t>(out.logits.bytes()));
    CHECK(training_bytes(config, test.memory, test.batch, test.dtype, test.threads) == training.most);

    Context ctx(Device::cpu(), test.threads);
    for (int call = 0; call < 2; call++) {
        forward(ctx, config, weights.params, images, out);
        compare("inference", test, used(ctx), inference);
    }
    Context trainer(Device::cpu(), test.threads);
    Saved saved;
    saved.memory = test.memory;
    for (int step = 0; step < 2; step++) {
        forward(trainer, config, weights.params, images, out, &saved);
        backward(trainer, config, weights.params, images, saved, out, gradients.params, {});
        compare("training", test, used(trainer), training);
    }
    CHECK(static_cast<std::int64_t>(saved.storage.bytes()) == saved_bytes(config, test.memory, test.batch, test.dtype));
}

void test_sizes()
{
    for (const std::int64_t batch : {1, 6, 7, 8, 22})
        for (const int threads : {1, 2, 3}) test_case({32, batch, threads});
    for (const std::int64_t batch : {1, 8}) test_case({32, batch, 1, Memory::lean, [](Config&) {}, DType::f64});
    for (const std::int64_t batch : {1, 8})
        for (const int threads : {1, 2}) test_case({32, batch, threads, Memory::lean, [](Config&) {}, DType::bf16});
    for (const Memory memory : {Memory::least, Memory::fast})
        test_case({96, 3, 2, memory, [](Config&) {}, DType::bf16});
    for (const std::int64_t size : {84, 96, 132})  // 441, 576 and 1089 patches
        for (const std::int64_t batch : {1, 3})
            for (const int threads : {1, 2, 3}) test_case({size, batch, threads});
    test_case({32, 128, 2, Memory::lean, [](Config& c) { c.depth = 2; }});
    test_case({368, 2, 2, Memory::lean, [](Config& c) { c.depth = 2, c.expand = 1; }});  // too long to run side by side
    test_case({224, 4, 3, Memory::lean, [](Config& c) {
                   c = {};
                   c.depth = 4;
               }});
}

void test_options()
{
    using Change = void (*)(Config&);
    const Change directions[] = {
        [](Config& c) { c.directions = Directions::none; }, [](Config& c) { c.directions = Directions::sequence; },
        [](Config& c) { c.directions = Directions::block, c.depth = 8; },
        [](Config& c) { c.directions = Directions::ssm; }, [](Config& c) { c.directions = Directions::ssm_conv; }};
    for (const Change change : directions)
        for (const Memory memory : {Memory::least, Memory::lean, Memory::fast}) {
            test_case({32, 9, 1, memory, change});
            test_case({32, 15, 2, memory, change});
            test_case({96, 2, 2, memory, change});
        }
    const Change changes[] = {
        [](Config& c) { c.class_token = ClassToken::none; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::max; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::all; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::last; },
        [](Config& c) { c.class_token = ClassToken::none, c.pool = Pool::max, c.num_classes = 0; },
        [](Config& c) { c.class_token = ClassToken::head; },
        [](Config& c) { c.class_token = ClassToken::registers, c.registers = 4, c.neck_reduction = 2; },
        [](Config& c) { c.class_token = ClassToken::head, c.frames = 3; },
        [](Config& c) { c.class_token = ClassToken::double_; },
        [](Config& c) { c.class_token = ClassToken::random, c.num_classes = 0; },
        [](Config& c) { c.class_token = ClassToken::head, c.rope = true, c.rope_residual = true; },
        [](Config& c) { c.layer_scale = 0.1; },
        [](Config& c) { c.layer_scale = 0.1, c.directions = Directions::block, c.norm = Norm::layer; },
        [](Config& c) { c.drop_rate = 0.1, c.drop_path_rate = 0.1, c.pos_embed = false; },
        [](Config& c) { c.table_height = c.table_width = 64; },
        [](Config& c) { c.table_height = 200, c.table_width = 300; },
        [](Config& c) { c.depth = 1; },
        [](Config& c) { c.depth = 2, c.num_classes = 5000, c.d_conv = 7, c.dt_rank = 5; },
        [](Config& c) { c.stride = 2, c.embed_dim = 31, c.expand = 3; },
        [](Config& c) { c.d_state = 16; },
        [](Config& c) { c.d_state = 32; },
        [](Config& c) { c.d_state = 64; },
        [](Config& c) { c.d_state = 5; },
    };
    for (const Change change : changes) {
        test_case({32, 9, 1, Memory::lean, change});
        test_case({36, 8, 3, Memory::fast, change});
        test_case({96, 1, 1, Memory::least, change});
    }
}

// What no machine has: harmless, and no loop over it.
void test_absurd()
{
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    Config huge;
    huge.img_height = huge.img_width = 1 << 16;
    for (const Device device : {Device::cpu(), Device::cuda()}) {
        const DType dtype = device == Device::cpu() ? DType::f32 : DType::bf16;
        CHECK(forward_bytes(huge, std::int64_t{1} << 60, dtype, 1, device) == largest);
        CHECK(training_bytes(huge, Memory::lean, std::int64_t{1} << 60, dtype, 1, device) == largest);
        std::int64_t before = 0;
        for (std::int64_t batch = 1; batch < largest / 2; batch *= 2) {  // never less for more images
            for (const int threads : {1, 1024}) forward_bytes(Config{}, batch, dtype, threads, device);
            const std::int64_t bytes = training_bytes(Config{}, Memory::lean, batch, dtype, 1, device);
            CHECK(bytes > before || (bytes == before && bytes == largest));
            before = bytes;
        }
        CHECK(before == largest);
        const std::int64_t long_sequence = training_bytes(huge, Memory::least, 1, dtype, 1, device);  // 2^24 tokens
        CHECK(long_sequence > std::int64_t{1} << 36 && long_sequence < std::int64_t{1} << 42);
        Config wide;
        wide.embed_dim = wide.num_classes = 1 << 16, wide.d_state = 4096;
        CHECK(forward_bytes(wide, 1 << 30, dtype, 1, device) == largest);
    }
    CHECK(saved_bytes(huge, Memory::lean, std::int64_t{1} << 60) == largest);
    CHECK(saved_bytes(huge, Memory::lean, 1) > std::int64_t{1} << 36);
    CHECK_THROWS(forward_scratch(huge, 0), std::invalid_argument);
    CHECK_THROWS(training_scratch(huge, Memory::lean, 1, DType::f32, 0), std::invalid_argument);
    CHECK_THROWS(training_bytes(huge, Memory::lean, 0), std::invalid_argument);
    CHECK_THROWS(saved_bytes(huge, Memory::lean, -1), std::invalid_argument);
}

// for_each_step: all of few; of many the first, middle and last, each once and in order.
void test_steps()
{
    auto steps = [](Context& ctx, std::int64_t begin, std::int64_t end, std::int64_t step) {
        std::vector<std::int64_t> seen;
        for_each_step(ctx, begin, end, step, [&](std::int64_t i) { seen.push_back(i); });
        return seen;
    };
    const auto backend = counting_backend(Device::cpu(), 0);
    Context counting = ContextInternals::make(*backend, Device::cpu(), 1, Arena::Mode::counting);
    Context ctx(Device::cpu(), 1);
    using All = std::vector<std::int64_t>;
    CHECK(steps(ctx, 3, 20, 5) == (All{3, 8, 13, 18}));
    CHECK(steps(ctx, 3, 3, 5).empty());
    CHECK(steps(ctx, 0, 100, 1).size() == 100);
    for (std::int64_t count = 0; count < 8; count++) CHECK(steps(counting, 0, count, 1) == steps(ctx, 0, count, 1));
    CHECK(steps(counting, 0, 100, 1) == (All{0, 1, 49, 50, 51, 98, 99}));
    CHECK(steps(counting, 10, 1011, 10) == (All{10, 20, 500, 510, 520, 1000, 1010}));
}

}  // namespace

int main()
{
    if (bf16_unit().empty()) setenv("VIMCORE_ISA", build_info().isa.c_str(), 1);  // emulated
    test_steps();
    test_sizes();
    test_options();
    test_absurd();
    return check_failures();
}
