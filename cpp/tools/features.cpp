// SPDX-License-Identifier: Apache-2.0
// vim-infer features: what the network knows of each picture, for search, clustering or another classifier.
#include <stdexcept>

#include "commands.h"
#include "find_images.h"
#include "out_file.h"
#include "run.h"
#include "text.h"
#include "vimcore/model_file.h"
#include "vimcore/ops.h"

namespace vim_infer {
namespace {

// How the network itself reads its tokens out: the class token(s), registers one after the other, or a pool over all.
vimcore::ReadoutForward readout_of(const vimcore::Config& config)
{
    vimcore::ReadoutForward readout;
    if (config.class_token != vimcore::ClassToken::none) {
        const bool registers = config.class_token == vimcore::ClassToken::registers;
        readout.reduce = registers ? vimcore::Reduce::join : vimcore::Reduce::select;
        readout.places = config.class_places();
    } else if (config.pool == vimcore::Pool::max) {
        readout.reduce = vimcore::Reduce::max;
    } else if (config.pool == vimcore::Pool::last) {
        readout.reduce = vimcore::Reduce::select;
        readout.places = vimcore::ClassPlaces::one(config.tokens() - 1);
    }
    return readout;
}

}  // namespace

int features(const std::vector<std::string>& words)
{
    RunOptions options;
    std::string out;
    bool all_tokens = false, json = false;
    Arguments arguments("features", "--weights FILE --out FILE [options] IMAGE|FOLDER|@LIST|-...",
                        "Write the features of pictures, what the network's head sees, to a file; of an image tower\n"
                        "what its head gives.");
    options.add_network(arguments);
    options.add_size(arguments);
    options.add_pictures(arguments);
    arguments.text("--out", "FILE", out, "file to write: .npz, .npy, .csv or .safetensors (required)");
    arguments.flag("--tokens", all_tokens,
                   "all tokens of each picture (N, L, D) instead of one vector (N, D), of registers (N, n D)");
    arguments.flag("--json", json, "print what was written as JSON");
    arguments.note(
        "`features` are float32, one row per good picture in order. Their names: in .npz the array `images`, in\n"
        ".csv the first column, in .safetensors a JSON list in the metadata key vimcore.images; .npy has none.\n"
        "All features are held in memory. Networks of clips take folders of pictures, one a frame, and .npy\n"
        "files (T, H, W, C) uint8.");
    if (!arguments.parse(words, options.images)) return 0;
    if (options.images.empty()) throw UsageError("no pictures given");
    if (out.empty()) throw UsageError("the argument --out is required");

    const std::string suffix = check_out(out, {".csv", ".npy", ".npz", ".safetensors"});
    if (all_tokens && suffix == ".csv")
        throw UsageError("argument --out: with --tokens a picture has a table of its own, which " + out +
                         " cannot hold; .npz can");
    const LoadedModel loaded = load_model(options);
    const vimcore::Config& config = loaded.model->config();
    const std::int64_t batch = batch_of(options, config), length = config.tokens();
    vimcore::Session session(loaded.model, session_options(options, batch));
    const bool of_head = !all_tokens && vimcore::is_embedding(loaded.model->metadata());
    const std::int64_t width = of_head ? session.outputs() : config.embed_dim;
    vimcore::Context cpu(vimcore::Device::cpu(), 1);
    vimcore::ReadoutForward readout = readout_of(config);
    const std::int64_t pool_width =
        width * (!of_head && readout.reduce == vimcore::Reduce::join ? readout.places.count : 1);
    const std::int64_t row = all_tokens ? length * width : pool_width;
    std::vector<float> tokens(static_cast<std::size_t>(of_head ? 0 : batch * length * width)), pooled, kept;
    if (!all_tokens) pooled.resize(static_cast<std::size_t>(batch * pool_width));
    std::vector<std::string> names;

    const auto compute = [&](const float* pixels, std::int64_t count) {
        if (of_head) return session.run(pixels, count, pooled.data());
        session.features(pixels, count, tokens.data());
        if (all_tokens) return;
        readout.x = {tokens.data(), {count, length, width}, vimcore::DType::f32, {}};
        readout.out = {pooled.data(), {count, pool_width}, vimcore::DType::f32, {}};
        vimcore::readout_forward(cpu, readout);
    };
    const auto emit = [&](const std::string& path, const std::string&, std::int64_t position) -> std::string {
        if (position < 0) return {};
        const float* from = (all_tokens ? tokens : pooled).data() + position * row;
        if (!all_finite(from, row)) return not_finite;
        kept.insert(kept.end(), from, from + row);
        names.push_back(path);
        return {};
    };
    const Counts counts = run_pictures(options, loaded, find_inputs(options, loaded), compute, emit);
    const int status = exit_status(counts);
    if (names.empty()) throw std::runtime_error("nothing gave features, so nothing is written to " + out);

    const auto count = static_cast<std::int64_t>(names.size());
    const vimcore::Shape shape = all_tokens ? vimcore::Shape{count, length, width} : vimcore::Shape{count, pool_width};
    write_features(out, suffix, names, kept, shape);
    if (counts.failed > 0 && suffix == ".npy")
        complain(out + ": has no rows for images that failed, and no names; .npz and .csv have names");
    if (json)
        print("{\"written\": " + json_text(out) + ", \"images\": " + std::to_string(count) + ", \"failed\": " +
              std::to_string(counts.failed) + ", \"width\": " + std::to_string(all_tokens ? width : pool_width) +
              passed_over_json(counts.passed_over) + "}\n");
    else
        print(literal(out) + ": features " + vimcore::to_string(shape) + " of " + std::to_string(count) +
              (config.frames > 0 ? " clips\n" : " pictures\n"));
    return status;
}

}  // namespace vim_infer
