// SPDX-License-Identifier: Apache-2.0
// Bytes as JSON: as any document, as a Config, as a Preprocess and as the task of a segmentation file. What was
// accepted is written and read to the same.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "files/json.h"
#include "vimcore/config.h"
#include "vimcore/error.h"
#include "vimcore/image.h"
#include "vimcore/segment.h"

using namespace vimcore;

namespace {

template <class F>
void accept(F&& f)
{
    try {
        f();
    } catch (const std::invalid_argument&) {
    } catch (const Error&) {
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const std::string text(reinterpret_cast<const char*>(data), size);
    bool valid = false;
    accept([&] {
        const json::Value value = json::parse(text);
        valid = true;
        if (value.kind == json::Kind::string && json::parse(json::quote(value.string)).string != value.string)
            std::abort();
    });
    accept([&] {
        const Config config = Config::from_json(text);
        if (!valid || Config::from_json(config.to_json()).to_json() != config.to_json()) std::abort();
        if (config.tokens() < 1 || config.flops() < 1) std::abort();
    });
    accept([&] {
        const Preprocess steps = Preprocess::from_json(text);
        if (!valid || Preprocess::from_json(steps.to_json()).to_json() != steps.to_json()) std::abort();
    });
    accept([&] {
        static const std::string config = R"({"img_size": [32, 48], "num_classes": 0, "depth": 4})";
        const auto file = SegmentationFile::describe({{"vimcore.config", config}, {"vimcore.task", text}}, "a");
        if (!valid || file.classes.empty() || file.classes.size() != file.palette.size()) std::abort();
        if (file.stride_height < 1 || file.stride_height > file.window_height) std::abort();
        if (file.flops() < 1 || file.head_parameters() < 1) std::abort();
    });
    const std::string shown = json::printable(text, 100);
    if (!json::is_utf8(shown) || shown.size() > 100 * 4 + 3) std::abort();
    return 0;
}
