// SPDX-License-Identifier: Apache-2.0
// What the commands share: options, the loaded network, and the way of pictures through it in batches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "find_images.h"
#include "image_stream.h"
#include "vimcore/model.h"

namespace vim_infer {

struct RunOptions {
    std::string weights;
    vimcore::Device device;
    vimcore::DType dtype = vimcore::DType::f32;
    std::int64_t threads = 0, batch = 0;         // 0: chosen by the tool
    std::int64_t img_height = 0, img_width = 0;  // 0: as stored
    bool progress = false;
    std::vector<std::string> images;  // files, folders, @lists

    void add_network(Arguments& arguments);                        // --weights, --device, --dtype, --threads
    void add_size(Arguments& arguments);                           // --img-size
    void add_pictures(Arguments& arguments, bool batches = true);  // --list, --batch, --progress
};

struct LoadedModel {
    std::shared_ptr<const vimcore::Model> model;
    std::vector<std::string> labels;
};
LoadedModel load_model(const RunOptions& options);
vimcore::SessionOptions session_options(const RunOptions& options, std::int64_t batch);

// What the network takes of these: pictures, or clips.
Found find_inputs(const RunOptions& options, const LoadedModel& loaded);

// As asked for; else 8, and less where images are large.
std::int64_t batch_of(const RunOptions& options, const vimcore::Config& config);

int decoders(const RunOptions& options);  // threads that read pictures

struct Counts {
    std::size_t total = 0, failed = 0;
    Kinds passed_over;
    bool clips = false;
};

// Calls compute(pixels, count) for batches of good pictures or clips, then emit(path, error, position) for all of them
// in order: position in the batch, or -1 where `error` says what is wrong with the picture. emit returns what is wrong
// with the result, or nothing. What is wrong is reported on standard error.
Counts run_pictures(
    const RunOptions& options, const LoadedModel& loaded, const Found& found,
    const std::function<void(const float* pixels, std::int64_t count)>& compute,
    const std::function<std::string(const std::string& path, const std::string& error, std::int64_t position)>& emit);

// Whether a network with sound weights can have given these numbers; what is said where not.
bool all_finite(const float* values, std::int64_t count);
inline constexpr const char* not_finite = "the network gives values that are not finite; its weights are damaged";

int exit_status(const Counts& counts);  // also says how many failed, and what was passed over

}  // namespace vim_infer
