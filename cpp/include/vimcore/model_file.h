// SPDX-License-Identifier: Apache-2.0
// What a vimcore file says about itself, checked before a tensor is read or memory is asked for.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/image.h"
#include "vimcore/safetensors.h"

namespace [[gnu::visibility("default")]] vimcore {

struct ModelFile {
    Config config;
    std::vector<std::string> labels;       // one per class, or none
    std::optional<Preprocess> preprocess;  // as stored

    // Of a file's metadata. Error: "[load] PATH: ..." where a part is missing or damaged.
    static ModelFile describe(const std::map<std::string, std::string>& metadata, const std::string& path);
};

// The task in the metadata key vimcore.task, "segment", "detect" or "clip"; "classify" without the key. Error: "[load]
// PATH: ..." where it is damaged.
std::string task_of(const std::map<std::string, std::string>& metadata, const std::string& path);

// Whether the head gives coordinates, as of an image tower, and no logits of classes: the key vimcore.embedding.
bool is_embedding(const std::map<std::string, std::string>& metadata);

// How given tensors differ from wanted ones: "missing: NAME SHAPE", "misshapen: NAME: expected SHAPE, got SHAPE",
// "unexpected: NAME SHAPE".
using NamedShapes = std::vector<std::pair<std::string, Shape>>;
std::vector<std::string> misfits(const NamedShapes& wanted, const NamedShapes& given);

// Compares the names, types and shapes of the tensors with the architecture; Error names what does not fit. Tables of
// rotations are optional. Returns the names of tensors that the architecture lacks, which are a fault unless `more`:
// networks derived from ours have tensors of their own, and may have another head.
std::vector<std::string> check_tensors(const SafetensorsFile& file, const Config& config, const std::string& path,
                                       bool more = false);

// The same for a network with further parts: every wanted tensor is there, of its shape and a float type; of others
// only those that may be passed over.
void require_tensors(const SafetensorsFile& file, const NamedShapes& wanted,
                     const std::function<bool(const std::string& name)>& passed_over, const std::string& path);

}  // namespace vimcore
