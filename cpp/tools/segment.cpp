// SPDX-License-Identifier: Apache-2.0
// vim-infer segment: the same lines as `vimcore predict` on the file of a network for segmentation.
#include <cstdio>
#include <filesystem>
#include <new>
#include <set>
#include <stdexcept>
#include <system_error>

#include "commands.h"
#include "find_images.h"
#include "progress.h"
#include "run.h"
#include "text.h"
#include "vimcore/segment.h"

namespace vim_infer {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t pictures_ahead = 4;  // in memory, decoded

// Where results of pictures go, and which names are taken.
class Output {
public:
    Output(const std::string& folder, const std::vector<std::string>& pictures) : folder_(folder)
    {
        if (folder.empty()) return;
        std::error_code error;
        fs::create_directories(folder, error);
        if (error || !fs::is_directory(folder, error))
            throw std::runtime_error("argument --out: " + folder + ": cannot make the folder" +
                                     (error ? ": " + error.message() : ""));
        for (const std::string& picture : pictures) taken_.insert(place(picture));
    }

    struct Names {
        std::string mask, overlay;  // empty: not wanted
    };
    Names names_for(const std::string& picture)
    {
        if (folder_.empty()) return {};
        const fs::path stem = fs::path(folder_) / (picture == standard_input ? "stdin" : fs::path(picture).stem());
        Names names{stem.string() + ".png", stem.string() + "_overlay.jpg"};
        for (const std::string& name : {names.mask, names.overlay})
            if (!taken_.insert(place(name)).second)
                throw std::runtime_error(name +
                                         " is another picture, or the result of one; pictures of the same name "
                                         "need runs of their own with another --out");
        return names;
    }

private:
    static std::string place(const std::string& path)
    {
        std::error_code error;
        const fs::path found = fs::weakly_canonical(path, error);
        return error ? path : found.string();
    }

    std::string folder_;
    std::set<std::string> taken_;
};

// The fields of a JSON object.
std::string fields_of(const vimcore::ClassMap& map, const vimcore::SegmentationFile& about, const Output::Names& names)
{
    std::string line =
        "\"width\": " + std::to_string(map.width) + ", \"height\": " + std::to_string(map.height) + ", \"areas\": [";
    bool first = true;
    for (const auto& [index, pixels] : vimcore::areas_of(map)) {
        const double share = static_cast<double>(pixels) / static_cast<double>(map.classes.size());
        line += (first ? "" : ", ") + ("{\"index\": " + std::to_string(index)) +
                ", \"label\": " + json_text(about.classes[static_cast<std::size_t>(index)]) +
                ", \"pixels\": " + std::to_string(pixels) + ", \"share\": " + number(share, 6) + "}";
        first = false;
    }
    line += "]";
    if (!names.mask.empty())
        line += ", \"mask\": " + json_text(names.mask) + ", \"overlay\": " + json_text(names.overlay);
    return line;
}

std::string table(const std::string& path, const vimcore::ClassMap& map, const vimcore::SegmentationFile& about,
                  std::int64_t topk, const Output::Names& names)
{
    std::string text = literal(path) + "\n";
    for (const auto& [index, pixels] : vimcore::areas_of(map)) {
        if (topk-- == 0) break;
        char row[64];
        std::snprintf(row, sizeof row, "  %7.3f %%  %5lld",
                      100 * static_cast<double>(pixels) / static_cast<double>(map.classes.size()),
                      static_cast<long long>(index));
        const std::string& label = about.classes[static_cast<std::size_t>(index)];
        text += row + (label.empty() ? "" : "  " + literal(label)) + "\n";
    }
    if (!names.mask.empty()) text += "  " + literal(names.mask) + ", " + literal(names.overlay) + "\n";
    return text;
}

// What is wrong with a picture, which is named by whoever prints this.
std::string reason(const std::exception& error)
{
    const std::string text = error.what(), prefix = "[segment] ";
    return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

}  // namespace

int segment(const std::vector<std::string>& words)
{
    RunOptions options;
    std::string out;
    std::int64_t topk = 5;
    bool json = false;
    Arguments arguments("segment", "--weights FILE [options] IMAGE|FOLDER|@LIST|-...",
                        "Give every pixel of picture files a class.");
    options.add_network(arguments);
    options.add_pictures(arguments, false);
    arguments.text("--out", "DIR", out, "write NAME.png, class indices with a palette, and NAME_overlay.jpg");
    arguments.positive("--topk", "N", topk, "classes to show (default: 5); JSON has all");
    arguments.flag("--json", json, "one JSON object per line and image");
    arguments.note(
        "Weights are the file of a network for segmentation with the head fcn, linear or uper, which run on the\n"
        "CPU. Pictures are JPEG, PNG, PPM and PGM files of any size. A bad one, or one of another format, is\n"
        "reported and skipped; the exit status is then 1. Other files of a folder are counted by kind.");
    if (!arguments.parse(words, options.images)) return 0;
    if (options.images.empty()) throw UsageError("no pictures given");
    if (options.weights.empty()) throw UsageError("the argument --weights is required");

    const auto model = vimcore::SegmentationModel::load(options.weights, options.device);
    const vimcore::SegmentationFile& about = model->about();
    if (about.mean.empty())
        throw std::runtime_error("the network takes images of " + std::to_string(about.config.in_chans) +
                                 " channels, which no picture file has");
    vimcore::SegmentationSession session(model, static_cast<int>(options.threads), options.dtype);
    const Found found = find_images(options.images);
    Output output(out, found.paths);
    if (!out.empty() && !(vimcore::has_jpeg() && vimcore::has_png()))
        throw std::runtime_error(
            "argument --out: this vim-infer was built without libjpeg or libpng, which write "
            "the results");

    ImageStream stream(found.paths, to_picture(), decoders(options), pictures_ahead);
    Progress progress(stream.total(), options.progress);
    Counts counts{.passed_over = found.passed_over};
    vimcore::ClassMap map;
    for (Loaded loaded; stream.next(loaded);) {
        std::string what = loaded.error;
        Output::Names names;
        if (what.empty()) {
            try {
                session.segment(loaded.picture, map);
                names = output.names_for(loaded.path);
            } catch (const std::bad_alloc&) {
                what = "out of memory";
            } catch (const std::exception& error) {
                what = reason(error);
            }
        }
        if (what.empty() && !names.mask.empty()) {  // a result that cannot be written ends the run
            vimcore::save_class_png(names.mask, map, about.palette);
            vimcore::save_jpeg(names.overlay, vimcore::overlay(loaded.picture, map, about.palette));
        }
        const std::string last = ++counts.total == stream.total() ? passed_over_json(found.passed_over) : "";
        if (json)
            print("{\"image\": " + json_text(loaded.path) + ", " +
                  (what.empty() ? fields_of(map, about, names) : "\"error\": " + json_text(what)) + last + "}\n");
        else if (what.empty())
            print(table(loaded.path, map, about, topk, names));
        flush();
        if (!what.empty()) {
            counts.failed++;
            progress.clear();
            complain(loaded.path + ": " + what);
        }
        progress.advance(counts.total);
    }
    return exit_status(counts);
}

}  // namespace vim_infer
