// SPDX-License-Identifier: Apache-2.0
// vim-infer info: architecture, tensors, labels of a file; this program's build.
#include <cstdio>
#include <filesystem>
#include <optional>
#include <set>
#include <stdexcept>

#include "commands.h"
#include "run.h"
#include "text.h"
#include "vimcore/build_info.h"
#include "vimcore/model_file.h"
#include "vimcore/params.h"
#include "vimcore/safetensors.h"
#include "vimcore/segment.h"

namespace vim_infer {
namespace {

std::string grouped(std::int64_t value)  // 7,148,008
{
    std::string text = std::to_string(value);
    for (std::size_t at = text.size(); at > 3; at -= 3) text.insert(at - 3, 1, ',');
    return text;
}

std::string list(const std::vector<std::string>& items, bool json)
{
    std::string text;
    for (const std::string& item : items) text += (text.empty() ? "" : ", ") + (json ? json_text(item) : item);
    return json ? "[" + text + "]" : text;
}

struct File {
    std::string path;
    std::uintmax_t bytes = 0;
    vimcore::SafetensorsFile content;
    vimcore::ModelFile about;
    std::optional<vimcore::SegmentationFile> segmentation;  // where that is its task
    std::vector<std::string> types;
    std::int64_t parameters = 0, flops = 0;
};

File read(const std::string& path)
{
    File file;
    file.path = path;
    file.content = vimcore::SafetensorsFile::open(path);
    file.bytes = std::filesystem::file_size(path);
    file.about = vimcore::ModelFile::describe(file.content.metadata(), path);
    file.flops = file.about.config.flops();
    if (const std::string task = vimcore::task_of(file.content.metadata(), path); task == "segment") {
        file.segmentation = vimcore::SegmentationFile::describe(file.content.metadata(), path);
        file.segmentation->check_tensors(file.content, path);
        file.parameters = file.segmentation->head_parameters();
        file.flops = file.segmentation->flops();
    } else if (task == "classify") {
        vimcore::check_tensors(file.content, file.about.config, path);
    } else {
        throw std::runtime_error(path + ": a network for the task \"" + task + "\"; `vimcore info` shows it");
    }
    vimcore::for_each_param(file.about.config,
                            [&](const std::string&, const vimcore::Shape& shape) { file.parameters += shape.numel(); });
    std::set<std::string> types;
    for (const auto& [name, tensor] : file.content.tensors())
        if (!name.ends_with(".num_batches_tracked")) types.insert(vimcore::name_of(tensor.dtype));
    file.types.assign(types.begin(), types.end());
    return file;
}

std::string pair(std::int64_t first, std::int64_t second, const char* between)
{
    return std::to_string(first) + between + std::to_string(second);
}

// Fields of a JSON object, each with a comma behind it.
std::string json_of(const vimcore::SegmentationFile& about)
{
    std::string palette;
    for (const vimcore::Colour& colour : about.palette)
        palette += (palette.empty() ? "[" : ", [") + std::to_string(colour[0]) + ", " + std::to_string(colour[1]) +
                   ", " + std::to_string(colour[2]) + "]";
    const auto sides = [](std::int64_t a, std::int64_t b) { return "[" + pair(a, b, ", ") + "]"; };
    return "\"task\": \"segment\", \"head\": \"" + std::string(vimcore::name_of(about.head)) +
           "\", \"head_parameters\": " + std::to_string(about.head_parameters()) +
           ", \"classes\": " + list(about.classes, true) + ", \"palette\": [" + palette +
           "], \"window\": " + sides(about.window_height, about.window_width) +
           ", \"stride\": " + sides(about.stride_height, about.stride_width) +
           ", \"resize\": " + (about.resize ? sides(about.resize->short_side, about.resize->long_side) : "null") + ", ";
}

std::string text_of(const vimcore::SegmentationFile& about)
{
    return std::string("task        segment, head ") + vimcore::name_of(about.head) + " of " +
           grouped(about.head_parameters()) + " parameters\n" + "windows     " +
           pair(about.window_height, about.window_width, " x ") + " px every " +
           pair(about.stride_height, about.stride_width, " x ") + " px of pictures " +
           (about.resize ? "resized to " + pair(about.resize->short_side, about.resize->long_side, ", ") + " px at most"
                         : std::string("as they are")) +
           "\n";
}

std::string json_of(const File& file)
{
    std::string tensors;
    for (const auto& [name, tensor] : file.content.tensors()) {
        std::string shape;
        for (const std::int64_t size : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
        tensors += (tensors.empty() ? "" : ", ") + ("{\"name\": " + json_text(name)) + ", \"type\": \"" +
                   vimcore::name_of(tensor.dtype) + "\", \"shape\": [" + shape + "]}";
    }
    const vimcore::Config& config = file.about.config;
    return "\"file\": " + json_text(file.path) + ", \"bytes\": " + std::to_string(file.bytes) +
           ", \"types\": " + list(file.types, true) + ", \"parameters\": " + std::to_string(file.parameters) +
           ", \"flops\": " + std::to_string(file.flops) + ", \"tokens\": " + std::to_string(config.tokens()) +
           ", \"class_tokens\": " + std::to_string(config.class_tokens()) + ", \"grid\": [" +
           std::to_string(config.grid_height()) + ", " + std::to_string(config.grid_width()) +
           "], \"config\": " + config.to_json() +
           ", \"labels\": " + (file.about.labels.empty() ? "null" : list(file.about.labels, true)) +
           ", \"preprocess\": " + (file.about.preprocess ? file.about.preprocess->to_json() : "null") + ", " +
           (file.segmentation ? json_of(*file.segmentation) : "") + "\"tensors\": [" + tensors + "], ";
}

std::string text_of(const File& file, bool with_tensors)
{
    const vimcore::Config& config = file.about.config;
    const std::vector<std::string>& all = file.segmentation ? file.segmentation->classes : file.about.labels;
    std::vector<std::string> labels = all;
    if (labels.size() > 10) labels.resize(10);
    char size[80], flops[80];
    std::snprintf(size, sizeof size, " (%.2f MB, ", static_cast<double>(file.bytes) / 1e6);
    std::snprintf(flops, sizeof flops, "%.4g G", static_cast<double>(file.flops) / 1e9);
    const std::int64_t rows = config.grid_height(), columns = config.grid_width();
    std::string text = "file        " + literal(file.path) + size + list(file.types, false) + ")\n";
    text += "tensors     " + std::to_string(file.content.tensors().size()) + "\n";
    text += "parameters  " + grouped(file.parameters) + "\n";
    text += std::string("flops       ") + flops + " multiply-adds per " + (config.frames > 0 ? "clip" : "image") +
            ", scans included\n";
    text += "tokens      " + std::to_string(config.tokens()) + ": " +
            (config.frames > 0 ? std::to_string(config.frames) + " frames of " : "") + std::to_string(rows) + " x " +
            std::to_string(columns) + " patches, class tokens: " + std::to_string(config.class_tokens()) + "\n";
    if (file.segmentation) text += text_of(*file.segmentation);
    text += "labels      " + (labels.empty() ? "none" : literal(list(labels, false)));
    if (labels.size() < all.size()) text += ", ... (" + std::to_string(all.size()) + ")";
    text += "\npreprocess  " + (file.about.preprocess ? file.about.preprocess->to_json() : "none") + "\n";
    text += "config      " + config.to_json() + "\n";
    if (with_tensors)
        for (const auto& [name, tensor] : file.content.tensors())
            text += "  " + literal(name) + "  " + vimcore::to_string(tensor.shape) + " " +
                    vimcore::name_of(tensor.dtype) + "\n";
    return text;
}

std::string build_text(bool json)
{
    const vimcore::BuildInfo build = vimcore::build_info();
    const auto yes = [&](bool value) {
        return std::string(json ? (value ? "true" : "false") : (value ? "yes" : "no"));
    };
    if (json)
        return "\"build\": {\"version\": " + json_text(build.version) + ", \"compiler\": " + json_text(build.compiler) +
               ", \"isa\": " + json_text(build.isa) + ", \"isas\": " + list(build.isas, true) +
               ", \"bf16\": " + json_text(vimcore::bf16_unit()) + ", \"cuda\": " + yes(build.cuda) +
               ", \"jpeg\": " + yes(build.jpeg) + ", \"png\": " + yes(build.png) + "}";
    return "build       vimcore " + build.version + ", " + build.compiler + ", kernels " + build.isa + " of " +
           list(build.isas, false) + ", bf16: " + (vimcore::bf16_unit().empty() ? "no" : vimcore::bf16_unit()) +
           ", CUDA: " + yes(build.cuda) + ", JPEG: " + yes(build.jpeg) + ", PNG: " + yes(build.png) + "\n";
}

}  // namespace

int info(const std::vector<std::string>& words)
{
    std::string weights;
    bool json = false, tensors = false;
    std::vector<std::string> files;
    Arguments arguments("info", "[options] [FILE]", "Show what a vimcore file holds and how this program was built.");
    arguments.text("--weights", "FILE", weights, "vimcore safetensors file; the same as FILE");
    arguments.flag("--tensors", tensors, "list all tensors too");
    arguments.flag("--json", json, "as JSON");
    if (!arguments.parse(words, files)) return 0;
    if (!weights.empty()) files.push_back(weights);
    if (files.size() > 1) throw UsageError("more than one file given");

    std::string text;
    if (!files.empty()) {
        const File file = read(files[0]);
        text = json ? json_of(file) : text_of(file, tensors);
    }
    text += build_text(json);
    print(json ? "{" + text + "}\n" : text);
    return 0;
}

}  // namespace vim_infer
