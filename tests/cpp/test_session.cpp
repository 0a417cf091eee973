// SPDX-License-Identifier: Apache-2.0
// Model and Session: nothing is allocated once every batch size has been run, threads share a model, answers do not
// depend on who asks. Linked with --wrap, so that every allocation of library and test is counted.
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "vimcore/vimcore.h"

namespace {
std::atomic<long> allocations{0};
}

extern "C" {
void* __real_malloc(std::size_t bytes);
void* __real_calloc(std::size_t count, std::size_t bytes);
void* __real_realloc(void* memory, std::size_t bytes);
void* __real_aligned_alloc(std::size_t alignment, std::size_t bytes);
int __real_posix_memalign(void** memory, std::size_t alignment, std::size_t bytes);

void* __wrap_malloc(std::size_t bytes) { return allocations++, __real_malloc(bytes); }
void* __wrap_calloc(std::size_t count, std::size_t bytes) { return allocations++, __real_calloc(count, bytes); }
void* __wrap_realloc(void* memory, std::size_t bytes) { return allocations++, __real_realloc(memory, bytes); }
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t bytes)
{
    return allocations++, __real_aligned_alloc(alignment, bytes);
}
int __wrap_posix_memalign(void** memory, std::size_t alignment, std::size_t bytes)
{
    return allocations++, __real_posix_memalign(memory, alignment, bytes);
}
}

// The standard library's own calls come here too. Not inlined: the compiler would take malloc and delete for a
// mismatched pair.
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept
{
    return std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void* operator new(std::size_t bytes)
{
    if (void* memory = operator new(bytes, std::nothrow)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

using namespace vimcore;

namespace {

Config small()
{
    Config c;
    c.img_height = 24;
    c.img_width = 32;
    c.patch_size = c.stride = 8;
    c.embed_dim = 24;
    c.depth = 2;
    c.num_classes = 5;
    return c;
}

struct File {
    std::string path;
    explicit File(const Config& config)
        : path((std::filesystem::temp_directory_path() / ("vimcore-session-" + std::to_string(::getpid()))).string())
    {
        Weights weights(config);
        initialize(config, weights.params, 1);
        save_model(path, config, weights.params);
    }
    ~File() { std::filesystem::remove(path); }
};

std::vector<float> make_images(const Config& c, std::int64_t batch)
{
    std::vector<float> images(static_cast<std::size_t>(batch * c.in_chans * c.img_height * c.img_width));
    for (std::size_t i = 0; i < images.size(); i++) images[i] = static_cast<float>(i * 7919 % 1000) / 500.0f - 1.0f;
    return images;
}

void test_no_allocation(const std::shared_ptr<const Model>& model, DType dtype)
{
    const Config& c = model->config();
    const std::int64_t batch = 7, sizes[] = {7, 1, 3, 4, 7, 2};  // more than max_batch, and less
    const std::vector<float> images = make_images(c, batch);
    std::vector<float> logits(static_cast<std::size_t>(c.logits_shape(batch).numel())),
        tokens(static_cast<std::size_t>(batch * c.tokens() * c.embed_dim));
    for (const int threads : {1, 2, 4}) {
        const long before = allocations;
        Session session(model, {.max_batch = 4, .threads = threads, .dtype = dtype});
        const auto run_all = [&] {
            for (const std::int64_t size : sizes) {
                session.run(images.data(), size, logits.data());
                session.features(images.data(), size, tokens.data());
            }
        };
        run_all();
        CHECK(allocations > before);  // the counters count
        run_all();
        const long warm = allocations;
        for (int round = 0; round < 5; round++) run_all();
        CHECK(allocations == warm);
    }
}

void test_shared_model(const std::shared_ptr<const Model>& model, DType dtype)
{
    const std::int64_t batch = 5;
    const std::vector<float> images = make_images(model->config(), batch);
    const std::vector<float> expected =
        Session(model, {.max_batch = 8, .threads = 1, .dtype = dtype}).run(images.data(), batch);
    std::vector<std::vector<float>> answers(8);
    std::vector<std::thread> callers;
    for (std::size_t i = 0; i < answers.size(); i++)
        callers.emplace_back([&, i] {
            Session session(model, {.max_batch = 1 + static_cast<std::int64_t>(i) % 4,
                                    .threads = 1 + static_cast<int>(i) % 3,
                                    .dtype = dtype});
            for (int round = 0; round < 3; round++) answers[i] = session.run(images.data(), batch);
        });
    for (std::thread& caller : callers) caller.join();
    for (const std::vector<float>& answer : answers) CHECK(answer == expected);
}

void test_types(const std::shared_ptr<const Model>& model)
{
    if (bf16_unit().empty()) {
        CHECK_THROWS(Session(model, {.dtype = DType::bf16}), Error);
        setenv("VIMCORE_ISA", build_info().isa.c_str(), 1);  // asks for the emulation
    }
    CHECK(!bf16_unit().empty());
    test_no_allocation(model, DType::bf16);
    test_shared_model(model, DType::bf16);
    const std::vector<float> images = make_images(model->config(), 3);
    const std::vector<float> wide = Session(model).run(images.data(), 3);
    const std::vector<float> narrow = Session(model, {.dtype = DType::bf16}).run(images.data(), 3);
    double error = 0, size = 0;
    for (std::size_t i = 0; i < wide.size(); i++) {
        error += std::pow(wide[i] - narrow[i], 2);
        size += std::pow(wide[i], 2);
    }
    CHECK(error > 0);
    CHECK(error < 1e-4 * size);
    for (const DType dtype : {DType::f16, DType::f64, DType::i32})
        CHECK_THROWS(Session(model, {.dtype = dtype}), std::invalid_argument);
}

std::string message_of(const std::function<void()>& call)
{
    try {
        call();
    } catch (const std::exception& error) {
        return error.what();
    }
    return "no error";
}

// A model for bf16 alone: the same bits as one for all types, in less memory, and refused where it does not serve.
void test_only(const Config& config)
{
    const File file(config);
    const ModelOptions narrow{.img_height = 40, .img_width = 32, .only = DType::bf16};
    const auto model = Model::load(file.path, narrow);
    const auto wide = Model::load(file.path, narrow.device, narrow.img_height, narrow.img_width);
    CHECK(model->only() == DType::bf16 && !wide->only());
    const std::vector<float> images = make_images(model->config(), 5);
    Session ours(model, {.max_batch = 3, .dtype = DType::bf16}), theirs(wide, {.dtype = DType::bf16});
    CHECK(ours.run(images.data(), 5) == theirs.run(images.data(), 5));
    std::vector<float> tokens(static_cast<std::size_t>(model->config().tokens_shape(5).numel())), same = tokens;
    ours.features(images.data(), 5, tokens.data());
    theirs.features(images.data(), 5, same.data());
    CHECK(tokens == same);
    if (!config.layer_scale) test_no_allocation(model, DType::bf16);  // which packs a product in every call
    test_shared_model(model, DType::bf16);

    CHECK(message_of([&] { Session{model}; }) ==
          "[session] dtype: expected bf16, for which alone the model was loaded, got f32");
    for (const std::optional<DType> type : {std::optional<DType>{}, std::optional<DType>{DType::f32}})
        CHECK(message_of([&] {
                  save_model(file.path, model->config(), model->params(), {}, {}, type);
              }).find("ModelOptions::only") != std::string::npos);
    Context ctx(Device::cpu(), 1);
    Outputs out;
    const Tensor pixels{const_cast<float*>(images.data()), model->config().images_shape(1), DType::f32, {}};
    out.tokens = {tokens.data(), model->config().tokens_shape(1), DType::f32, {}};
    CHECK(message_of([&] { forward(ctx, model->config(), model->params(), pixels, out); }).find("expected bf16") !=
          std::string::npos);
    Saved saved;
    std::vector<std::uint16_t> narrow_tokens(tokens.size());
    out.tokens = {narrow_tokens.data(), out.tokens.shape, DType::bf16, {}};
    forward(ctx, model->config(), model->params(), pixels, out, &saved);
    Weights gradients(model->config());
    CHECK(message_of([&] {
              backward(ctx, model->config(), model->params(), pixels, saved, out, gradients.params, {});
          }).find("bf16_panels") != std::string::npos);
    CHECK_THROWS(Model::load(file.path, {.only = DType::f16}), std::invalid_argument);
}

void test_only()
{
    if (bf16_unit().empty()) return;  // after test_types: emulated at the least
    CHECK(weight_bytes(Config{}, DType::bf16) < 6 * weight_bytes(Config{}) / 10);
    CHECK(weight_bytes(Config{}, DType::f32) == weight_bytes(Config{}));
    test_only(small());
    Config other = small();
    other.layer_scale = 0.1;
    other.class_token = ClassToken::registers, other.registers = 4, other.neck_reduction = 2;
    test_only(other);
    other = small();
    other.directions = Directions::ssm;
    other.embed_dim = 35;
    other.num_classes = 0;
    test_only(other);
}

void test_arguments(const std::shared_ptr<const Model>& model)
{
    CHECK_THROWS(Session(nullptr), std::invalid_argument);
    CHECK_THROWS(Session(model, {.max_batch = 0}), std::invalid_argument);
    CHECK_THROWS(Session(model, {.threads = -1}), std::invalid_argument);
    CHECK_THROWS(Session(model, {.threads = 1025}), std::invalid_argument);
    Session session(model);
    CHECK_THROWS(session.run(nullptr, -1), std::invalid_argument);
    CHECK(session.run(nullptr, 0).empty());
    CHECK(session.outputs() == 5);
}

}  // namespace

int main()
{
    const File file(small());
    std::shared_ptr<const Model> model = Model::load(file.path);
    test_no_allocation(model, DType::f32);
    test_shared_model(model, DType::f32);
    test_types(model);
    test_only();
    test_arguments(model);
    Session last(model);
    model.reset();  // the session keeps its model
    CHECK(last.run(make_images(small(), 1).data(), 1).size() == 5);
    return check_failures();
}
