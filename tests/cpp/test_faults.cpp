// SPDX-License-Identifier: Apache-2.0
// What goes wrong outside: many threads on one model, files replaced while they are read, full disks, a kill in the
// middle of a save, networks larger than the machine.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "files.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

// What happens to files, in order, where a test asks for it (see CMakeLists.txt).
static std::vector<std::string>* record = nullptr;
extern "C" {
int __real_fsync(int descriptor);
int __real_rename(const char* from, const char* to);
int __wrap_fsync(int descriptor)
{
    if (record)
        record->push_back("flush " +
                          std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(descriptor)).string());
    return __real_fsync(descriptor);
}
int __wrap_rename(const char* from, const char* to)
{
    if (record) record->push_back("rename " + std::string(from) + " " + to);
    return __real_rename(from, to);
}
}

namespace {

Config small()
{
    Config c;
    c.img_height = 24;
    c.img_width = 32;
    c.patch_size = c.stride = 8;
    c.embed_dim = 32;
    c.depth = 2;
    c.num_classes = 5;
    return c;
}

std::vector<float> noise(std::size_t count, unsigned seed)
{
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(rng);
    return values;
}

void save_network(const std::string& path, const Config& config, unsigned seed)
{
    std::vector<std::pair<std::string, Tensor>> tensors;
    std::vector<std::vector<float>> values;
    Params params;
    for_each_param(config, params, [&](const std::string& name, Tensor&, const Shape& shape) {
        values.push_back(noise(static_cast<std::size_t>(shape.numel()), seed++));
        for (float& value : values.back()) value *= 0.2f;
        tensors.emplace_back(name, Tensor{values.back().data(), shape, DType::f32, {}});
    });
    save_safetensors(path, tensors, {{"vimcore.config", config.to_json()}});
}

// ---- threads -------------------------------------------------------------------------------------------------------

// One Model, a Session per thread, all starting on weights that nobody has packed yet.
void test_many_threads_one_model()
{
    const Folder folder;
    const std::string path = folder.file("m.safetensors");
    const Config config = small();
    save_network(path, config, 1);
    constexpr std::int64_t batch = 5;
    const std::vector<float> images = noise(static_cast<std::size_t>(batch * 3 * 24 * 32), 2);
    const std::vector<float> wanted =
        Session(Model::load(path), {.max_batch = 8, .threads = 1}).run(images.data(), batch);

    const auto model = Model::load(path);
    std::atomic<int> wrong{0}, waiting{0};
    std::vector<std::thread> threads;
    constexpr int count = 8;
    for (int i = 0; i < count; i++)
        threads.emplace_back([&, i] {
            Session session(model, {.max_batch = 1 + i % 4, .threads = 1 + i % 3});
            waiting++;
            while (waiting < count) std::this_thread::yield();
            for (int round = 0; round < 6; round++)
                if (session.run(images.data(), batch) != wanted) wrong++;
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

// ---- files ---------------------------------------------------------------------------------------------------------

constexpr std::int64_t numbers = 30000;

void save_numbers(const std::string& path, float value)
{
    std::vector<float> data(static_cast<std::size_t>(numbers), value);
    save_safetensors(path, {{"a", {data.data(), {numbers}, DType::f32, {}}}}, {{"value", std::to_string(value)}});
}

// The value that all numbers of a whole file have; -1 where the file is torn.
float whole_value(const std::string& path)
{
    const SafetensorsFile file = SafetensorsFile::open(path);
    const Tensor* tensor = file.find("a");
    if (!tensor || !(tensor->shape == Shape{numbers})) return -1;
    const float first = tensor->as<float>()[0];
    for (std::int64_t i = 0; i < numbers; i++)
        if (tensor->as<float>()[i] != first) return -1;
    return file.metadata().at("value") == std::to_string(first) ? first : -1;
}

// Readers while a writer replaces the file: each sees one whole version, and never an older one after a newer one.
void test_replaced_while_reading()
{
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    save_numbers(path, 1);
    std::atomic<bool> done{false};
    std::atomic<int> torn{0}, reads{0};
    std::vector<std::thread> readers;
    for (int i = 0; i < 3; i++)
        readers.emplace_back([&] {
            for (float newest = 0; !done; reads++) {
                const float value = whole_value(path);
                if (value < newest) torn++;
                newest = value;
            }
        });
    for (int i = 2; i < 60; i++) save_numbers(path, static_cast<float>(i));
    while (reads < 100) std::this_thread::yield();
    done = true;
    for (std::thread& reader : readers) reader.join();
    CHECK(torn == 0);
    CHECK(whole_value(path) == 59);
    CHECK(folder.entries() == 1);
}

void test_model_replaced_while_loading()
{
    const Folder folder;
    const std::string path = folder.file("m.safetensors");
    const Config config = small();
    const std::vector<float> image = noise(3 * 24 * 32, 9);
    std::vector<std::vector<float>> logits;
    for (unsigned seed : {1u, 100u}) {
        save_network(path, config, seed);
        logits.push_back(Session(Model::load(path), {.max_batch = 1, .threads = 1}).run(image.data(), 1));
    }
    CHECK(logits[0] != logits[1]);
    std::atomic<bool> done{false};
    std::thread writer([&] {
        for (int i = 0; !done; i++) save_network(path, config, i % 2 ? 1 : 100);
    });
    int seen[2] = {0, 0};
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0;
         i < 20 || ((!seen[0] || !seen[1]) && std::chrono::steady_clock::now() - start < std::chrono::seconds(60));
         i++) {
        const auto got = Session(Model::load(path), {.max_batch = 1, .threads = 1}).run(image.data(), 1);
        CHECK(got == logits[0] || got == logits[1]);
        seen[got == logits[1]]++;
    }
    done = true;
    writer.join();
    CHECK(seen[0] > 0 && seen[1] > 0);
}

// In place, as `cp` does it: what is read after that is an error, neither torn numbers nor a bus error.
void test_overwritten_while_reading()
{
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    std::vector<float> read(static_cast<std::size_t>(numbers));
    const auto after = [&](const std::function<void()>& change) {
        save_numbers(path, 1);
        const SafetensorsFile file = SafetensorsFile::open(path);
        file.copy(*file.find("a"), read.data());
        CHECK(read.front() == 1 && read.back() == 1);
        std::this_thread::sleep_for(std::chrono::milliseconds(30));  // clocks of file systems are coarse
        change();
        return message_of<Error>([&] { file.copy(*file.find("a"), read.data()); });
    };
    const auto in_place = [&](std::ios::openmode mode, std::size_t size) {
        std::fstream(path, std::ios::binary | std::ios::out | mode) << std::string(size, 'x');
    };
    CHECK(contains(after([&] { in_place(std::ios::in, 5000); }), "a.safetensors: was overwritten while it was read"));
    CHECK(contains(after([&] { in_place(std::ios::app, 1); }), "a.safetensors: was overwritten while it was read"));
    CHECK(contains(after([&] { in_place(std::ios::trunc, 4096); }), "a.safetensors: became shorter while it was read"));
    CHECK(contains(after([&] { save_numbers(path, 2); }), "NOTHING THROWN"));  // renamed over: still the old one
    CHECK(read.front() == 1 && read.back() == 1);

    // A writer and a loader at the same time.
    const std::string network = folder.file("m.safetensors");
    save_network(network, small(), 1);
    std::ifstream whole(network, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(whole), {}};
    std::atomic<bool> done{false};
    std::thread writer([&] {
        while (!done) {
            std::ofstream file(network, std::ios::binary);
            file << bytes.substr(0, bytes.size() / 2) << std::flush << bytes.substr(bytes.size() / 2);
        }
    });
    int loaded = 0, refused = 0;
    for (int i = 0; i < 300 || (refused == 0 && i < 100000); i++) {
        try {
            Model::load(network);
            loaded++;
        } catch (const Error&) {
            refused++;
        }
    }
    done = true;
    writer.join();
    CHECK(refused > 0 && loaded + refused >= 300);
}

// A limit on the size of files stands for a full disk, at every stage of the file.
void test_full_disk()
{
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    save_numbers(path, 1);
    const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
    struct rlimit before;
    ::getrlimit(RLIMIT_FSIZE, &before);
    for (const rlim_t limit : {rlim_t{0}, rlim_t{5}, rlim_t{50}, rlim_t{4096}, rlim_t{4 * numbers}}) {
        const struct rlimit now{limit, before.rlim_max};
        ::setrlimit(RLIMIT_FSIZE, &now);
        const std::string message = message_of<Error>([&] { save_numbers(path, 2); });
        ::setrlimit(RLIMIT_FSIZE, &before);
        CHECK(contains(message, "a.safetensors: cannot write: File too large"));
        CHECK(whole_value(path) == 1);
        CHECK(folder.entries() == 1);
    }
    std::signal(SIGXFSZ, old_handler);
    save_numbers(path, 3);
    CHECK(whole_value(path) == 3);
}

// After a power cut there is the old file or the new one: it is on the disk before it takes the name, and the name
// before save_safetensors returns.
void test_order_of_a_save()
{
    const Folder folder;
    const std::filesystem::path place = std::filesystem::canonical(folder.path);
    const std::string path = place / "a.safetensors";
    std::vector<std::string> steps;
    record = &steps;
    save_numbers(path, 1);
    record = nullptr;
    CHECK(steps.size() == 3);
    if (steps.size() != 3) return;
    const std::string temporary = steps[0].substr(std::strlen("flush "));
    CHECK(temporary != path && steps[0].starts_with("flush "));
    CHECK(steps[1] == "rename " + temporary + " " + path);
    CHECK(steps[2] == "flush " + place.string());
}

// A process that saves without end is killed at random moments: the file is always whole.
void test_killed_while_saving()
{
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    save_numbers(path, 1);
    std::mt19937 rng(4);
    int replaced = 0, longest = 30000;  // microseconds; more where a save takes longer
    for (int round = 0; round < 25; round++) {
        const float before = whole_value(path);
        std::fflush(stdout);
        const pid_t child = ::fork();
        if (child == 0) {
            try {
                for (int i = 2;; i++) save_numbers(path, static_cast<float>(10000 * round + i));
            } catch (...) {
                ::_exit(1);
            }
        }
        std::this_thread::sleep_for(std::chrono::microseconds(std::uniform_int_distribution<int>(0, longest)(rng)));
        ::kill(child, SIGKILL);
        int status = 0;
        ::waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        const float value = whole_value(path);
        CHECK(value >= 1);
        if (value != before)
            replaced++;
        else if (replaced == 0)
            longest = std::min(2 * longest, 4000000);
    }
    CHECK(replaced > 0);
    save_numbers(path, 7);  // what the dead left behind does not stand in the way
    CHECK(whole_value(path) == 7);
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Networks that the machine cannot hold are refused before any work, with the bytes they need.
void test_larger_than_the_machine()
{
    const Folder folder;
    const std::string path = folder.file("m.safetensors");
    save_network(path, small(), 1);
    const auto model = Model::load(path);
    const std::string machine = ", this machine has " + std::to_string(machine_bytes());
    for (const std::int64_t batch : {std::int64_t{100000000}, std::int64_t{1} << 62}) {
        const std::string message = message_of<Error>([&] { Session(model, {.max_batch = batch, .threads = 1}); });
        CHECK(contains(message, "[session] batches of " + std::to_string(batch) + " images: needs " +
                                    std::to_string(forward_bytes(model->config(), batch)) + " bytes of memory" +
                                    machine));
    }
    // A position table for 2^30 tokens.
    const std::string message = message_of<Error>([&] { Model::load(path, Device::cpu(), 1 << 18, 1 << 18); });
    CHECK(contains(message, "[load] " + path + ": needs 1374"));
    CHECK(contains(message, machine));

    // A small file that claims a large network does not get that far: its tensors do not fit.
    Config config = small();
    config.depth = 4096;
    config.embed_dim = 65536;
    const std::vector<float> one(1);
    save_safetensors(path, {{"head.bias", {const_cast<float*>(one.data()), {1}, DType::f32, {}}}},
                     {{"vimcore.config", config.to_json()}});
    const std::string misfit = message_of<Error>([&] { Model::load(path); });
    CHECK(contains(misfit, "the tensors do not fit vimcore.config"));
    CHECK(contains(misfit, "\n  and 69627 more"));  // of 17 for each layer, and some
    CHECK(misfit.size() < 1500);

    config = {};
    config.img_height = config.img_width = 1 << 16;
    CHECK(forward_bytes(config, std::int64_t{1} << 60) == std::numeric_limits<std::int64_t>::max());
    CHECK(weight_bytes(Config{}) == 7148008 * 4);
    CHECK(machine_bytes() > 1 << 20);
    CHECK_THROWS(forward_bytes(Config{}, 0), std::invalid_argument);
}

// Labels and preprocessing are read with the network: none that does not fit comes out of a file.
void test_metadata_of_a_network()
{
    const Folder folder;
    const std::string path = folder.file("m.safetensors");
    save_network(path, small(), 1);
    const SafetensorsFile file = SafetensorsFile::open(path);
    const auto message = [&](const char* key, const std::string& value) {
        auto metadata = file.metadata();
        metadata[key] = value;
        save_safetensors(folder.file("other.safetensors"), file.tensors(), metadata);
        return message_of<Error>([&] { Model::load(folder.file("other.safetensors")); });
    };
    CHECK(contains(message("vimcore.labels", "[\"a\"]"), "one for each class, got 1"));
    CHECK(contains(message("vimcore.labels", "[1, 2, 3, 4, 5]"), "expected a string"));
    CHECK(contains(message("vimcore.labels", "{}"), "expected an array"));
    CHECK(contains(message("vimcore.config", "{\"depth\": 1, \"depth\": 2}"), "duplicate key"));
    CHECK(contains(message("vimcore.config", "{\"memory\": \"fast\"}"), "unknown option \"memory\""));
    const std::string steps = "{\"mean\": [0, 0, 1e308], \"std\": [1, 1, 1]}";
    CHECK(contains(message("vimcore.preprocess", steps), "mean: expected -1e+06 to 1e+06"));
    CHECK(message("vimcore.preprocess", "{}") == "NOTHING THROWN");
    CHECK(message("vimcore.labels", "[]") == "NOTHING THROWN");
}

}  // namespace

int main()
{
    test_killed_while_saving();  // forks: before there are threads
    test_full_disk();
    test_order_of_a_save();
    test_many_threads_one_model();
    test_replaced_while_reading();
    test_model_replaced_while_loading();
    test_overwritten_while_reading();
    test_larger_than_the_machine();
    test_metadata_of_a_network();
    return check_failures();
}
