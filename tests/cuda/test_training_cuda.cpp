// SPDX-License-Identifier: Apache-2.0
// Training on the device: the golden files' gradients of every parameter and of the images, agreement with the CPU for
// every design, type and request, repeatability, recorded steps, training curves, and what strains number formats.
// Usage: test_training_cuda FOLDER_OF_GOLDEN_FILES
#include <cstdio>
#include <filesystem>

#include "../cpp/golden.h"
#include "core/context_internals.h"
#include "network_cuda.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

struct Gradients {
    Floats logits, images;
    std::map<std::string, Floats> params;
};

// What is asked of a training step.
struct Request {
    Memory memory = Memory::lean;
    bool tokens = false;  // gradients of tokens and of the first layer's output, too
    std::int64_t tile = 0;
    Draws draws = {};
};

// One forward and backward. dlogits: the gradient that arrives.
Gradients step(Context& ctx, const Config& c, const Params& params, DType dtype, const Floats& images,
               std::int64_t batch, const Floats& dlogits, const Request& request = {})
{
    Side side(ctx, dtype);
    const Shape image_shape = c.images_shape(batch), sequence{batch, c.tokens(), c.embed_dim};
    const Tensor x = side.activation(image_shape, images), dx = side.result(image_shape);
    vimcore::Outputs out, dout;
    out.logits = side.result(c.logits_shape(batch));
    dout.logits = side.activation(out.logits.shape, dlogits);
    if (request.tokens) {
        out.tokens = side.result(sequence);
        out.layers = dout.layers = {1};
        out.intermediates = {side.result(sequence)};
        dout.tokens = side.activation(sequence, normal(6, dtype, sequence.numel()));
        dout.intermediates = {side.activation(sequence, normal(7, dtype, sequence.numel()))};
    }
    Saved saved;
    saved.memory = request.memory;
    NetworkWeights gradients = NetworkWeights::zeros(ctx, c, wide(dtype));
    internals(ctx).tile = request.tile;
    forward(ctx, c, params, x, out, &saved, request.draws);
    backward(ctx, c, params, x, saved, dout, gradients.params, dx, request.draws);
    internals(ctx).tile = 0;
    return {side.values(out.logits), side.values(dx), gradients.values()};
}

// The largest difference of any gradient from `want`, and its name. Gradients that are nearly zero everywhere are
// measured against the largest one.
struct Worst {
    double error = 0;
    std::string name;
};
Worst worst(const Gradients& got, const Gradients& want)
{
    auto norm = [](const Floats& x) {
        double squares = 0;
        for (float v : x) squares += static_cast<double>(v) * v;
        return std::sqrt(squares);
    };
    double largest = 0;
    for (const auto& [name, value] : want.params) largest = std::max(largest, norm(value));
    Worst worst;
    auto look = [&](const std::string& name, const Floats& a, const Floats& b) {
        const double scale = std::max(norm(b), 1e-3 * largest);
        const double error = norm(b) > 0 ? difference(a, b) * norm(b) / scale : norm(a) / scale;
        if (!(error <= worst.error)) worst = {error, name};
    };
    look("images", got.images, want.images);
    for (const auto& [name, value] : want.params) look(name, got.params.at(name), value);
    return worst;
}

bool equal(const Gradients& a, const Gradients& b)
{
    if (!same_bits(a.logits, b.logits) || !same_bits(a.images, b.images)) return false;
    for (const auto& [name, value] : a.params)
        if (!same_bits(value, b.params.at(name))) return false;
    return true;
}

void report(const Worst& worst, double most, const std::string& what)
{
    check_report(worst.error <= most, __FILE__, __LINE__,
                 (what + ": " + worst.name + " differs by " + std::to_string(worst.error)).c_str());
}

// ---- golden files --------------------------------------------------------------------------------------------------
void test_golden(const std::string& folder)
{
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (entry.path().extension() != ".safetensors") continue;
        files++;
        const SafetensorsFile file = SafetensorsFile::open(entry.path().string());
        const Config c = golden::config_of(file.metadata());
        const NetworkWeights weights(cuda_context(), c, [&](const std::string& name, const Shape&) {
            return golden::values<float>(*file.find("weights." + name));
        });
        const Tensor& input = *file.find("input");
        const Floats images = golden::values<float>(input), probe = golden::values<float>(*file.find("probe"));
        for (Memory memory : {Memory::lean, Memory::fast}) {
            if (brief && (memory == Memory::fast) == (files % 2 == 0)) continue;
            const Gradients got =
                step(cuda_context(), c, weights.params, DType::f32, images, input.size(0), probe, {.memory = memory});
            CHECK_CLOSE(golden::relative(got.logits, *file.find("logits")), 0, 1e-5);
            double worst = golden::relative(got.images, *file.find("input_grad"));
            std::string where = "input";
            for (const auto& [name, value] : got.params) {
                const double error = golden::relative(value, *file.find("grad." + name));
                if (!(error <= worst)) worst = error, where = name;
            }
            CHECK_CLOSE(worst, 0, 1e-4);
            std::printf("%-60s %s worst gradient %.1e (%s)\n", entry.path().c_str(),
                        memory == Memory::lean ? "lean" : "fast", worst, where.c_str());
        }
    }
    CHECK(files == 18);
}

// ---- every design --------------------------------------------------------------------------------------------------
// bf16 and f16 round every activation and its gradient.
double most(DType dtype) { return dtype == DType::f32 ? 1e-4 : dtype == DType::f16 ? 2e-2 : 0.12; }

void test_designs()
{
    int index = 0;
    for (const Config& c : designs()) {
        auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
        const NetworkWeights here(cpu_context(), c, values, DType::f64), there(cuda_context(), c, values);
        const std::int64_t batch = 3;
        const Floats images = normal(5, DType::bf16, c.images_shape(batch).numel());
        const Floats dlogits = normal(8, DType::bf16, c.logits_shape(batch).numel());
        const DType only = device_types[static_cast<std::size_t>(index / 2) % std::size(device_types)];
        const Memory memory = index++ % 2 ? Memory::fast : Memory::lean;
        for (bool tokens : {false, true}) {
            if (brief && !tokens) continue;
            const Gradients want = step(cpu_context(), c, here.params, DType::f64, images, batch, dlogits,
                                        {.memory = memory, .tokens = tokens});
            for (DType dtype : device_types) {
                if (brief ? dtype != only : !tokens && dtype != DType::f32) continue;
                const Request request{.memory = memory, .tokens = tokens};
                const Gradients got = step(cuda_context(), c, there.params, dtype, images, batch, dlogits, request);
                // in 16 bits other tokens may be the largest
                if (dtype == DType::f32 || c.class_token != ClassToken::none || c.pool != Pool::max)
                    report(worst(got, want), most(dtype),
                           text("design", index, tokens, static_cast<std::int64_t>(dtype)));
                if (!tokens || dtype != DType::bf16 || brief) continue;
                CHECK(equal(got, step(cuda_context(), c, there.params, dtype, images, batch, dlogits, request)));
            }
        }
    }
}

// Drop path, dropout, a drawn class token, reversed sequences; and a context that cuts the batch into groups.
void test_draws_and_groups()
{
    for (Directions directions : {Directions::sequence, Directions::block, Directions::ssm_conv}) {
        Config c = designs().back();
        c.img_height = c.img_width = 20;
        c.embed_dim = 24;
        c.depth = 4;
        c.directions = directions;
        c.class_token = ClassToken::random;
        c.layer_scale = 0.5;
        c.validate();
        auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
        const std::int64_t batch = 5;
        const Floats images = normal(5, DType::bf16, c.images_shape(batch).numel());
        const Floats dlogits = normal(8, DType::bf16, batch * c.num_classes);
        auto run = [&](Context& ctx, DType dtype, std::int64_t tile) {
            const NetworkWeights weights(ctx, c, values, wide(dtype));
            Side side(ctx, dtype);
            Request request;
            request.tile = tile;
            Floats keep = Random(9).uniform(c.depth * batch, 0, 1);
            for (float& x : keep) x = x < 0.7f ? 1 / 0.7f : 0;
            Floats mask = Random(10).uniform(batch * c.tokens() * c.embed_dim, 0, 1);
            for (float& x : mask) x = x < 0.9f ? 1 / 0.9f : 0;
            request.draws.drop_path = side.parameter({c.depth, batch}, keep);
            request.draws.dropout = side.parameter({batch, c.tokens(), c.embed_dim}, mask);
            request.draws.flip = directions == Directions::sequence;
            request.draws.class_position = 3;
            return step(ctx, c, weights.params, dtype, images, batch, dlogits, request);
        };
        const Gradients want = run(cpu_context(), DType::f64, 0), got = run(cuda_context(), DType::f32, 0);
        const Gradients cut = run(cuda_context(), DType::f32, 64);
        report(worst(got, want), 1e-4, text("draws", static_cast<std::int64_t>(directions)));
        report(worst(cut, want), 1e-4, text("groups", static_cast<std::int64_t>(directions)));
        CHECK(same_bits(cut.logits, got.logits));
        CHECK(!equal(cut, got));  // gradients are summed group by group: the cut was made
        CHECK(equal(cut, run(cuda_context(), DType::f32, 64)));
    }
}

// Gradients that nobody wants are not computed, and the others keep their bits.
void test_frozen()
{
    const Config c = designs()[4];
    auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
    const NetworkWeights weights(cuda_context(), c, values);
    const Floats images = normal(5, DType::f32, 2 * c.in_chans * c.img_height * c.img_width);
    const Floats dlogits = normal(8, DType::f32, 2 * c.num_classes);
    const Gradients all = step(cuda_context(), c, weights.params, DType::f32, images, 2, dlogits);
    Side side = Side::cuda(DType::f32);
    const Tensor x = side.activation({2, c.in_chans, c.img_height, c.img_width}, images);
    vimcore::Outputs out, dout;
    out.logits = side.result({2, c.num_classes});
    dout.logits = side.activation({2, c.num_classes}, dlogits);
    Saved saved;
    forward(side.ctx, c, weights.params, x, out, &saved);
    Params some;
    NetworkWeights gradients = NetworkWeights::zeros(side.ctx, c);
    for_each_param(c, some, [&](const std::string& name, Tensor& tensor, const Shape&) {
        if (name.find("A_log") != std::string::npos || name == "head.bias") tensor = gradients.tensors.at(name);
    });
    backward(side.ctx, c, weights.params, x, saved, dout, some, {});
    for (const auto& [name, value] : gradients.values()) {
        const bool wanted = name.find("A_log") != std::string::npos || name == "head.bias";
        CHECK(same_bits(value, wanted ? all.params.at(name) : Floats(value.size())));
    }
}

// ---- training ------------------------------------------------------------------------------------------------------
// Softmax and cross-entropy of logits (batch, classes): the loss, and its gradient times `scale`.
double cross_entropy(const Floats& logits, std::int64_t batch, Floats& dlogits, float scale)
{
    const std::size_t classes = logits.size() / static_cast<std::size_t>(batch);
    double loss = 0;
    dlogits.resize(logits.size());
    for (std::size_t b = 0; b < static_cast<std::size_t>(batch); b++) {
        double total = 0;
        for (std::size_t k = 0; k < classes; k++) total += std::exp(static_cast<double>(logits[b * classes + k]));
        for (std::size_t k = 0; k < classes; k++) {
            const double p = std::exp(static_cast<double>(logits[b * classes + k])) / total, hit = k == b % classes;
            if (hit > 0) loss -= std::log(p) / static_cast<double>(batch);
            dlogits[b * classes + k] = scale * static_cast<float>((p - hit) / static_cast<double>(batch));
        }
    }
    return loss;
}

// Steps of plain gradient descent on one batch: the loss before each.
std::vector<double> curve(Context& ctx, const Config& c, DType dtype, int steps, float rate, std::int64_t batch,
                          const std::function<Floats(const std::string&, const Shape&)>& values, float scale = 1)
{
    NetworkWeights weights(ctx, c, values, wide(dtype));
    const Floats images = normal(11, DType::bf16, batch * c.in_chans * c.img_height * c.img_width);
    std::vector<double> losses;
    Saved saved;
    Side side(ctx, dtype);
    const Tensor x = side.activation({batch, c.in_chans, c.img_height, c.img_width}, images);
    vimcore::Outputs out, dout;
    out.logits = side.result({batch, c.num_classes});
    dout.logits = side.result(out.logits.shape);
    NetworkWeights gradients = NetworkWeights::zeros(ctx, c, wide(dtype));
    std::size_t allocations = 0;
    for (int i = 0; i < steps; i++) {
        for (const auto& [name, tensor] : gradients.tensors) backend_of(ctx).fill_zero(ctx, tensor);
        forward(ctx, c, weights.params, x, out, &saved);
        Floats dlogits;
        losses.push_back(cross_entropy(side.values(out.logits), batch, dlogits, scale));
        assign(ctx, dout.logits, rounded(dtype == DType::f64 ? DType::f32 : dtype, dlogits));
        backward(ctx, c, weights.params, x, saved, dout, gradients.params, {});
        for (const auto& [name, tensor] : weights.tensors) {
            Floats w = values_of(ctx, tensor);
            const Floats g = values_of(ctx, gradients.tensors.at(name));
            for (std::size_t j = 0; j < w.size(); j++) w[j] -= rate / scale * g[j];
            assign(ctx, tensor, w);
        }
        weights.params.changed();
        if (i == 1) allocations = arena_of(ctx).allocations();
    }
    CHECK(arena_of(ctx).allocations() == allocations);  // not after the first step
    return losses;
}

void test_training()
{
    Config c = designs()[4];
    c.embed_dim = 32;
    auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
    const std::vector<double> want = curve(cpu_context(), c, DType::f64, 8, 0.05f, 4, values);
    CHECK(want.back() < 0.5 * want.front());
    for (DType dtype : device_types) {
        const std::vector<double> got =
            curve(cuda_context(), c, dtype, 8, 0.05f, 4, values, dtype == DType::f16 ? 1024.0f : 1.0f);
        double apart = 0;
        for (std::size_t i = 0; i < want.size(); i++) apart = std::max(apart, std::abs(got[i] - want[i]));
        std::printf("training %s: loss %.4f to %.4f, at most %.1e from float64\n", name_of(dtype), got.front(),
                    got.back(), apart);
        CHECK_CLOSE(apart, 0, dtype == DType::f32 ? 1e-4 : dtype == DType::f16 ? 2e-2 : 0.1);
    }
}

// ---- what strains number formats -----------------------------------------------------------------------------------
// Long sequences whose states hardly decay, time steps of which some are large, decays as after training, many blocks.
void test_stress()
{
    struct Case {
        const char* name;
        std::int64_t side, depth, dim;
        float dt, spread, decay;  // bias of the time step and its spread, offset of A_log
        double most[2];           // float16, bfloat16: against float64
    };
    const Case cases[] = {{"long, slow decay", 120, 1, 8, -5.0f, 0.5f, -3.0f, {1e-2, 6e-2}},
                          {"large time steps", 40, 2, 16, 3.0f, 4.0f, 0.0f, {2e-2, 0.12}},
                          {"fast decay", 40, 2, 16, 0.0f, 2.0f, 3.0f, {2e-2, 0.12}},
                          {"24 blocks", 12, 24, 16, -2.0f, 1.0f, 0.0f, {4e-2, 0.25}}};
    for (const Case& k : cases) {
        Config c;
        c.img_height = c.img_width = k.side;
        c.patch_size = c.stride = 4;
        c.embed_dim = k.dim;
        c.depth = k.depth;
        c.num_classes = 3;
        c.validate();
        auto values = [&](const std::string& name, const Shape& shape) {
            Floats v = random_weight(c, name, shape);
            for (float& x : v) {
                if (name.find("dt_proj") != std::string::npos && name.find("bias") != std::string::npos)
                    x = k.dt + 5 * k.spread * x;
                if (name.find("A_log") != std::string::npos || name.find("A_b_log") != std::string::npos) x += k.decay;
            }
            return v;
        };
        const NetworkWeights here(cpu_context(), c, values, DType::f64), there(cuda_context(), c, values);
        const Floats images = normal(5, DType::bf16, c.in_chans * c.img_height * c.img_width);
        const Floats dlogits = normal(8, DType::bf16, c.num_classes);
        const Gradients want = step(cpu_context(), c, here.params, DType::f64, images, 1, dlogits);
        for (DType dtype : device_types) {
            const Gradients got = step(cuda_context(), c, there.params, dtype, images, 1, dlogits);
            const Worst error = worst(got, want);
            std::printf("stress %-18s %-4s %lld tokens: worst gradient %.1e (%s)\n", k.name, name_of(dtype),
                        static_cast<long long>(c.tokens()), error.error, error.name.c_str());
            report(error, dtype == DType::f32 ? 2e-4 : k.most[dtype == DType::bf16], k.name);
        }
    }
}

// ---- recorded steps ------------------------------------------------------------------------------------------------
// A recorded step reads the weights that are there when it is replayed, also where it computes in 16 bits.
void test_recorded()
{
    Config c = designs()[14];  // with tables, which stay
    auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
    const std::int64_t batch = 2;
    for (DType dtype : {DType::bf16, DType::f32}) {
        Context ctx(Device::cuda());
        const std::shared_ptr<void> stream = backend_of(ctx).make_stream(0);
        ctx.set_stream(stream.get());
        NetworkWeights weights(ctx, c, values), gradients = NetworkWeights::zeros(ctx, c);
        Side side(ctx, dtype);
        const Tensor x = side.activation({batch, c.in_chans, c.img_height, c.img_width},
                                         normal(5, dtype, batch * c.in_chans * c.img_height * c.img_width));
        vimcore::Outputs out, dout;
        out.logits = side.result(c.logits_shape(batch));
        dout.logits = side.activation(out.logits.shape, normal(8, dtype, out.logits.numel()));
        Saved saved;
        auto whole_step = [&] {
            for (const auto& [name, tensor] : gradients.tensors) backend_of(ctx).fill_zero(ctx, tensor);
            forward(ctx, c, weights.params, x, out, &saved);
            backward(ctx, c, weights.params, x, saved, dout, gradients.params, {});
        };
        auto change = [&](float factor) {
            for (const auto& [name, tensor] : weights.tensors) {
                Floats w = values_of(ctx, tensor);
                for (float& value : w) value *= factor;
                assign(ctx, tensor, w);
            }
        };
        for (int i = 0; i < 2; i++) whole_step();
        change(1.1f);
        weights.params.changed();  // as after an optimiser's step, before the next one is recorded
        ctx.hold_memory(true);
        const std::shared_ptr<void> graph =
            backend_of(ctx).record(ctx, [](void* f) { (*static_cast<decltype(whole_step)*>(f))(); }, &whole_step);
        for (int i = 0; i < 3; i++) {
            backend_of(ctx).replay(ctx, graph.get());
            const auto replayed = gradients.values();
            const Floats logits = side.values(out.logits);
            weights.params.changed();
            whole_step();
            CHECK(same_bits(side.values(out.logits), logits));
            for (const auto& [name, value] : gradients.values()) CHECK(same_bits(value, replayed.at(name)));
            change(0.9f);  // in place: only the replay knows
        }
    }
}

}  // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    if (argc != 2) return check_failures();
    test_golden(argv[1]);
    test_designs();
    test_draws_and_groups();
    test_frozen();
    test_training();
    test_stress();
    test_recorded();
    return check_failures();
}
