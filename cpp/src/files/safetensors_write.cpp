// SPDX-License-Identifier: Apache-2.0
// Crash-safe writing.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "files/json.h"
#include "files/safetensors_format.h"
#include "vimcore/atomic_file.h"
#include "vimcore/safetensors.h"

namespace vimcore {
namespace {

using Named = std::pair<std::string, Tensor>;

using namespace safetensors;

void check_names(const std::vector<Named>& tensors)
{
    std::set<std::string_view> seen;
    for (const auto& [name, tensor] : tensors) {
        const std::string who = "[save_safetensors] tensor \"" + json::printable(name) + "\"";
        if (!json::is_utf8(name)) throw std::invalid_argument(who + ": name is not valid UTF-8");
        if (name == "__metadata__") throw std::invalid_argument(who + ": reserved name");
        if (name.size() > max_name) throw std::invalid_argument(who + ": name longer than 4096 bytes");
        if (!seen.insert(name).second) throw std::invalid_argument(who + ": given twice");
        if (tensor.device.type != Device::Type::cpu)
            throw std::invalid_argument(who + ": expected cpu memory, got " + describe(tensor));
        if (tensor.dtype == DType::bf16_panels)
            throw std::invalid_argument(who + ": " + describe(tensor) +
                                        " has an order that files do not; load the model without ModelOptions::only");
        if (!tensor.data && tensor.numel() > 0) throw std::invalid_argument(who + ": has no data");
    }
}

std::string make_header(const std::vector<const Named*>& tensors, const std::map<std::string, std::string>& metadata)
{
    std::string header = "{";
    const auto key = [&](const std::string& name) {
        if (header.size() > 1) header += ',';
        header += json::quote(name) + ':';
    };
    if (!metadata.empty()) {
        key("__metadata__");
        char separator = '{';
        for (const auto& [name, text] : metadata) {
            header += separator + json::quote(name) + ':' + json::quote(text);
            separator = ',';
        }
        header += '}';
    }
    std::size_t at = 0;
    for (const Named* named : tensors) {
        const Tensor& tensor = named->second;
        key(named->first);
        header += "{\"dtype\":\"" + format_name(tensor.dtype) + "\",\"shape\":[";
        for (int axis = 0; axis < tensor.shape.rank(); ++axis) {
            if (axis > 0) header += ',';
            header += std::to_string(tensor.shape[axis]);
        }
        header += "],\"data_offsets\":[" + std::to_string(at) + ',' + std::to_string(at + tensor.bytes()) + "]}";
        at += tensor.bytes();
    }
    header += '}';
    // Data starts on a multiple of 64, so that a mapped file can be used in place by vector code.
    header.append((64 - (header.size() + 8) % 64) % 64, ' ');
    if (header.size() > max_header) throw std::invalid_argument("[save_safetensors] header is longer than 100 MB");
    return header;
}

}  // namespace

void save_safetensors(const std::string& path, const std::vector<Named>& tensors,
                      const std::map<std::string, std::string>& metadata)
{
    check_names(tensors);
    // Wider types first: every tensor is then aligned to its element.
    std::vector<const Named*> order;
    for (const Named& named : tensors) order.push_back(&named);
    std::stable_sort(order.begin(), order.end(), [](const Named* a, const Named* b) {
        return size_of(a->second.dtype) > size_of(b->second.dtype);
    });
    const std::string header = make_header(order, metadata);

    AtomicFile writer("save_safetensors", path);
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> 8 * i);
    writer.write(length, sizeof length);
    writer.write(header.data(), header.size());
    for (const Named* named : order) writer.write(named->second.data, named->second.bytes());
    writer.commit();
}

}  // namespace vimcore
