// SPDX-License-Identifier: Apache-2.0
// The C interface: the same numbers as the C++ one, and an error with a text for whatever is wrong.
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "vimcore/c_api.h"
#include "vimcore/vimcore.h"

namespace {
thread_local bool out_of_memory = false;
}

// Not inlined: the compiler would take malloc and delete for a mismatched pair.
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept
{
    return out_of_memory ? nullptr : std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void* operator new(std::size_t bytes)
{
    if (void* memory = operator new(bytes, std::nothrow)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

struct File {
    std::string path;
    explicit File(const vimcore::Config& config, const std::vector<std::string>& labels = {})
    {
        static int made = 0;
        path = (std::filesystem::temp_directory_path() /
                ("vimcore-c-api-" + std::to_string(::getpid()) + "-" + std::to_string(made++)))
                   .string();
        vimcore::Weights weights(config);
        vimcore::initialize(config, weights.params, 1);
        vimcore::save_model(path, config, weights.params, labels);
    }
    ~File() { std::filesystem::remove(path); }
};

vimcore::Config small()
{
    vimcore::Config c;
    c.img_height = 24;
    c.img_width = 32;
    c.patch_size = c.stride = 8;
    c.embed_dim = 24;
    c.depth = 2;
    c.num_classes = 3;
    return c;
}

std::string ppm()  // 40 x 30
{
    std::string file = "P6\n40 30\n255\n";
    for (int i = 0; i < 40 * 30 * 3; i++) file += static_cast<char>(i * 37 % 251);
    return file;
}

bool says(vimcore_status status, vimcore_status expected, const char* text)
{
    if (status == expected && std::strstr(vimcore_last_error(), text)) return true;
    std::printf("status %d, expected %d; '%s', expected '%s'\n", status, expected, vimcore_last_error(), text);
    return false;
}

void test_numbers()
{
    const File file(small(), {"cat", "dog", "\xc3\xa9l\xc3\xa9phant"});
    vimcore_model* model = nullptr;
    vimcore_session* session = nullptr;
    vimcore_model_info info{};
    CHECK(vimcore_model_load(file.path.c_str(), nullptr, 0, 0, &model) == VIMCORE_OK);
    CHECK(vimcore_model_get_info(model, &info) == VIMCORE_OK);
    CHECK(info.channels == 3 && info.height == 24 && info.width == 32 && info.outputs == 3 && info.classes == 3);
    CHECK(info.tokens == 13 && info.embed_dim == 24);
    const char* text = nullptr;
    CHECK(vimcore_model_label(model, 2, &text) == VIMCORE_OK && std::strcmp(text, "\xc3\xa9l\xc3\xa9phant") == 0);
    CHECK(vimcore_model_metadata(model, "vimcore.config", &text) == VIMCORE_OK && std::strstr(text, "\"depth\""));
    CHECK(vimcore_model_metadata(model, "nothing", &text) == VIMCORE_OK && text == nullptr);

    const std::string picture = ppm();
    std::vector<float> image(3 * 24 * 32), same(image.size()), logits(2 * 3), tokens(2 * 13 * 24);
    CHECK(vimcore_decode_image(model, picture.data(), picture.size(), image.data(), image.size()) == VIMCORE_OK);
    const std::string path = file.path + ".ppm";
    std::FILE* out = std::fopen(path.c_str(), "wb");
    CHECK(out && std::fwrite(picture.data(), 1, picture.size(), out) == picture.size() && std::fclose(out) == 0);
    CHECK(vimcore_load_image(model, path.c_str(), same.data(), same.size()) == VIMCORE_OK);
    std::filesystem::remove(path);
    CHECK(image == same);

    const auto loaded = vimcore::Model::load(file.path);
    vimcore::Session direct(loaded);
    vimcore::load_image(picture.data(), picture.size(), "picture",
                        *vimcore::preprocess_of(loaded->config(), loaded->metadata()), same.data());
    CHECK(image == same);
    image.insert(image.end(), same.rbegin(), same.rend());
    std::vector<float> expected_tokens(tokens.size());
    direct.features(image.data(), 2, expected_tokens.data());
    CHECK(vimcore_session_create(model, 2, 1, "f32", &session) == VIMCORE_OK);
    CHECK(vimcore_session_run(session, image.data(), 2, logits.data(), logits.size()) == VIMCORE_OK);
    CHECK(logits == direct.run(image.data(), 2));
    CHECK(vimcore_session_features(session, image.data(), 2, tokens.data(), tokens.size()) == VIMCORE_OK);
    CHECK(tokens == expected_tokens);
    CHECK(vimcore_session_run(session, nullptr, 0, nullptr, 0) == VIMCORE_OK);

    vimcore_model_destroy(model);  // the session goes on; the handle does not
    CHECK(vimcore_session_run(session, image.data(), 2, logits.data(), logits.size()) == VIMCORE_OK);
    CHECK(says(vimcore_model_get_info(model, &info), VIMCORE_INVALID_ARGUMENT, "destroyed"));
    vimcore_session_destroy(session);
    CHECK(says(vimcore_session_run(session, image.data(), 2, logits.data(), 6), VIMCORE_INVALID_ARGUMENT, "destroyed"));
    vimcore_session_destroy(session);  // harmless
    vimcore_model_destroy(model);
}

void test_other_networks()
{
    vimcore::Config c = small();
    c.class_token = vimcore::ClassToken::none;
    c.pool = vimcore::Pool::all;
    c.in_chans = 5;
    const File file(c);
    vimcore_model* model = nullptr;
    vimcore_model_info info{};
    const char* label = "untouched";
    float value = 0;
    CHECK(vimcore_model_load_for(file.path.c_str(), "cpu", 32, 40, nullptr, &model) == VIMCORE_OK);
    CHECK(vimcore_model_get_info(model, &info) == VIMCORE_OK);
    CHECK(info.height == 32 && info.width == 40 && info.tokens == 20 && info.outputs == 60);
    CHECK(vimcore_model_label(model, 0, &label) == VIMCORE_OK && label == nullptr);
    CHECK(says(vimcore_load_image(model, "x.png", &value, 1), VIMCORE_INVALID_ARGUMENT, "5 channels"));
    vimcore_model_destroy(model);

    c = small();
    c.num_classes = 0;
    const File headless(c);
    CHECK(vimcore_model_load(headless.path.c_str(), "cpu", 0, 0, &model) == VIMCORE_OK);
    CHECK(vimcore_model_get_info(model, &info) == VIMCORE_OK && info.classes == 0 && info.outputs == 24);
    CHECK(vimcore_model_label(model, 0, &label) == VIMCORE_INVALID_ARGUMENT);
    vimcore_model_destroy(model);

    c = small();
    c.frames = 2;
    const File clips(c);
    CHECK(vimcore_model_load(clips.path.c_str(), "cpu", 0, 0, &model) == VIMCORE_OK);
    CHECK(vimcore_model_get_info(model, &info) == VIMCORE_OK && info.frames == 2 && info.tokens == 25);
    CHECK(says(vimcore_load_image(model, "x.png", &value, 1), VIMCORE_INVALID_ARGUMENT, "clips of 2 frames"));
    vimcore_session* session = nullptr;
    CHECK(vimcore_session_create(model, 1, 1, "f32", &session) == VIMCORE_OK);
    std::vector<float> clip(static_cast<std::size_t>(c.images_shape(1).numel())), logits(3);
    for (std::size_t i = 0; i < clip.size(); i++) clip[i] = static_cast<float>(i % 7) - 3;
    CHECK(vimcore_session_run(session, clip.data(), 1, logits.data(), 3) == VIMCORE_OK);
    vimcore::Session own(vimcore::Model::load(clips.path));
    CHECK(own.run(clip.data(), 1) == logits);
    vimcore_session_destroy(session);
    vimcore_model_destroy(model);
}

void test_errors()
{
    const File file(small());
    vimcore_model* model = nullptr;
    vimcore_session* session = nullptr;
    vimcore_model_info info{};
    const char* text = nullptr;
    std::vector<float> image(3 * 24 * 32), out(13 * 24);
    const char* path = file.path.c_str();
    constexpr auto bad = VIMCORE_INVALID_ARGUMENT;
    CHECK(says(vimcore_model_load(nullptr, "cpu", 0, 0, &model), bad, "path"));
    CHECK(says(vimcore_model_load(path, "cpu", 0, 0, nullptr), bad, "NULL"));
    CHECK(says(vimcore_model_load(path, "cpu", -1, 0, &model), bad, "img_height"));
    CHECK(says(vimcore_model_load_for(path, "cpu", 0, 0, "bf15", &model), bad, "dtype"));
    CHECK(says(vimcore_model_load_for(path, "cpu", 0, 0, "f16", &model), bad, "dtype"));
    CHECK(says(vimcore_model_load(path, "cpu", 4, 4, &model), bad, "img_size"));
    for (const char* device : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "CPU"})
        CHECK(says(vimcore_model_load(path, device, 0, 0, &model), bad, "device"));
    CHECK(says(vimcore_model_load("/no/such/file", "cpu", 0, 0, &model), VIMCORE_FAILED, "/no/such/file"));
    if (!vimcore::build_info().cuda)
        CHECK(says(vimcore_model_load(path, "cuda:0", 0, 0, &model), VIMCORE_FAILED, "CUDA"));
    CHECK(model == nullptr);
    CHECK(vimcore_model_load(path, "cpu", 0, 0, &model) == VIMCORE_OK);

    CHECK(says(vimcore_model_get_info(nullptr, &info), bad, "NULL"));
    CHECK(says(vimcore_model_get_info(model, nullptr), bad, "info"));
    CHECK(says(vimcore_model_label(model, 3, &text), bad, "index"));
    CHECK(says(vimcore_model_label(model, -1, &text), bad, "index"));
    CHECK(says(vimcore_model_label(model, 0, nullptr), bad, "label"));
    CHECK(says(vimcore_model_metadata(model, nullptr, &text), bad, "key"));
    CHECK(says(vimcore_model_metadata(model, "a", nullptr), bad, "value"));
    CHECK(says(vimcore_session_create(nullptr, 0, 1, nullptr, &session), bad, "NULL"));
    CHECK(says(vimcore_session_create(model, 0, 1, nullptr, nullptr), bad, "session"));
    CHECK(says(vimcore_session_create(model, -1, 1, nullptr, &session), bad, "threads"));
    CHECK(says(vimcore_session_create(model, 0, 0, nullptr, &session), bad, "max_batch"));
    CHECK(says(vimcore_session_create(model, 0, 1, "f64", &session), bad, "dtype"));
    CHECK(says(vimcore_session_create(model, 0, 1, "f16", &session), bad, "dtype: expected f32 or bf16 on cpu"));
    if (vimcore::bf16_unit().empty())
        CHECK(says(vimcore_session_create(model, 0, 1, "bf16", &session), VIMCORE_FAILED, "VIMCORE_ISA="));
    CHECK(session == nullptr);
    if (!vimcore::bf16_unit().empty()) {
        std::vector<float> wide(out.size()), narrow(out.size());
        for (const char* dtype : {"f32", "bf16"}) {
            CHECK(vimcore_session_create(model, 1, 1, dtype, &session) == VIMCORE_OK);
            float* logits = dtype[0] == 'f' ? wide.data() : narrow.data();
            CHECK(vimcore_session_run(session, image.data(), 1, logits, 3) == VIMCORE_OK);
            vimcore_session_destroy(session);
        }
        vimcore_model* only = nullptr;
        CHECK(vimcore_model_load_for(path, "cpu", 0, 0, "bf16", &only) == VIMCORE_OK);
        CHECK(says(vimcore_session_create(only, 1, 1, nullptr, &session), bad, "expected bf16, for which alone"));
        CHECK(vimcore_session_create(only, 1, 1, "bf16", &session) == VIMCORE_OK);
        vimcore_model_destroy(only);
        std::vector<float> same(out.size());
        CHECK(vimcore_session_run(session, image.data(), 1, same.data(), 3) == VIMCORE_OK && same == narrow);
        vimcore_session_destroy(session);
        CHECK(wide != narrow);
        for (std::size_t i = 0; i < wide.size(); i++) CHECK_CLOSE(narrow[i], wide[i], 0.05 * std::abs(wide[i]) + 0.01);
        session = nullptr;
    }
    // a model is no session, a session no model
    CHECK(says(vimcore_session_run(reinterpret_cast<vimcore_session*>(model), image.data(), 1, out.data(), 3), bad,
               "not a session"));
    CHECK(vimcore_session_create(model, 1, 1, nullptr, &session) == VIMCORE_OK);
    CHECK(says(vimcore_model_get_info(reinterpret_cast<vimcore_model*>(session), &info), bad, "not a model"));

    CHECK(says(vimcore_session_run(nullptr, image.data(), 1, out.data(), 3), bad, "NULL"));
    CHECK(says(vimcore_session_run(session, nullptr, 1, out.data(), 3), bad, "images"));
    CHECK(says(vimcore_session_run(session, image.data(), 1, nullptr, 3), bad, "logits"));
    CHECK(says(vimcore_session_run(session, image.data(), -1, out.data(), 3), bad, "batch"));
    CHECK(says(vimcore_session_run(session, image.data(), 1, out.data(), 2), bad, "capacity"));
    constexpr auto most = std::numeric_limits<std::int64_t>::max();
    CHECK(says(vimcore_session_run(session, image.data(), most, out.data(), 3), bad, "capacity"));
    CHECK(says(vimcore_session_features(session, image.data(), 2, out.data(), out.size()), bad, "capacity"));
    CHECK(says(vimcore_session_features(session, image.data(), 1, nullptr, out.size()), bad, "tokens"));

    CHECK(says(vimcore_load_image(model, nullptr, image.data(), image.size()), bad, "path"));
    CHECK(says(vimcore_load_image(model, "/no/such.png", nullptr, image.size()), bad, "image"));
    CHECK(says(vimcore_load_image(model, "/no/such.png", image.data(), image.size() - 1), bad, "capacity"));
    CHECK(says(vimcore_load_image(model, "/no/such.png", image.data(), image.size()), VIMCORE_FAILED, "/no/such.png"));
    CHECK(says(vimcore_decode_image(model, nullptr, 0, image.data(), image.size()), bad, "bytes"));
    CHECK(says(vimcore_decode_image(model, "GIF89a", 6, image.data(), image.size()), VIMCORE_FAILED, "decode"));
    const std::string long_name(5000, 'x');  // a report of any length fits
    CHECK(vimcore_load_image(model, long_name.c_str(), image.data(), image.size()) == VIMCORE_FAILED);
    CHECK(std::strlen(vimcore_last_error()) < 2048);

    std::thread([] { CHECK(std::strcmp(vimcore_last_error(), "") == 0); }).join();  // errors belong to a thread
    out_of_memory = true;
    const vimcore_status status = vimcore_model_load(path, "cpu", 0, 0, &model);
    out_of_memory = false;
    CHECK(says(status, VIMCORE_OUT_OF_MEMORY, "memory"));
    for (const std::int64_t images : {std::int64_t{1} << 40, most})  // refused before any memory is taken
        CHECK(says(vimcore_session_create(model, 1, images, nullptr, &session), VIMCORE_OUT_OF_MEMORY, "needs"));
    vimcore_session_destroy(session);
    vimcore_model_destroy(model);
    vimcore_session_destroy(nullptr);
    vimcore_model_destroy(nullptr);
}

// Destroyed handles are refused, also when others have been made in their place, and so are those of another kind.
void test_old_handles()
{
    const File file(small());
    std::vector<vimcore_model*> models(8);
    std::vector<vimcore_session*> sessions(8);
    vimcore_model_info info{};
    for (std::size_t i = 0; i < models.size(); i++) {
        CHECK(vimcore_model_load(file.path.c_str(), "cpu", 0, 0, &models[i]) == VIMCORE_OK);
        CHECK(vimcore_session_create(models[i], 1, 1, nullptr, &sessions[i]) == VIMCORE_OK);
        CHECK(says(vimcore_model_get_info(reinterpret_cast<vimcore_model*>(sessions[i]), &info),
                   VIMCORE_INVALID_ARGUMENT, "not a model"));
        if (i + 1 == models.size()) break;
        vimcore_session_destroy(sessions[i]);
        vimcore_model_destroy(models[i]);
    }
    for (std::size_t i = 0; i + 1 < models.size(); i++) {
        CHECK(says(vimcore_model_get_info(models[i], &info), VIMCORE_INVALID_ARGUMENT, "destroyed"));
        CHECK(says(vimcore_session_run(sessions[i], nullptr, 0, nullptr, 0), VIMCORE_INVALID_ARGUMENT, "destroyed"));
    }
    vimcore_session_destroy(sessions.back());
    vimcore_model_destroy(models.back());
}

// One session asked by several threads answers them one after the other; one that is destroyed meanwhile lives on.
void test_threads()
{
    const File file(small());
    vimcore_model* model = nullptr;
    vimcore_session* session = nullptr;
    CHECK(vimcore_model_load(file.path.c_str(), "cpu", 0, 0, &model) == VIMCORE_OK);
    CHECK(vimcore_session_create(model, 2, 2, nullptr, &session) == VIMCORE_OK);
    const std::vector<float> images(2 * 3 * 24 * 32, 0.5f);
    std::vector<float> expected(6);
    CHECK(vimcore_session_run(session, images.data(), 2, expected.data(), 6) == VIMCORE_OK);
    std::vector<std::thread> callers;
    std::vector<int> wrong(4);
    for (int& count : wrong)
        callers.emplace_back([&] {
            std::vector<float> logits(6);
            for (int i = 0; i < 50; i++) {
                const vimcore_status status = vimcore_session_run(session, images.data(), 2, logits.data(), 6);
                count += !(status == VIMCORE_OK ? logits == expected : status == VIMCORE_INVALID_ARGUMENT);
            }
        });
    std::thread([&] {
        vimcore_session_destroy(session);
        vimcore_model_destroy(model);
    }).join();
    for (std::thread& caller : callers) caller.join();
    for (const int count : wrong) CHECK(count == 0);
}

}  // namespace

int main()
{
    CHECK(std::strcmp(vimcore_version(), VIMCORE_VERSION) == 0);
    CHECK(std::strcmp(vimcore_last_error(), "") == 0);
    test_numbers();
    test_other_networks();
    test_errors();
    test_old_handles();
    test_threads();
    return check_failures();
}
