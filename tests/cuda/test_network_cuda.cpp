// SPDX-License-Identifier: Apache-2.0
// The whole network on the device: the golden files, agreement with the CPU for every design and type, sessions with
// and without recorded graphs, repeatability. Usage: test_network_cuda FOLDER_OF_GOLDEN_FILES
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "../cpp/golden.h"
#include "core/context_internals.h"
#include "network_cuda.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

struct Result {
    Floats logits, tokens, intermediate;
};

// Logits, tokens and the output of the first layer that has one, computed in one call, or logits alone.
Result run(Context& ctx, const Config& c, const Params& params, DType dtype, const Floats& images, std::int64_t batch,
           bool all, Saved* saved = nullptr)
{
    Side side(ctx, dtype);
    const Tensor x = side.activation(c.images_shape(batch), images);
    const Shape sequence{batch, c.tokens(), c.embed_dim};
    vimcore::Outputs out;
    out.logits = side.result(c.logits_shape(batch));
    if (all) {
        out.tokens = side.result(sequence);
        out.layers = {1};
        out.intermediates = {side.result(sequence)};
    }
    forward(ctx, c, params, x, out, saved);
    return {side.values(out.logits), all ? side.values(out.tokens) : Floats{},
            all ? side.values(out.intermediates[0]) : Floats{}};
}

void test_golden(const std::string& folder)
{
    int files = 0;
    Context& ctx = cuda_context();
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (entry.path().extension() != ".safetensors") continue;
        files++;
        const SafetensorsFile file = SafetensorsFile::open(entry.path().string());
        const Config c = golden::config_of(file.metadata());
        const NetworkWeights weights(ctx, c, [&](const std::string& name, const Shape&) {
            return golden::values<float>(*file.find("weights." + name));
        });
        const Tensor &input = *file.find("input"), &logits = *file.find("logits");
        const Floats images = golden::values<float>(input);
        Saved saved;
        const Floats training = run(ctx, c, weights.params, DType::f32, images, input.size(0), false, &saved).logits;
        const Floats inference =
            brief ? training : run(ctx, c, weights.params, DType::f32, images, input.size(0), false).logits;
        const double error = golden::relative(training, logits);
        CHECK_CLOSE(error, 0, 1e-5);
        CHECK_CLOSE(golden::relative(inference, logits), 0, 1e-5);
        std::printf("%-60s logits %.1e\n", entry.path().c_str(), error);
    }
    CHECK(files == 18);
}

void test_designs()
{
    int index = 0;
    for (const Config& c : designs()) {
        const DType only = device_types[static_cast<std::size_t>(index++) % std::size(device_types)];
        auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
        const NetworkWeights here(cpu_context(), c, values), there(cuda_context(), c, values);
        const std::int64_t batch = 3, image = c.images_shape(1).numel();
        const Floats images = Random(5).normal(batch * image, 0.5f);
        const Result want = run(cpu_context(), c, here.params, DType::f32, images, batch, true);
        for (DType dtype : device_types) {
            if (brief && dtype != only) continue;
            auto again = [&](bool all) {
                return run(cuda_context(), c, there.params, dtype, rounded(dtype, images), batch, all);
            };
            const Result got = again(true), twice = brief ? got : again(true);
            // 16-bit types round every activation of two blocks
            const double most = dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 1e-2 : 6e-2;
            CHECK_CLOSE(difference(got.logits, want.logits), 0, most);
            CHECK_CLOSE(difference(got.tokens, want.tokens), 0, most);
            CHECK_CLOSE(difference(got.intermediate, want.intermediate), 0, most);
            CHECK(got.logits == twice.logits && got.tokens == twice.tokens);
            CHECK_CLOSE(difference(again(false).logits, got.logits), 0, dtype == DType::f32 ? 1e-6 : most);
            const Floats last(images.end() - image, images.end());
            const Floats alone = run(cuda_context(), c, there.params, dtype, rounded(dtype, last), 1, false).logits;
            const Floats among(got.logits.end() - static_cast<std::ptrdiff_t>(alone.size()), got.logits.end());
            CHECK_CLOSE(difference(alone, among), 0, dtype == DType::f32 ? 1e-6 : most);
        }
    }
}

// A file of random weights, run by sessions on both devices.
void test_session()
{
    Config c;
    c.img_height = c.img_width = 16;
    c.patch_size = c.stride = 4;
    c.embed_dim = 32;
    c.depth = 3;
    c.num_classes = 7;
    // several runs of this program may share a folder
    const std::string path = "test_network_cuda." + std::to_string(::getpid()) + ".safetensors";
    const NetworkWeights weights(
        cpu_context(), c, [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); });
    std::vector<std::pair<std::string, Tensor>> tensors;
    Params params = weights.params;
    for_each_param(c, params,
                   [&](const std::string& name, Tensor& tensor, const Shape&) { tensors.emplace_back(name, tensor); });
    save_safetensors(path, tensors, {{"vimcore.config", c.to_json()}});
    const std::int64_t batch = 5, image = c.images_shape(1).numel();
    const Floats images = Random(9).normal(batch * image, 0.5f);
    Session cpu(Model::load(path), {.max_batch = 2, .threads = 1});
    const Floats want = cpu.run(images.data(), batch);
    Floats features(static_cast<std::size_t>(batch * c.tokens() * c.embed_dim)), cpu_features = features;
    cpu.features(images.data(), batch, cpu_features.data());
    const auto model = Model::load(path, Device::cuda());
    for (DType dtype : device_types)
        for (bool graph : {false, true}) {
            Session session(model, {.max_batch = 2, .threads = 0, .dtype = dtype, .graph = graph});
            const double most = dtype == DType::f32 ? 1e-5 : 5e-2;
            const Floats first = session.run(images.data(), batch);
            CHECK_CLOSE(difference(first, want), 0, most);
            for (int i = 0; i < 3; i++) {
                CHECK(session.run(images.data(), batch) == first);
                session.features(images.data(), batch, features.data());
                CHECK_CLOSE(difference(features, cpu_features), 0, most);
            }
            Floats other = images;
            for (float& x : other) x = -x;
            CHECK(session.run(other.data(), batch) != first);  // a replay reads the new images
            CHECK(session.run(images.data(), 1) == Floats(first.begin(), first.begin() + c.num_classes) ||
                  dtype != DType::f32);
        }
    CHECK_THROWS(Session(Model::load(path), {.max_batch = 1, .threads = 0, .dtype = DType::f16}),
                 std::invalid_argument);
    std::filesystem::remove(path);
}

void test_no_allocation()
{
    const Config c = designs().front();
    const NetworkWeights weights(
        cuda_context(), c, [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); });
    Context ctx(Device::cuda());
    const Floats images(static_cast<std::size_t>(2 * c.in_chans * c.img_height * c.img_width), 0.25f);
    std::size_t after_two = 0;
    for (int i = 0; i < 5; i++) {
        run(ctx, c, weights.params, DType::bf16, images, 2, false);
        if (i == 1) after_two = arena_of(ctx).allocations();
    }
    CHECK(arena_of(ctx).allocations() == after_two);
}

}  // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    if (argc != 2) return check_failures();
    test_golden(argv[1]);
    test_designs();
    test_session();
    test_no_allocation();
    return check_failures();
}
