// SPDX-License-Identifier: Apache-2.0
// Casts of weights: many in one launch, with the bits of one by one; renewed after every way of changing weights, also
// in recorded work and between streams; how many launches that takes.
#include <span>
#include <string>
#include <vector>

#include "core/weight_cache.h"
#include "network_cuda.h"
#ifdef VIMCORE_SHIM
#include "runtime.h"
#endif

using namespace vimcore;
using namespace vimcore::test;

namespace {

template <class F>
std::shared_ptr<void> record(Context& ctx, F&& program)
{
    return backend_of(ctx).record(ctx, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); }, &program);
}

// Kernels that f() launches; -1 on a device, which does not count.
template <class F>
std::int64_t launches(F&& f)
{
#ifdef VIMCORE_SHIM
    const std::int64_t before = shim::launches();
    f();
    return shim::launches() - before;
#else
    f();
    return -1;
#endif
}

// Lengths around vectors, blocks and pieces; addresses that allow vectors, or none on either side; all values.
void check_bits(Side side, std::span<const DType> types)
{
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Random random(1);
    std::vector<Copy> copies;
    std::vector<Tensor> alone;
    for (DType to : types)
        for (std::int64_t count : {0, 1, 7, 8, 9, 2047, 2048, 4095, 4096, 4097, 12289})
            for (const auto& [from_shift, to_shift] : {std::pair{0, 0}, {1, 0}, {0, 1}, {3, 4}}) {
                Floats values = random.normal(count, 1e3f);
                const Floats special = {0.0f,     -0.0f, infinity,    -infinity, 65519.9f,
                                        65520.0f, 1e-7f, 1.00390625f, 1e38f};
                for (std::size_t i = 0; i < values.size() && i < special.size(); i++) values[i] = special[i];
                const Floats none(values.size(), -1.0f);
                copies.push_back(
                    {side.make({count}, DType::f32, values, from_shift), side.make({count}, to, none, to_shift)});
                alone.push_back(side.make({count}, to, none));
                backend_of(side.ctx).copy(side.ctx, copies.back().from, alone.back());
            }
    const std::shared_ptr<void> prepared = backend_of(side.ctx).prepare_copies(side.ctx, copies);
    for (int round = 0; round < 2; round++) {
        const std::int64_t count = launches([&] { backend_of(side.ctx).run_copies(side.ctx, prepared.get()); });
        if (side.ctx.device() != Device::cpu()) CHECK(count == -1 || count == 1);
        for (std::size_t i = 0; i < copies.size(); i++) CHECK(side.bytes(copies[i].to) == side.bytes(alone[i]));
        for (const Copy& c : copies) backend_of(side.ctx).fill_zero(side.ctx, c.to);
    }
    backend_of(side.ctx).run_copies(side.ctx, backend_of(side.ctx).prepare_copies(side.ctx, {}).get());
    if (side.ctx.device() == Device::cpu()) return;
    const Tensor wrong = side.make({4}, DType::bf16, Floats(4));
    CHECK_THROWS(backend_of(side.ctx).prepare_copies(side.ctx, {{wrong, wrong}}), std::invalid_argument);
}

// A network with a batch of images, its logits, and gradients.
struct Bench {
    Bench(Context& ctx, const Config& config, DType dtype)
        : ctx(ctx),
          config(config),
          side(ctx, dtype),
          weights(ctx, config,
                  [&](const std::string& name, const Shape& shape) { return random_weight(config, name, shape); }),
          gradients(NetworkWeights::zeros(ctx, config))
    {
        const Shape shape{2, config.in_chans, config.img_height, config.img_width};
        images = side.activation(shape, normal(5, dtype, shape.numel()));
        out.logits = side.result(config.logits_shape(2));
        dout.logits = side.activation(out.logits.shape, normal(8, dtype, out.logits.numel()));
    }
    void infer() { forward(ctx, config, weights.params, images, out); }
    Floats inferred()
    {
        infer();
        return side.values(out.logits);
    }
    void step()
    {
        for (const auto& [name, tensor] : gradients.tensors) backend_of(ctx).fill_zero(ctx, tensor);
        forward(ctx, config, weights.params, images, out, &saved);
        backward(ctx, config, weights.params, images, saved, dout, gradients.params, {});
    }
    // The same weights without anything that was cached; a training step's logits are those of all tokens.
    Floats fresh(bool training = false)
    {
        Saved unused;
        Params same = weights.params;
        same.cache = nullptr;
        same.changed();
        vimcore::Outputs own;
        own.logits = side.result(out.logits.shape);
        forward(ctx, config, same, images, own, training ? &unused : nullptr);
        return side.values(own.logits);
    }
    // Other values in some of the weights, in place.
    void write(Random& random, double share)
    {
        for (const auto& [name, tensor] : weights.tensors) {
            if (random.normal(1)[0] > share) continue;
            Floats w = values_of(ctx, tensor);
            const float factor = 1.0f + 0.1f * random.normal(1)[0];
            for (float& value : w) value *= factor;
            assign(ctx, tensor, w);
        }
    }

    Context& ctx;
    const Config& config;
    Side side;
    NetworkWeights weights, gradients;
    Tensor images;
    vimcore::Outputs out, dout;
    Saved saved;
};

Config small()
{
    Config c = designs()[4];  // both directions, with projections of their own
    c.embed_dim = 16;
    c.img_height = c.img_width = 8;
    return c;
}

// One launch more than when nothing has changed, whatever was written; the results of a network without a past.
void check_renewal()
{
    const Config config = small();
    Random random(2);
    for (DType dtype : device_types) {
        Context ctx(Device::cuda());
        Bench net(ctx, config, dtype);
        net.infer();
        const std::int64_t least = launches([&] { net.infer(); }), step = (net.step(), launches([&] { net.step(); }));
        for (int round = 0; round < 6; round++) {
            net.write(random, round % 2 ? 3 : -0.5);
            net.weights.params.changed();
            Floats logits;
            const std::int64_t count = launches([&] { net.infer(); });
            CHECK(count == -1 || count == least + 1);
            CHECK(same_bits(net.side.values(net.out.logits), net.fresh()));
            CHECK(launches([&] { net.infer(); }) == (count == -1 ? -1 : least));
            if (round > 1) continue;
            net.weights.params.changed();
            const std::int64_t training = launches([&] { net.step(); });  // backward has the casts of its forward
            CHECK(training == -1 || training == step + 1);
        }
    }
    // What is first asked for later joins the others.
    Context ctx(Device::cuda());
    Bench headless(ctx, config, DType::bf16);
    vimcore::Outputs tokens;
    tokens.tokens = headless.side.result({2, config.tokens(), config.embed_dim});
    for (int round = 0; round < 2; round++) {
        forward(ctx, config, headless.weights.params, headless.images, tokens);
        headless.weights.params.changed();
    }
    for (int round = 0; round < 3; round++) {
        CHECK(same_bits(headless.inferred(), headless.fresh()));
        headless.write(random, 3);
        headless.weights.params.changed();
    }
    // Types side by side: each renews its own.
    Bench narrow(ctx, config, DType::bf16), half(ctx, config, DType::f16);
    half.weights.params = narrow.weights.params;
    half.weights.tensors = narrow.weights.tensors;
    for (int round = 0; round < 3; round++) {
        CHECK(same_bits(narrow.inferred(), narrow.fresh()));
        CHECK(same_bits(half.inferred(), half.fresh()));
        narrow.write(random, 3);
        narrow.weights.params.changed();
    }
}

// What is recorded reads the weights of its replay: a training step always, an inference whose casts were stale.
void check_recorded()
{
    const Config config = small();
    Random random(3);
    for (DType dtype : {DType::bf16, DType::f32}) {
        Context ctx(Device::cuda());
        const std::shared_ptr<void> stream = backend_of(ctx).make_stream(0);
        ctx.set_stream(stream.get());
        Bench net(ctx, config, dtype);
        CHECK_THROWS(record(ctx, [&] { net.infer(); }), Error);  // casts have no memory yet
        for (int i = 0; i < 2; i++) net.step();
        for (int i = 0; i < 2; i++) net.infer();
        const std::int64_t infer = launches([&] { net.infer(); }), step = launches([&] { net.step(); });
        ctx.hold_memory(true);
        const std::shared_ptr<void> plain = record(ctx, [&] { net.infer(); });
        CHECK(launches([&] { backend_of(ctx).replay(ctx, plain.get()); }) == infer);
        net.weights.params.changed();
        const std::shared_ptr<void> inference = record(ctx, [&] { net.infer(); });
        const std::shared_ptr<void> training = record(ctx, [&] { net.step(); });
        net.infer();  // renews the casts for calls that are not recorded
        const std::shared_ptr<void> again = record(ctx, [&] { net.step(); });
        const std::shared_ptr<void> two = record(ctx, [&] {
            net.step();
            net.step();
        });
        for (int round = 0; round < 2; round++) {
            net.write(random, 0.5);  // only replays know
            const Floats want = net.fresh(), trained = net.fresh(true);
            for (const auto& graph : {inference, training, again, two}) {
                backend_of(ctx).fill_zero(ctx, net.out.logits);
                const std::int64_t count = launches([&] { backend_of(ctx).replay(ctx, graph.get()); });
                CHECK(same_bits(net.side.values(net.out.logits), graph == inference ? want : trained));
                CHECK(count == -1 || count == (graph == inference ? infer + 1
                                               : graph == two     ? 2 * step + 2
                                                                  : step + 1));
            }
            net.write(random, 0.5);
            net.weights.params.changed();  // calls that are not recorded go on as ever
            CHECK(same_bits(net.inferred(), net.fresh()));
        }
    }
}

// Two streams that share weights: whoever comes first renews for both.
void check_streams()
{
    const Config config = small();
    Random random(4);
    Context one(Device::cuda()), two(Device::cuda());
    const std::shared_ptr<void> a = backend_of(one).make_stream(0), b = backend_of(two).make_stream(0);
    one.set_stream(a.get());
    two.set_stream(b.get());
    Bench net(one, config, DType::bf16);
    vimcore::Outputs out;
    Side side(two, DType::bf16);
    out.logits = side.result(net.out.logits.shape);
    auto other = [&] { forward(two, config, net.weights.params, net.images, out); };
    net.infer();
    other();
    const std::int64_t least = launches(other);
    for (int round = 0; round < 4; round++) {
        net.write(random, 3);
        net.weights.params.changed();
        const Floats want = net.fresh();
        std::int64_t count = 0;
        if (round % 2) count = launches(other) + launches([&] { net.infer(); });
        if (round % 2 == 0) count = launches([&] { net.infer(); }) + launches(other);
        CHECK(count == -2 || count == 2 * least + 1);
        CHECK(same_bits(net.side.values(net.out.logits), want));
        CHECK(same_bits(side.values(out.logits), want));
    }
}

}  // namespace

int main()
{
    check_bits(Side::cuda(DType::f32), device_types);
    constexpr DType plain[] = {DType::f32};
    check_bits({cpu_context(), DType::f32}, plain);
#ifdef VIMCORE_SHIM
    shim::set_race_checks(false);  // whole networks take the time
#endif
    check_renewal();
    check_recorded();
    check_streams();
    return check_failures();
}
