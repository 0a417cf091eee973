// SPDX-License-Identifier: Apache-2.0
#include "network/model_file.h"

#include <unordered_set>

#include "files/float_types.h"
#include "files/json.h"
#include "vimcore/error.h"
#include "vimcore/params.h"
#include "vimcore/preprocess.h"

namespace vimcore {

namespace {

constexpr std::size_t listed = 12;  // faults of one message

[[noreturn]] void refuse(const std::string& path, const std::string& what)
{
    throw Error("[load] " + json::printable(path, 1000) + ": " + what);
}

class Misfits {
public:
    void add(const std::string& what)
    {
        if (count_++ < listed) text_ += "\n  " + what;
    }
    void raise(const std::string& path, const std::string& advice) const
    {
        if (count_ == 0) return;
        const std::string more = count_ > listed ? "\n  and " + std::to_string(count_ - listed) + " more" : "";
        refuse(path, "the tensors do not fit vimcore.config:" + text_ + more + advice);
    }

private:
    std::size_t count_ = 0;
    std::string text_;
};

}  // namespace

ModelFile ModelFile::describe(const std::map<std::string, std::string>& metadata, const std::string& path)
{
    const auto config = metadata.find("vimcore.config");
    if (config == metadata.end())
        refuse(
            path,
            "no vimcore.config in the metadata, so not a vimcore file; `vimcore convert` makes one from bare weights");
    ModelFile file;
    try {
        file.config = Config::from_json(config->second);
    } catch (const std::invalid_argument& error) {
        refuse(path, std::string("vimcore.config: ") + error.what());
    }
    try {
        file.labels = labels_of(file.config, metadata);
    } catch (const Error& error) {
        refuse(path, error.what());
    }
    const auto steps = metadata.find("vimcore.preprocess");
    if (steps == metadata.end()) return file;
    try {
        const json::Value root = json::parse(steps->second);
        if (root.kind == json::Kind::null || (root.kind == json::Kind::object && root.items.empty())) return file;
        file.preprocess = Preprocess::from_json(steps->second).to_json();
    } catch (const std::invalid_argument& error) {
        refuse(path, std::string("vimcore.preprocess: ") + error.what());
    }
    return file;
}

std::vector<std::string> check_tensors(const SafetensorsFile& file, const Config& config, const std::string& path,
                                       bool more)
{
    std::unordered_set<std::string> known{"rope.freqs_cos", "rope.freqs_sin"};
    Misfits faults;
    Params params;
    for_each_param(config, params, [&](const std::string& name, Tensor&, const Shape& shape) {
        known.insert(name);
        const Tensor* tensor = file.find(name);
        if (more && name.starts_with("head.")) return;
        if (!tensor) {
            faults.add("missing " + name + " " + to_string(shape));
        } else if (!(tensor->shape == shape)) {
            faults.add("misshapen " + name + ": expected " + to_string(shape) + ", got " + to_string(tensor->shape));
        } else if (!is_float(tensor->dtype)) {
            faults.add(name + ": expected a float type, got " + name_of(tensor->dtype));
        }
    });
    std::vector<std::string> others;
    for (const auto& [name, tensor] : file.tensors()) {
        if (known.count(name)) continue;
        others.push_back(name);
        if (!more) faults.add("unexpected " + json::printable(name) + " " + to_string(tensor.shape));
    }
    const bool derived = !more && !others.empty();
    faults.raise(path, derived ? "; tensors besides the architecture's are loaded by the class that saved them" : "");
    return others;
}

}  // namespace vimcore
