// SPDX-License-Identifier: Apache-2.0
// Networks for segmentation from files: windows put together as naive loops do it, the C interface, what files may not
// say. That logits are those of the torch module is tested in Python.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "files.h"
#include "vimcore/c_api.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

struct Made {
    Config config;
    std::map<std::string, std::string> metadata;
    std::map<std::string, std::pair<Shape, std::vector<float>>> head;

    void save(const std::string& path) const
    {
        Weights weights(config);
        initialize(config, weights.params, 1);
        std::vector<std::pair<std::string, Tensor>> tensors;
        for_each_param(config, std::as_const(weights.params),
                       [&](const std::string& name, const Tensor& tensor, const Shape&) {
                           tensors.emplace_back("backbone." + name, tensor);
                       });
        for (const auto& [name, tensor] : head)
            tensors.push_back({name, {const_cast<float*>(tensor.second.data()), tensor.first, DType::f32, {}}});
        save_safetensors(path, tensors, metadata);
    }
    void add(const std::string& name, const Shape& shape)
    {
        static unsigned state = 1;
        std::vector<float> values(static_cast<std::size_t>(shape.numel()));
        for (float& value : values) {
            state = state * 1664525u + 1013904223u;
            value = static_cast<float>(state >> 8) / 8388608.0f - (name.ends_with("var") ? 0.0f : 1.0f);
        }
        head[name] = {shape, values};
    }
};

constexpr const char* task =
    R"({"task": "segment", "head": "fcn", "options": {"channels": 12, "convs": 1, "head_norm": "batch", "dropout": 0.1},
"classes": ["sky", "tree", "2", "road"], "palette": [[0, 0, 0], [255, 1, 2], [3, 4, 5], [6, 7, 8]], "window": [24, 32],
"stride": [16, 20], "resize": null})";

Made made()
{
    Made m;
    m.config.img_height = 24;
    m.config.img_width = 32;
    m.config.patch_size = m.config.stride = 8;
    m.config.embed_dim = 16;
    m.config.depth = 2;
    m.config.num_classes = 0;
    m.metadata = {{"vimcore.config", m.config.to_json()}, {"vimcore.task", task}};
    m.add("decode_head.convs.0.conv.weight", {12, 16, 3, 3});
    for (const char* name : {"weight", "bias", "running_mean", "running_var"})
        m.add(std::string("decode_head.convs.0.bn.") + name, {12});
    m.add("decode_head.conv_seg.weight", {4, 12, 1, 1});
    m.add("decode_head.conv_seg.bias", {4});
    m.add("auxiliary_head.conv_seg.bias", {7});
    return m;
}

std::string replaced(std::string text, const std::string& part, const std::string& by)
{
    CHECK(text.find(part) != std::string::npos);
    return text.replace(text.find(part), part.size(), by);
}

Image picture(std::int64_t height, std::int64_t width)
{
    Image image{height, width, std::vector<std::uint8_t>(static_cast<std::size_t>(height * width * 3))};
    unsigned state = static_cast<unsigned>(height * 100 + width);
    for (std::uint8_t& value : image.pixels) value = static_cast<std::uint8_t>((state = state * 1664525u + 1) >> 24);
    return image;
}

// ---- windows
// ---------------------------------------------------------------------------------------------------------

double linear(std::int64_t i, std::int64_t from, std::int64_t to)
{
    const double at = (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    return std::clamp(at, 0.0, static_cast<double>(from - 1));
}

// Logits of a picture, by windows that are run one at a time.
std::vector<double> naive(SegmentationSession& session, const SegmentationFile& about, const Image& original)
{
    const auto classes = static_cast<std::int64_t>(about.classes.size());
    Image image = original;
    if (about.resize) {
        const double scale = std::min(
            static_cast<double>(about.resize->long_side) / static_cast<double>(std::max(image.height, image.width)),
            static_cast<double>(about.resize->short_side) / static_cast<double>(std::min(image.height, image.width)));
        image = resize_linear(image, static_cast<std::int64_t>(static_cast<double>(image.height) * scale + 0.5),
                              static_cast<std::int64_t>(static_cast<double>(image.width) * scale + 0.5));
    }
    const std::int64_t h = about.window_height, w = about.window_width, H = image.height, W = image.width;
    std::vector<double> sum(static_cast<std::size_t>(H * W * classes)), count(static_cast<std::size_t>(H * W));
    const auto windows = [](std::int64_t length, std::int64_t window, std::int64_t stride) {
        return std::max<std::int64_t>(length - window + stride - 1, 0) / stride + 1;
    };
    for (std::int64_t a = 0; a < windows(H, h, about.stride_height); a++)
        for (std::int64_t b = 0; b < windows(W, w, about.stride_width); b++) {
            const std::int64_t top = std::min(a * about.stride_height, std::max<std::int64_t>(H - h, 0));
            const std::int64_t left = std::min(b * about.stride_width, std::max<std::int64_t>(W - w, 0));
            std::vector<float> pixels(static_cast<std::size_t>(3 * h * w), 0.0f),
                logits(static_cast<std::size_t>(classes * h * w));
            const auto each = [&](auto&& f) {
                for (std::int64_t y = 0; y < std::min(h, H - top); y++)
                    for (std::int64_t x = 0; x < std::min(w, W - left); x++) f(y, x, (top + y) * W + left + x);
            };
            each([&](std::int64_t y, std::int64_t x, std::int64_t at) {
                for (std::size_t c = 0; c < 3; c++)
                    pixels[(c * static_cast<std::size_t>(h) + static_cast<std::size_t>(y)) *
                               static_cast<std::size_t>(w) +
                           static_cast<std::size_t>(x)] =
                        (static_cast<float>(image.pixels[static_cast<std::size_t>(at) * 3 + c]) / 255.0f -
                         static_cast<float>(about.mean[c])) /
                        static_cast<float>(about.std[c]);
            });
            session.logits(pixels.data(), 1, logits.data());
            each([&](std::int64_t y, std::int64_t x, std::int64_t at) {
                for (std::int64_t c = 0; c < classes; c++)
                    sum[static_cast<std::size_t>(at * classes + c)] +=
                        logits[static_cast<std::size_t>((c * h + y) * w + x)];
                count[static_cast<std::size_t>(at)]++;
            });
        }
    for (std::size_t i = 0; i < sum.size(); i++) sum[i] /= count[i / static_cast<std::size_t>(classes)];
    std::vector<double> out;
    for (std::int64_t y = 0; y < original.height; y++)
        for (std::int64_t x = 0; x < original.width; x++)
            for (std::int64_t c = 0; c < classes; c++) {
                const double r = linear(y, H, original.height), s = linear(x, W, original.width);
                const auto i = static_cast<std::int64_t>(r), j = static_cast<std::int64_t>(s);
                const auto value = [&](std::int64_t p, std::int64_t q) {
                    return sum[static_cast<std::size_t>((std::min(p, H - 1) * W + std::min(q, W - 1)) * classes + c)];
                };
                const double p = r - static_cast<double>(i), q = s - static_cast<double>(j);
                out.push_back((1 - p) * ((1 - q) * value(i, j) + q * value(i, j + 1)) +
                              p * ((1 - q) * value(i + 1, j) + q * value(i + 1, j + 1)));
            }
    return out;
}

// Where classes differ, the logits are as good as equal.
void check_classes(const ClassMap& map, const std::vector<double>& logits, std::int64_t classes)
{
    for (std::size_t i = 0; i < map.classes.size(); i++) {
        const double* row = logits.data() + i * static_cast<std::size_t>(classes);
        CHECK_CLOSE(row[map.classes[i]], *std::max_element(row, row + classes), 1e-5);
    }
}

void test_windows(const std::string& path)
{
    Made m = made();
    const std::pair<std::string, std::string> changes[] = {
        {"", ""},
        {"\"resize\": null", "\"resize\": [40, 70]"},
        {"\"stride\": [16, 20]", "\"stride\": [5, 32]"},
        {"\"window\": [24, 32],\n\"stride\": [16, 20]", "\"window\": [8, 40],\n\"stride\": [1, 3]"},
    };
    for (const auto& [part, by] : changes) {
        m.metadata["vimcore.task"] = replaced(task, part, by);
        m.save(path);
        const auto model = SegmentationModel::load(path);
        SegmentationSession session(model, 1), three(model, 3);
        for (const auto& [h, w] :
             std::vector<std::pair<int, int>>{{24, 32}, {10, 14}, {24, 33}, {61, 20}, {57, 90}, {1, 1}}) {
            const Image image = picture(h, w);
            const ClassMap map = session.segment(image);
            CHECK(map.height == h && map.width == w);
            check_classes(map, naive(session, model->about(), image), 4);
            CHECK(three.segment(image).classes == map.classes);
        }
    }
}

void test_batches(const std::string& path)
{
    made().save(path);
    const auto model = SegmentationModel::load(path);
    CHECK(model->about().head == SegmentationFile::Head::fcn && model->about().classes[3] == "road");
    CHECK(model->about().head_parameters() == 12 * 16 * 9 + 24 + 4 * 12 + 4);
    CHECK(model->about().flops() == model->about().config.flops() + 12 * (12 * 16 * 9 + 48));
    const std::int64_t pixels = 24 * 32;
    std::vector<float> images(static_cast<std::size_t>(5 * 3 * pixels)),
        logits(static_cast<std::size_t>(5 * 4 * pixels));
    for (std::size_t i = 0; i < images.size(); i++) images[i] = static_cast<float>(i * 7919 % 1000) / 500.0f - 1.0f;
    std::vector<std::uint8_t> classes(static_cast<std::size_t>(5 * pixels));
    for (const int threads : {1, 2, 4}) {
        SegmentationSession session(model, threads);
        const auto run = [&] {
            for (const std::int64_t batch : {5, 1, 3}) {
                session.classes(images.data(), batch, classes.data());
                session.logits(images.data(), batch, logits.data());
            }
        };
        run(), run();
        const long warm = allocations;
        run(), run();
        CHECK(allocations == warm);
        session.classes(images.data(), 5, classes.data());
        std::vector<float> one(logits.size());
        session.logits(images.data(), 5, logits.data());
        for (std::int64_t b = 0; b < 5; b++)
            session.logits(images.data() + b * 3 * pixels, 1, one.data() + b * 4 * pixels);
        CHECK(one == logits);
        for (std::int64_t i = 0; i < 5 * pixels; i++) {
            std::int64_t best = 0;
            const auto value = [&](std::int64_t c) {
                return logits[static_cast<std::size_t>((i / pixels * 4 + c) * pixels + i % pixels)];
            };
            for (std::int64_t c = 1; c < 4; c++)
                if (value(c) > value(best)) best = c;
            CHECK(classes[static_cast<std::size_t>(i)] == best);
        }
        CHECK_THROWS(session.logits(images.data(), -1, logits.data()), std::invalid_argument);
        CHECK_THROWS(session.segment(Image{0, 3, {}}), std::invalid_argument);
        CHECK_THROWS(session.segment(Image{2, 2, std::vector<std::uint8_t>(11)}), std::invalid_argument);
    }
    CHECK_THROWS(SegmentationSession(nullptr), std::invalid_argument);
    CHECK_THROWS(SegmentationModel::load(path, Device::cuda()), std::invalid_argument);
}

// ---- files
// -----------------------------------------------------------------------------------------------------------

void test_hostile(const std::string& path)
{
    const auto refused = [&](const Made& m, const std::string& said) {
        m.save(path);
        CHECK(contains(message_of<Error>([&] { SegmentationModel::load(path); }), said));
    };
    const auto with_task = [&](const std::string& part, const std::string& by, const std::string& said) {
        Made m = made();
        m.metadata["vimcore.task"] = replaced(task, part, by);
        refused(m, said);
    };
    with_task("\"segment\"", "\"detect\"", "expected one for \"segment\"");
    with_task("\"segment\"", "7", "task: expected");
    with_task("{\"task\"", "[{\"task\"", "vimcore.task: ");
    with_task("\"fcn\"", "\"segmenter\"", "`vimcore predict`");
    with_task("\"fcn\"", "\"deeplab\"", "expected \"linear\", \"fcn\", \"uper\" or \"segmenter\"");
    with_task("\"fcn\"", "\"linear\"", "convs: expected 0");
    with_task("\"convs\": 1", "\"convs\": 0", "convs: expected 1 or more");
    with_task("\"convs\": 1", "\"convs\": 1e3", "convs: expected");
    with_task("\"convs\": 1", "\"convs\": 257", "convs: expected 0 to 256");
    with_task("\"convs\": 1", "\"depth\": 1", "\"depth\" is unknown");
    with_task("\"channels\": 12", "\"channels\": 100000", "channels: expected 1 to 65536");
    with_task("\"channels\": 12", "\"channels\": 13", "decode_head.conv_seg.weight: expected (4, 13, 1, 1)");
    with_task("\"batch\"", "\"layer\"", "head_norm: expected \"batch\" or \"group\"");
    with_task("\"batch\"", "\"group\"", "missing: decode_head.convs.0.gn.weight");
    with_task("\"dropout\": 0.1", "\"dropout\": 1", "dropout: expected 0 to below 1");
    with_task("[255, 1, 2], ", "", "palette: expected 4 colours");
    with_task("[255, 1, 2]", "[256, 1, 2]", "palette: expected 0 to 255, got 256");
    with_task("[255, 1, 2]", "[1, 2]", "palette: expected [red, green, blue]");
    with_task("[\"sky\"", "[3", "classes: expected");
    with_task("[24, 32]", "[24, 33]", "window: expected multiples of the patch");
    with_task("[24, 32]", "[24]", "window: expected a list of 2");
    with_task("[24, 32]", "[1048584, 8]", "window: expected 1 to 1048576");
    with_task("[24, 32]", "[524288, 524288]", "vimcore.task: [config] img_size");
    with_task("[16, 20]", "[25, 20]", "leaves gaps");
    with_task("[16, 20]", "[0, 20]", "stride: expected 1 to");
    with_task("\"resize\": null", "\"resize\": [3, 2]", "[short, long]");
    with_task(", \"resize\": null", "", "resize: missing");
    with_task("\"resize\": null", "\"resize\": null, \"more\": 1", "\"more\" is unknown");
    with_task("\"fcn\", \"options\": {\"channels\": 12, \"convs\": 1,",
              "\"uper\", \"options\": {\"indices\": [0, 1, 1], ", "indices: expected four layers");
    with_task("\"fcn\", \"options\": {\"channels\": 12, \"convs\": 1,",
              "\"uper\", \"options\": {\"indices\": [0, 1, 1, 2], ", "indices: expected -2 to 1");
    with_task("\"fcn\", \"options\": {\"channels\": 12, \"convs\": 1,", "\"uper\", \"options\": {\"taps\": \"mixer\", ",
              "taps: \"mixer\" needs");
    with_task("\"fcn\", \"options\": {\"channels\": 12, \"convs\": 1,", "\"uper\", \"options\": {",
              "missing: backbone.fpn1.0.weight (16, 16, 2, 2)");

    Made m = made();
    m.metadata.erase("vimcore.task");
    refused(m, "`vim-infer predict` runs it");
    m = made();
    m.config.num_classes = 4;
    m.metadata["vimcore.config"] = m.config.to_json();
    refused(m, "a head of 4 classes");
    m = made();
    m.config.img_width = 36;
    m.metadata["vimcore.config"] = m.config.to_json();
    refused(m, "do not tile");
    m = made();
    m.metadata["vimcore.preprocess"] = R"({"mean": [0.5], "std": [0.5]})";
    refused(m, "takes 3 channels, its preprocessing gives 1");
    m = made();
    m.head["decode_head.convs.0.bn.running_var"].second[3] = -1;
    refused(m, "running_var: expected numbers of at least 0");
    m.head["decode_head.convs.0.bn.running_var"].second[3] = std::nanf("");
    refused(m, "running_var: expected numbers of at least 0");
    m = made();
    m.add("decode_head.more", {2});
    refused(m, "unexpected: decode_head.more (2,)");

    m = made();  // weights that are no numbers show in what they give
    m.head["decode_head.conv_seg.bias"].second[2] = std::numeric_limits<float>::infinity();
    m.save(path);
    SegmentationSession session(SegmentationModel::load(path), 1);
    CHECK(contains(message_of<Error>([&] { session.segment(picture(30, 30)); }), "not finite"));

    m = made();
    m.save(path);
    CHECK(contains(message_of<Error>([&] { Model::load(path); }), "`vim-infer segment`"));
    m.metadata["vimcore.task"] = replaced(task, "[16, 20]", "[1, 1]");
    m.save(path);
    SegmentationSession fine(SegmentationModel::load(path), 1);
    CHECK(contains(message_of<std::invalid_argument>([&] { fine.segment(picture(400, 400)); }), "windows, expected"));
    m.metadata["vimcore.task"] = replaced(task, "\"resize\": null", "\"resize\": [1048576, 1048576]");
    m.save(path);
    SegmentationSession large(SegmentationModel::load(path), 1);
    CHECK(contains(message_of<std::invalid_argument>([&] { large.segment(picture(4, 4)); }), "more than 65535"));
}

// ---- results, C
// ------------------------------------------------------------------------------------------------------

void test_results(const Folder& folder)
{
    const ClassMap map{2, 3, {2, 1, 1, 0, 2, 3}};
    const std::vector<Colour> palette = {{0, 0, 0}, {255, 1, 2}, {3, 4, 5}, {6, 7, 8}};
    const std::vector<Area> areas = areas_of(map);
    CHECK(areas.size() == 4 && areas[0].index == 1 && areas[0].pixels == 2 && areas[1].index == 2 &&
          areas[3].index == 3);
    const Image image = picture(2, 3), mixed = overlay(image, map, palette);
    for (std::size_t i = 0; i < 18; i++)
        CHECK(mixed.pixels[i] == (image.pixels[i] + palette[map.classes[i / 3]][i % 3]) / 2);
    CHECK_THROWS(overlay(picture(3, 2), map, palette), std::invalid_argument);
    CHECK_THROWS(overlay(image, map, {palette[0], palette[1]}), std::invalid_argument);
    const std::string png = folder.file("map.png"), jpeg = folder.file("mixed.jpg");
    if (has_png()) {
        save_class_png(png, map, palette);
        const Image read = decode_image(png);
        CHECK(read.height == 2 && read.width == 3);
        for (std::size_t i = 0; i < 18; i++) CHECK(read.pixels[i] == palette[map.classes[i / 3]][i % 3]);
        CHECK_THROWS(save_class_png(png, map, {}), std::invalid_argument);
        CHECK(contains(message_of<Error>([&] { save_class_png(folder.file("no/map.png"), map, palette); }),
                       "cannot create"));
    } else {
        CHECK(contains(message_of<Error>([&] { save_class_png(png, map, palette); }), "without libpng"));
    }
    if (has_jpeg()) {
        const Image flat{20, 30, std::vector<std::uint8_t>(1800, 90)};
        save_jpeg(jpeg, flat);
        const Image read = decode_image(jpeg);
        CHECK(read.height == 20 && read.width == 30);
        for (const std::uint8_t value : read.pixels) CHECK(std::abs(value - 90) <= 1);
        CHECK_THROWS(save_jpeg(jpeg, flat, 0), std::invalid_argument);
        CHECK_THROWS(save_jpeg(jpeg, Image{70000, 1, std::vector<std::uint8_t>(210000)}), std::invalid_argument);
    } else {
        CHECK(contains(message_of<Error>([&] { save_jpeg(jpeg, image); }), "without libjpeg"));
    }
    const Image half = resize_linear(Image{1, 2, {0, 10, 20, 100, 110, 120}}, 2, 4);
    const std::uint8_t expected[] = {0, 10, 20, 25, 35, 45, 75, 85, 95, 100, 110, 120};
    CHECK(half.pixels.size() == 24 && std::memcmp(half.pixels.data(), expected, 12) == 0 &&
          std::memcmp(half.pixels.data() + 12, expected, 12) == 0);
    CHECK_THROWS(resize_linear(image, 0, 3), std::invalid_argument);
}

bool says(vimcore_status status, vimcore_status expected, const char* part)
{
    return status == expected && contains(vimcore_last_error(), part);
}

void test_c(const Folder& folder)
{
    const std::string path = folder.file("c.safetensors"), file = folder.file("a.ppm");
    made().save(path);
    const Image image = picture(40, 31);
    std::ofstream(file, std::ios::binary) << "P6 31 40 255 " << std::string(image.pixels.begin(), image.pixels.end());
    vimcore_segmentation* model = nullptr;
    vimcore_segmentation_session* session = nullptr;
    vimcore_segmentation_info info;
    CHECK(says(vimcore_segmentation_load("no such file", &model), VIMCORE_FAILED, "no such file") && !model);
    CHECK(says(vimcore_segmentation_load(nullptr, &model), VIMCORE_INVALID_ARGUMENT, "path"));
    CHECK(says(vimcore_segmentation_get_info(nullptr, &info), VIMCORE_INVALID_ARGUMENT, "NULL"));
    CHECK(vimcore_segmentation_load(path.c_str(), &model) == VIMCORE_OK);
    CHECK(vimcore_segmentation_get_info(model, &info) == VIMCORE_OK);
    CHECK(info.channels == 3 && info.height == 24 && info.width == 32 && info.classes == 4);
    const char* label = nullptr;
    std::uint8_t colour[3];
    CHECK(vimcore_segmentation_class(model, 1, &label, colour) == VIMCORE_OK);
    CHECK(std::strcmp(label, "tree") == 0 && colour[0] == 255 && colour[2] == 2);
    CHECK(vimcore_segmentation_class(model, 1, nullptr, nullptr) == VIMCORE_OK);
    CHECK(says(vimcore_segmentation_class(model, 4, &label, nullptr), VIMCORE_INVALID_ARGUMENT, "expected 0 to 3"));

    CHECK(vimcore_segmentation_session_create(model, 2, nullptr, &session) == VIMCORE_OK);
    const std::vector<std::uint8_t> expected =
        SegmentationSession(SegmentationModel::load(path), 1).segment(image).classes;
    std::int64_t height = 0, width = 0;
    const std::uint8_t* classes = nullptr;
    CHECK(vimcore_segment_file(session, file.c_str(), &height, &width, &classes) == VIMCORE_OK);
    CHECK(height == 40 && width == 31 && std::equal(expected.begin(), expected.end(), classes));
    CHECK(says(vimcore_segment_file(session, path.c_str(), &height, &width, &classes), VIMCORE_FAILED, "neither JPEG"));
    std::vector<std::uint8_t> own(expected.size());
    CHECK(vimcore_segment_pixels(session, image.pixels.data(), 40, 31, own.data(), own.size()) == VIMCORE_OK);
    CHECK(own == expected);
    CHECK(says(vimcore_segment_pixels(session, image.pixels.data(), 40, 31, own.data(), own.size() - 1),
               VIMCORE_INVALID_ARGUMENT, "capacity"));
    CHECK(says(vimcore_segment_pixels(session, image.pixels.data(), -1, 31, own.data(), own.size()),
               VIMCORE_INVALID_ARGUMENT, "height and width"));
    std::vector<float> window(3 * 24 * 32), logits(4 * 24 * 32);
    CHECK(vimcore_segment_logits(session, window.data(), 1, logits.data(), logits.size()) == VIMCORE_OK);
    CHECK(says(vimcore_segment_logits(session, window.data(), 2, logits.data(), logits.size()),
               VIMCORE_INVALID_ARGUMENT, "capacity"));
    vimcore_segmentation_destroy(model);
    CHECK(vimcore_segment_logits(session, window.data(), 1, logits.data(), logits.size()) == VIMCORE_OK);
    vimcore_segmentation_session_destroy(session);
    CHECK(says(vimcore_segment_logits(session, window.data(), 1, logits.data(), logits.size()),
               VIMCORE_INVALID_ARGUMENT, "destroyed"));
}

}  // namespace

int main()
{
    const Folder folder;
    const std::string path = folder.file("m.safetensors");
    test_batches(path);
    test_windows(path);
    test_hostile(path);
    test_results(folder);
    test_c(folder);
    return check_failures();
}
