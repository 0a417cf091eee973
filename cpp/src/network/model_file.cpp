// SPDX-License-Identifier: Apache-2.0
#include "vimcore/model_file.h"

#include <unordered_map>
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

[[noreturn]] void refuse_tensors(const std::string& path, const std::vector<std::string>& faults, const char* hint = "")
{
    std::string text;
    for (std::size_t i = 0; i < faults.size() && i < listed; i++) text += "\n  " + faults[i];
    if (faults.size() > listed) text += "\n  and " + std::to_string(faults.size() - listed) + " more";
    refuse(path, "the tensors do not fit vimcore.config:" + text + hint);
}

std::string no_float(const std::string& name, DType dtype)
{
    return name + ": expected a float type, got " + name_of(dtype);
}

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
        file.preprocess = Preprocess::from_json(steps->second);
    } catch (const std::invalid_argument& error) {
        refuse(path, std::string("vimcore.preprocess: ") + error.what());
    }
    return file;
}

std::string task_of(const std::map<std::string, std::string>& metadata, const std::string& path)
{
    const auto found = metadata.find("vimcore.task");
    if (found == metadata.end()) return "classify";
    try {
        const json::Value root = json::parse(found->second);
        root.require_object("the value");
        const json::Value* task = root.find("task");
        if (!task) throw std::invalid_argument("task: missing");
        if (std::string name = task->as_string("task"); name.size() <= 100) return name;
        throw std::invalid_argument("task: expected a name of at most 100 bytes");
    } catch (const std::invalid_argument& error) {
        refuse(path, std::string("vimcore.task: ") + error.what());
    }
}

bool is_embedding(const std::map<std::string, std::string>& metadata)
{
    const auto found = metadata.find("vimcore.embedding");
    return found != metadata.end() && found->second == "true";
}

std::vector<std::string> misfits(const NamedShapes& wanted, const NamedShapes& given)
{
    std::unordered_map<std::string, const Shape*> shapes;
    for (const auto& [name, shape] : given) shapes.emplace(name, &shape);
    std::unordered_set<std::string> known;
    std::vector<std::string> faults;
    for (const auto& [name, shape] : wanted) {
        known.insert(name);
        const auto found = shapes.find(name);
        if (found == shapes.end())
            faults.push_back("missing: " + json::printable(name) + " " + to_string(shape));
        else if (!(*found->second == shape))
            faults.push_back("misshapen: " + json::printable(name) + ": expected " + to_string(shape) + ", got " +
                             to_string(*found->second));
    }
    for (const auto& [name, shape] : given)
        if (!known.count(name)) faults.push_back("unexpected: " + json::printable(name) + " " + to_string(shape));
    return faults;
}

std::vector<std::string> check_tensors(const SafetensorsFile& file, const Config& config, const std::string& path,
                                       bool more)
{
    const auto counts = [&](const std::string& name) { return !more || !name.starts_with("head."); };
    std::unordered_set<std::string> known{"rope.freqs_cos", "rope.freqs_sin"};
    NamedShapes wanted, given;
    std::vector<std::string> others, types;
    for_each_param(config, [&](const std::string& name, const Shape& shape) {
        known.insert(name);
        if (!counts(name)) return;
        wanted.emplace_back(name, shape);
        const Tensor* tensor = file.find(name);
        if (tensor && tensor->shape == shape && !is_float(tensor->dtype))
            types.push_back(no_float(name, tensor->dtype));
    });
    for (const auto& [name, tensor] : file.tensors()) {
        const bool other = !known.count(name);
        if (other) others.push_back(name);
        if (other ? !more : counts(name) && !name.starts_with("rope.")) given.emplace_back(name, tensor.shape);
    }
    std::vector<std::string> faults = misfits(wanted, given);
    faults.insert(faults.end(), types.begin(), types.end());
    if (faults.empty()) return others;
    refuse_tensors(
        path, faults,
        !more && !others.empty() ? "; tensors besides the architecture's are loaded by the class that saved them" : "");
}

void require_tensors(const SafetensorsFile& file, const NamedShapes& wanted,
                     const std::function<bool(const std::string& name)>& passed_over, const std::string& path)
{
    NamedShapes given;
    for (const auto& [name, tensor] : file.tensors())
        if (!passed_over(name)) given.emplace_back(name, tensor.shape);
    std::vector<std::string> faults = misfits(wanted, given);
    for (const auto& [name, shape] : wanted)
        if (const Tensor* tensor = file.find(name); tensor && tensor->shape == shape && !is_float(tensor->dtype))
            faults.push_back(no_float(name, tensor->dtype));
    if (!faults.empty()) refuse_tensors(path, faults);
}

}  // namespace vimcore
