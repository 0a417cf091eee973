// SPDX-License-Identifier: Apache-2.0
// vim-infer bench: milliseconds per image of the network alone, by image size and batch; with pictures also of
// the whole way from their files, measured in turns with the network alone.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "commands.h"
#include "run.h"
#include "text.h"
#include "vimcore/build_info.h"

namespace vim_infer {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    const std::size_t half = values.size() / 2;
    return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Pixels of any values in the usual range; what they are does not change the time.
std::vector<float> noise(const vimcore::Config& config, std::int64_t batch)
{
    std::vector<float> pixels(static_cast<std::size_t>(config.images_shape(batch).numel()));
    std::uint32_t state = 1;
    for (float& pixel : pixels) {
        state = state * 1664525u + 1013904223u;
        pixel = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return pixels;
}

struct Row {
    std::int64_t height, width, tokens, batch;
    std::size_t runs;
    double ms, fastest;  // per image
    double gflops;       // 10^9 multiply-adds per second
    std::int64_t peak;   // bytes of the process at the most, weights and images included; 0: not known here
};

// Linux keeps the most memory that a process has had: makes it forget, and tells.
void forget_peak()
{
    if (std::FILE* file = std::fopen("/proc/self/clear_refs", "w")) {
        std::fputs("5", file);
        std::fclose(file);
    }
}

std::int64_t peak_bytes()
{
    long long kib = 0;
    if (std::FILE* file = std::fopen("/proc/self/status", "r")) {
        for (char line[256]; std::fgets(line, sizeof line, file);)
            if (std::sscanf(line, "VmHWM: %lld", &kib) == 1) break;
        std::fclose(file);
    }
    return kib * 1024;
}

Row measure(const RunOptions& options, const LoadedModel& loaded, std::int64_t batch, double seconds)
{
    const vimcore::Config& config = loaded.model->config();
    vimcore::Session session(loaded.model, session_options(options, batch));
    const std::vector<float> pixels = noise(config, batch);
    std::vector<float> out(static_cast<std::size_t>(batch * session.outputs()));
    for (int i = 0; i < 2; i++) session.run(pixels.data(), batch, out.data());  // packs weights, takes memory
    std::vector<double> times;
    for (const auto start = Clock::now(); times.size() < 5 || seconds_since(start) < seconds;) {
        const auto begin = Clock::now();
        session.run(pixels.data(), batch, out.data());
        times.push_back(1e3 * seconds_since(begin) / static_cast<double>(batch));
    }
    const double ms = median(times);
    return {.height = config.img_height,
            .width = config.img_width,
            .tokens = config.tokens(),
            .batch = batch,
            .runs = times.size(),
            .ms = ms,
            .fastest = *std::min_element(times.begin(), times.end()),
            .gflops = static_cast<double>(config.flops()) / ms * 1e-6,
            .peak = peak_bytes()};
}

struct Files {
    std::size_t images = 0, failed = 0, rounds = 0;
    Kinds passed_over;
    double rate = 0, alone = 0, share = 0;  // images per second from files, of the network alone; median of quotients
};

// Rounds over all pictures in turns with as many images from memory, so that a busy machine slows both alike.
Files measure_files(const RunOptions& options, const LoadedModel& loaded, double seconds)
{
    const Found found = find_inputs(options, loaded);
    if (std::find(found.paths.begin(), found.paths.end(), standard_input) != found.paths.end())
        throw std::runtime_error("-: pictures are read again and again, standard input can be read once");
    const vimcore::Config& config = loaded.model->config();
    const std::int64_t batch = batch_of(options, config);
    vimcore::Session session(loaded.model, session_options(options, batch));
    const std::vector<float> pixels = noise(config, batch);
    std::vector<float> out(static_cast<std::size_t>(batch * session.outputs()));
    const auto compute = [&](const float* from, std::int64_t count) { session.run(from, count, out.data()); };
    const auto emit = [](const std::string&, const std::string&, std::int64_t) { return std::string(); };

    Counts counts = run_pictures(options, loaded, found, compute, emit);  // warm, and says which pictures are bad
    complain_passed_over(counts.passed_over);
    if (counts.total == counts.failed)
        throw std::runtime_error(loaded.model->config().frames > 0 ? "no clips that could be read"
                                                                   : "no pictures that could be read");
    Files files{.images = counts.total, .failed = counts.failed, .passed_over = counts.passed_over};
    const auto good = static_cast<std::int64_t>(counts.total - counts.failed);
    std::vector<double> rates, alone, shares;
    for (const auto start = Clock::now(); rates.size() < 3 || seconds_since(start) < seconds;) {
        auto begin = Clock::now();
        run_pictures(options, loaded, found, compute, emit);
        rates.push_back(static_cast<double>(good) / seconds_since(begin));
        begin = Clock::now();
        for (std::int64_t i = 0; i < good; i += batch) compute(pixels.data(), std::min(batch, good - i));
        alone.push_back(static_cast<double>(good) / seconds_since(begin));
        shares.push_back(rates.back() / alone.back());
    }
    files.rounds = rates.size();
    files.rate = median(rates);
    files.alone = median(alone);
    files.share = median(shares);
    return files;
}

std::string json_row(const Row& row)
{
    return "{\"height\": " + std::to_string(row.height) + ", \"width\": " + std::to_string(row.width) +
           ", \"tokens\": " + std::to_string(row.tokens) + ", \"batch\": " + std::to_string(row.batch) +
           ", \"runs\": " + std::to_string(row.runs) + ", \"ms_per_image\": " + number(row.ms, 6) +
           ", \"fastest_ms\": " + number(row.fastest, 6) + ", \"gflops\": " + number(row.gflops, 6) +
           ", \"peak_bytes\": " + std::to_string(row.peak) + "}";
}

void print_row(const Row& row)
{
    char text[160];
    std::snprintf(text, sizeof text, "%5lld x %-5lld %8lld %6lld %11.2f %11.2f %10.1f %8.1f %9.1f\n",
                  static_cast<long long>(row.height), static_cast<long long>(row.width),
                  static_cast<long long>(row.tokens), static_cast<long long>(row.batch), row.ms, row.fastest,
                  1e3 / row.ms, row.gflops, static_cast<double>(row.peak) / (1 << 20));
    print(text);
    flush();
}

}  // namespace

int bench(const std::vector<std::string>& words)
{
    RunOptions options;
    std::vector<std::int64_t> sizes, batches{1, 8};
    double seconds = 2;
    bool json = false;
    Arguments arguments(
        "bench", "--weights FILE [options] [IMAGE|FOLDER|@LIST...]",
        "Measure milliseconds per image of the network (median); with pictures also the whole way from\n"
        "their files, in turns with the network alone.");
    options.add_network(arguments);
    arguments.list("--sizes", "N,N,...", sizes, "image sides in pixels (default: the file's size)");
    arguments.list("--batches", "N,N,...", batches, "images computed together (default: 1,8)");
    arguments.seconds("--seconds", "S", seconds, "time to measure each (default: 2; 5 runs at least)");
    arguments.flag("--json", json, "as one JSON object");
    if (!arguments.parse(words, options.images)) return 0;

    const vimcore::BuildInfo build = vimcore::build_info();
    std::string rows;
    if (!json) print("   size          tokens  batch    ms/image     fastest   images/s   Gmac/s  peak MiB\n");
    if (sizes.empty()) sizes.push_back(0);
    for (const std::int64_t size : sizes) {
        options.img_height = options.img_width = size;
        forget_peak();
        const LoadedModel loaded = load_model(options);
        for (const std::int64_t batch : batches) {
            const Row row = measure(options, loaded, batch, seconds);
            if (json)
                rows += (rows.empty() ? "" : ", ") + json_row(row);
            else
                print_row(row);
            forget_peak();
        }
    }
    int status = 0;
    std::string files_json = "null";
    if (!options.images.empty()) {
        options.img_height = options.img_width = 0;
        const Files files = measure_files(options, load_model(options), seconds);
        status = files.failed > 0;
        if (json)
            files_json =
                "{\"images\": " + std::to_string(files.images) + ", \"failed\": " + std::to_string(files.failed) +
                ", \"rounds\": " + std::to_string(files.rounds) + ", \"images_per_s\": " + number(files.rate, 6) +
                ", \"network_alone_per_s\": " + number(files.alone, 6) + ", \"share\": " + number(files.share, 4) +
                passed_over_json(files.passed_over) + "}";
        else
            print("from files: " + number(files.rate, 4) + " images/s, network alone " + number(files.alone, 4) +
                  " images/s, share " + number(files.share, 3) + " (median of " + std::to_string(files.rounds) +
                  " rounds)\n");
    }
    if (json)
        print("{\"weights\": " + json_text(options.weights) +
              ", \"device\": " + json_text(vimcore::to_string(options.device)) +
              ", \"dtype\": " + json_text(vimcore::name_of(options.dtype)) + ", \"isa\": " + json_text(build.isa) +
              ", \"threads\": " + std::to_string(options.threads) + ", \"network\": [" + rows +
              "], \"files\": " + files_json + "}\n");
    return status;
}

}  // namespace vim_infer
