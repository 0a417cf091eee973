// SPDX-License-Identifier: Apache-2.0
// vim-infer predict: the same lines as `vimcore predict`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "commands.h"
#include "find_images.h"
#include "out_file.h"
#include "run.h"
#include "text.h"
#include "vimcore/model_file.h"

namespace vim_infer {
namespace {

struct Format {
    std::int64_t topk = 5;
    bool json = false, logits = false;
};

struct Class {
    std::size_t index;
    double p;
};

// The most probable classes; of equal ones the first.
std::vector<Class> best(const float* logits, std::size_t classes, std::int64_t topk)
{
    const double highest = *std::max_element(logits, logits + classes);
    std::vector<double> p(classes);
    double sum = 0;
    for (std::size_t i = 0; i < classes; i++) sum += p[i] = std::exp(logits[i] - highest);
    std::vector<std::size_t> order(classes);
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto count = static_cast<std::ptrdiff_t>(std::min(static_cast<std::size_t>(topk), classes));
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](std::size_t a, std::size_t b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    std::vector<Class> top;
    for (std::ptrdiff_t i = 0; i < count; i++) top.push_back({order[i], p[order[i]] / sum});
    return top;
}

std::string joined(const float* logits, std::size_t classes, const char* separator)
{
    std::string out;
    for (std::size_t i = 0; i < classes; i++) out += (i ? separator : "") + number(logits[i], 9);
    return out;
}

// The fields of a JSON object.
std::string answer(const Format& format, const std::vector<std::string>& labels, const float* logits,
                   std::size_t classes)
{
    std::string line = "\"top\": [";
    bool first = true;
    for (const auto& [index, p] : best(logits, classes, format.topk)) {
        line += (first ? "" : ", ") + ("{\"index\": " + std::to_string(index)) +
                ", \"label\": " + (labels.empty() ? "null" : json_text(labels[index])) + ", \"p\": " + number(p, 6) +
                "}";
        first = false;
    }
    line += "]";
    if (format.logits) line += ", \"logits\": [" + joined(logits, classes, ", ") + "]";
    return line;
}

// A row of a table, see PredictionFile.
std::vector<std::string> cells(const Format& format, const std::vector<std::string>& labels, const float* logits,
                               std::size_t classes)
{
    std::vector<std::string> row;
    for (const auto& [index, p] : best(logits, classes, format.topk)) {
        row.push_back(std::to_string(index));
        row.push_back(labels.empty() ? "" : labels[index]);
        row.push_back(number(p, 6));
    }
    if (format.logits)
        for (std::size_t i = 0; i < classes; i++) row.push_back(number(logits[i], 9));
    return row;
}

std::string table(const Format& format, const std::string& path, const std::vector<std::string>& labels,
                  const float* logits, std::size_t classes)
{
    std::string text = literal(path) + "\n";
    for (const auto& [index, p] : best(logits, classes, format.topk)) {
        char row[64];
        std::snprintf(row, sizeof row, "  %7.3f %%  %5zu", 100 * p, index);
        text += row;
        if (!labels.empty() && !labels[index].empty()) text += "  " + literal(labels[index]);
        text += '\n';
    }
    if (format.logits) text += "  logits " + joined(logits, classes, " ") + "\n";
    return text;
}

void check_head(const vimcore::Model& model)
{
    const vimcore::Config& config = model.config();
    if (vimcore::is_embedding(model.metadata()))
        throw std::runtime_error(
            "[predict] weights: an image tower, whose outputs are no classes; `vim-infer features` writes them");
    if (config.num_classes == 0)
        throw std::runtime_error(
            "[predict] weights: the network has no head (num_classes=0), so there is nothing to predict");
    if (config.logits_shape(1).rank() == 3)
        throw std::runtime_error(
            "[predict] weights: with pool=\"all\" there are logits for every patch, none for the image");
}

}  // namespace

int predict(const std::vector<std::string>& words)
{
    RunOptions options;
    Format format;
    std::string out;
    Arguments arguments("predict", "--weights FILE [options] IMAGE|FOLDER|@LIST|-...", "Classify picture files.");
    options.add_network(arguments);
    options.add_size(arguments);
    options.add_pictures(arguments);
    arguments.positive("--topk", "N", format.topk, "classes to show (default: 5)");
    arguments.text("--out", "FILE", out, "write the predictions to a file: .csv, .json (an array) or .jsonl");
    arguments.flag("--json", format.json, "one JSON object per line and image, or with --out one of them");
    arguments.flag("--logits", format.logits, "show the logits of all classes too");
    arguments.note(
        "Pictures are JPEG, PNG, PPM and PGM files. A bad one, or one of another format, is reported and\n"
        "skipped; the exit status is then 1. Other files of a folder are counted by kind. Clips, for networks of\n"
        "clips, are folders of pictures, one a frame, and .npy files (T, H, W, C) uint8.");
    if (!arguments.parse(words, options.images)) return 0;
    if (options.images.empty()) throw UsageError("no pictures given");
    const std::string suffix = out.empty() ? "" : check_out(out, {".csv", ".json", ".jsonl"});

    const LoadedModel loaded = load_model(options);
    const vimcore::Config& config = loaded.model->config();
    check_head(*loaded.model);
    const std::int64_t batch = batch_of(options, config);
    vimcore::Session session(loaded.model, session_options(options, batch));
    const auto classes = static_cast<std::size_t>(session.outputs());
    std::vector<float> logits(static_cast<std::size_t>(batch) * classes);

    const auto compute = [&](const float* pixels, std::int64_t count) { session.run(pixels, count, logits.data()); };
    const Found found = find_inputs(options, loaded);
    std::size_t left = found.paths.size();
    std::optional<PredictionFile> file;
    if (!out.empty())
        file.emplace(out, suffix, std::min<std::int64_t>(format.topk, session.outputs()), format.logits ? classes : 0);
    const auto emit = [&](const std::string& path, const std::string& error, std::int64_t position) -> std::string {
        std::string what = error;
        const float* row = logits.data() + (position < 0 ? 0 : static_cast<std::size_t>(position) * classes);
        if (position >= 0 && !all_finite(row, session.outputs())) what = not_finite;
        const std::string last = --left == 0 ? passed_over_json(found.passed_over) : "";
        const auto object = [&] {
            return "{\"image\": " + json_text(path) + ", " +
                   (what.empty() ? answer(format, loaded.labels, row, classes) : "\"error\": " + json_text(what)) +
                   last + "}";
        };
        if (file && file->is_table())
            file->add_row(path, what.empty() ? cells(format, loaded.labels, row, classes) : std::vector<std::string>(),
                          what);
        else if (file)
            file->add_object(object());
        else if (format.json)
            print(object() + "\n");
        else if (what.empty())
            print(table(format, path, loaded.labels, row, classes));
        flush();
        return what;
    };
    const Counts counts = run_pictures(options, loaded, found, compute, emit);
    const int status = exit_status(counts);
    if (!file) return status;
    file->end();
    const std::string total = std::to_string(counts.total);
    print(format.json ? "{\"written\": " + json_text(out) + ", \"images\": " + total + "}\n"
                      : literal(out) + ": predictions of " + total + " images\n");
    return status;
}

}  // namespace vim_infer
