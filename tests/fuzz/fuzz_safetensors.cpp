// SPDX-License-Identifier: Apache-2.0
// Bytes as a weight file: parsed; where it holds a network, loaded and, if small, run. Only vimcore::Error may come
// out.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

// A file in memory that keeps its place: /proc/self/fd/N.
struct MemoryFile {
    int descriptor = ::memfd_create("fuzz", 0);
    std::string path = "/proc/self/fd/" + std::to_string(descriptor);
    void write(const std::uint8_t* data, std::size_t size) const
    {
        if (::ftruncate(descriptor, 0) != 0 || ::pwrite(descriptor, data, size, 0) != static_cast<::ssize_t>(size))
            std::abort();
    }
};

// Every byte that a tensor claims is there, and inside the file.
void touch(const SafetensorsFile& file, const std::uint8_t* data, std::size_t size)
{
    std::size_t total = 0;
    for (const auto& [name, tensor] : file.tensors()) {
        if (file.find(name) != &tensor) std::abort();
        const auto* begin = tensor.as<std::uint8_t>();
        if (tensor.numel() < 0 || begin < data || begin + tensor.bytes() > data + size) std::abort();
        total += tensor.bytes();
    }
    if (total > size) std::abort();
}

void run_network(const std::string& path, const Config& config)
{
    const auto model = Model::load(path);
    const auto labels = labels_of(config, model->metadata());
    const auto steps = preprocess_of(config, model->metadata());
    if (steps && steps->crop_height != config.img_height) std::abort();
    Session session(model, {.max_batch = 2, .threads = 1});
    const std::vector<float> images(
        static_cast<std::size_t>(2 * config.in_chans * config.img_height * config.img_width), 0.5f);
    const std::vector<float> logits = session.run(images.data(), 2);
    // Two equal images have equal logits, bit for bit.
    if (std::memcmp(logits.data(), logits.data() + logits.size() / 2, logits.size() / 2 * sizeof(float)) != 0)
        std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    static const MemoryFile memory;
    try {
        const SafetensorsFile file = SafetensorsFile::parse(data, size);
        touch(file, data, size);
        const auto found = file.metadata().find("vimcore.config");
        if (found == file.metadata().end()) return 0;
        memory.write(data, size);
        Config config;
        try {
            config = Config::from_json(found->second);
        } catch (const std::invalid_argument&) {
            Model::load(memory.path);  // says the same as vimcore::Error
            std::abort();
        }
        if (weight_bytes(config) > (1 << 20) || config.flops() > 1000000 || config.depth > 8 ||
            config.in_chans * config.img_height * config.img_width > (1 << 16))
            return 0;
        run_network(memory.path, config);
    } catch (const Error&) {
    }
    return 0;
}
