// SPDX-License-Identifier: Apache-2.0
// The metadata key vimcore.task of a file, hostile until every value has been checked. The same rules as
// python/vimcore/weights/task.py and dense.py.
#include <algorithm>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "files/json.h"
#include "vimcore/error.h"
#include "vimcore/model_file.h"
#include "vimcore/preprocess.h"
#include "vimcore/segment.h"

namespace vimcore {
namespace {

using HeadKind = SegmentationFile::Head;

constexpr std::int64_t most_classes = 255, most_channels = 1 << 16, most_convs = 256, most_side = 1 << 20;

[[noreturn]] void refuse_file(const std::string& path, const std::string& what)
{
    throw Error("[load] " + json::printable(path, 1000) + ": " + what);
}

[[noreturn]] void wrong(const std::string& what) { throw std::invalid_argument(what); }

// The values of an object that are asked for by name; what was not asked for is an error at the end.
class Fields {
public:
    Fields(const json::Value& object, const std::string& what) : object_(object), what_(what)
    {
        object.require_object(what);
    }
    const json::Value& required(const char* key)
    {
        const json::Value* value = optional(key);
        if (!value) wrong(std::string(key) + ": missing");
        return *value;
    }
    const json::Value* optional(const char* key)
    {
        taken_.insert(key);
        return object_.find(key);
    }
    void finish() const
    {
        for (const std::string& key : object_.keys)
            if (!taken_.count(key))
                wrong(what_ + ": " + json::quote(json::printable(key)) + " is unknown; written by a later version?");
    }

private:
    const json::Value& object_;
    std::string what_;
    std::set<std::string_view> taken_;
};

std::int64_t integer_in(const json::Value& value, const std::string& what, std::int64_t low, std::int64_t high)
{
    const std::int64_t number = value.as_integer(what);
    if (number < low || number > high)
        wrong(what + ": expected " + std::to_string(low) + " to " + std::to_string(high) + ", got " +
              std::to_string(number));
    return number;
}

std::pair<std::int64_t, std::int64_t> sides_in(const json::Value& value, const std::string& what)
{
    const auto& items = value.as_array(what);
    if (items.size() != 2) wrong(what + ": expected a list of 2, got " + std::to_string(items.size()));
    return {integer_in(items[0], what, 1, most_side), integer_in(items[1], what, 1, most_side)};
}

void read_classes(const json::Value& value, std::vector<std::string>& classes)
{
    const auto& items = value.as_array("classes");
    if (items.empty() || static_cast<std::int64_t>(items.size()) > most_classes)
        wrong("classes: expected 1 to 255 names, got " + std::to_string(items.size()));
    for (const json::Value& item : items) classes.push_back(item.as_string("classes"));
}

void read_palette(const json::Value& value, std::size_t classes, std::vector<Colour>& palette)
{
    const auto& items = value.as_array("palette");
    if (items.size() != classes)
        wrong("palette: expected " + std::to_string(classes) + " colours, one for each class, got " +
              std::to_string(items.size()));
    for (const json::Value& item : items) {
        const auto& parts = item.as_array("palette");
        if (parts.size() != 3) wrong("palette: expected [red, green, blue], got " + std::to_string(parts.size()));
        Colour colour;
        for (std::size_t i = 0; i < 3; i++)
            colour[i] = static_cast<std::uint8_t>(integer_in(parts[i], "palette", 0, 255));
        palette.push_back(colour);
    }
}

bool is_absent(const json::Value* value) { return !value || value->kind == json::Kind::null; }

// Four layers, counted from the first; none given: the last of each quarter, of a pair its second.
void read_indices(const json::Value* value, const Config& config, std::vector<std::int64_t>& indices)
{
    const std::int64_t depth = config.depth;
    const bool pairs = config.directions == Directions::block;
    if (is_absent(value)) {
        const std::int64_t step = pairs ? 2 : 1;
        for (std::int64_t i = 1; i <= 4; i++)
            indices.push_back(std::max((depth * i / 4 + step - 1) / step * step, step) - 1);
        return;
    }
    const auto& items = value->as_array("indices");
    if (items.size() != 4) wrong("indices: expected four layers, got " + std::to_string(items.size()));
    for (const json::Value& item : items) {
        const std::int64_t index = (integer_in(item, "indices", -depth, depth - 1) + depth) % depth;
        if (pairs && index % 2 == 0)
            wrong("indices: with directions=\"block\" only odd layers have outputs, got " + std::to_string(index));
        indices.push_back(index);
    }
}

void read_options(const json::Value& value, SegmentationFile& file)
{
    const Config& config = file.config;
    Fields options(value, "options");
    const auto text = [&](const char* key, const char* usual, const char* other) {
        const json::Value* found = options.optional(key);
        if (!found) return false;
        const std::string& given = found->as_string(key);
        if (given != usual && given != other)
            wrong(std::string(key) + ": expected \"" + usual + "\" or \"" + other + "\", got \"" +
                  json::printable(given) + '"');
        return given == other;
    };
    const json::Value* channels = options.optional("channels");
    file.channels = is_absent(channels) ? config.embed_dim : integer_in(*channels, "channels", 1, most_channels);
    file.group_norm = text("head_norm", "batch", "group");
    if (const json::Value* dropout = options.optional("dropout")) {
        const double share = dropout->as_real("dropout");
        if (!(share >= 0 && share < 1)) wrong("dropout: expected 0 to below 1, got " + json::number(share));
    }
    if (file.head == HeadKind::uper) {
        read_indices(options.optional("indices"), config, file.indices);
        if (const json::Value* aux = options.optional("aux")) aux->as_boolean("aux");
        if (text("taps", "stream", "mixer")) file.taps = SegmentationFile::Taps::mixer;
        const bool first = std::count(file.indices.begin(), file.indices.end(), 0) > 0;
        if (file.taps == SegmentationFile::Taps::mixer && (first || config.directions == Directions::block))
            wrong("taps: \"mixer\" needs the layer before, which the first and pairs of \"block\" lack");
        if (config.patch_size != 4 && config.patch_size != 8 && config.patch_size != 16)
            wrong("head \"uper\" stands on patches of 4, 8 or 16 pixels, got " + std::to_string(config.patch_size));
    } else {
        const json::Value* convs = options.optional("convs");
        file.convs = convs ? integer_in(*convs, "convs", 0, most_convs) : 2;
        if ((file.convs == 0) != (file.head == HeadKind::linear))
            wrong(std::string("convs: expected ") + (file.convs == 0 ? "1 or more" : "0") + " of head \"" +
                  name_of(file.head) + '"');
        if (file.head == HeadKind::linear && file.channels != config.embed_dim)
            wrong("channels: without convolutions they are the backbone's " + std::to_string(config.embed_dim) +
                  ", got " + std::to_string(file.channels));
    }
    options.finish();
}

HeadKind head_of(const std::string& name)
{
    for (const HeadKind head : {HeadKind::linear, HeadKind::fcn, HeadKind::uper})
        if (name == name_of(head)) return head;
    if (name == "segmenter")
        wrong(
            "head: \"segmenter\" needs attention, which only Python has: `vimcore predict`, "
            "vimcore.segmentation.load");
    wrong("head: expected \"linear\", \"fcn\", \"uper\" or \"segmenter\", got \"" + json::printable(name) + '"');
}

void read_task(const json::Value& root, SegmentationFile& file)
{
    const Config& config = file.config;
    Fields fields(root, "the object");
    fields.required("task");
    file.head = head_of(fields.required("head").as_string("head"));
    read_classes(fields.required("classes"), file.classes);
    read_palette(fields.required("palette"), file.classes.size(), file.palette);
    std::tie(file.window_height, file.window_width) = sides_in(fields.required("window"), "window");
    std::tie(file.stride_height, file.stride_width) = sides_in(fields.required("stride"), "stride");
    if (file.stride_height > file.window_height || file.stride_width > file.window_width)
        wrong("stride: " + to_string(Shape{file.stride_height, file.stride_width}) +
              " leaves gaps between windows of " + to_string(Shape{file.window_height, file.window_width}));
    if (const json::Value& resize = fields.required("resize"); resize.kind != json::Kind::null) {
        const auto [small, large] = sides_in(resize, "resize");
        if (small > large) wrong("resize: expected [short, long], got " + to_string(Shape{small, large}));
        file.resize = {small, large};
    }
    if (config.num_classes != 0)
        wrong("the backbone has a head of " + std::to_string(config.num_classes) + " classes, expected none");
    if (config.frames > 0 || config.neck_reduction > 1)
        wrong("the backbone takes clips or has a neck, which go with classification only");
    if (config.stride != config.patch_size || config.img_height % config.patch_size ||
        config.img_width % config.patch_size)
        wrong("patches of " + std::to_string(config.patch_size) + " every " + std::to_string(config.stride) +
              " pixels do not tile the images of the backbone");
    if (file.window_height % config.patch_size || file.window_width % config.patch_size)
        wrong("window: expected multiples of the patch, " + std::to_string(config.patch_size) + " pixels, got " +
              to_string(Shape{file.window_height, file.window_width}));
    config.at_size(file.window_height, file.window_width);  // which says what is too large
    read_options(fields.required("options"), file);
    fields.finish();
}

}  // namespace

const char* name_of(SegmentationFile::Head head)
{
    switch (head) {
        case HeadKind::linear:
            return "linear";
        case HeadKind::fcn:
            return "fcn";
        case HeadKind::uper:
            return "uper";
    }
    throw std::invalid_argument("[segment] head: unknown");
}

SegmentationFile SegmentationFile::describe(const std::map<std::string, std::string>& metadata, const std::string& path)
{
    const ModelFile basis = ModelFile::describe(metadata, path);
    const std::string task = task_of(metadata, path);
    if (task == "classify")
        refuse_file(path, "a network for classification, which has no head for pixels; `vim-infer predict` runs it");
    if (task != "segment")
        refuse_file(path, "a network for the task \"" + json::printable(task) +
                              "\", expected one for \"segment\"; `vimcore predict` runs it");
    SegmentationFile file;
    file.config = basis.config;
    try {
        read_task(json::parse(metadata.at("vimcore.task")), file);
    } catch (const std::invalid_argument& error) {
        refuse_file(path, std::string("vimcore.task: ") + error.what());
    }
    const std::optional<Preprocess> steps = basis.preprocess ? basis.preprocess : default_preprocess(file.config);
    if (steps) {
        file.mean = steps->mean;
        file.std = steps->std;
        if (static_cast<std::int64_t>(file.mean.size()) != file.config.in_chans)
            refuse_file(path, "vimcore.preprocess: the network takes " + std::to_string(file.config.in_chans) +
                                  " channels, its preprocessing gives " + std::to_string(file.mean.size()));
    }
    return file;
}

}  // namespace vimcore
