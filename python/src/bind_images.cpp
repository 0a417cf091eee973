// SPDX-License-Identifier: Apache-2.0
// Pictures and their way to a network's input.
#include <cstring>

#include "bindings.h"
#include "convert.h"

namespace vimcore::python {

namespace {

nb::ndarray<nb::numpy, std::uint8_t> from_image(const Image& image)
{
    std::uint8_t* data = nullptr;
    auto out = make_numpy<std::uint8_t>({image.height, image.width, 3}, &data);
    std::memcpy(data, image.pixels.data(), image.pixels.size());
    return out;
}

Image decode(const nb::bytes& bytes, const std::string& name)
{
    nb::gil_scoped_release release;
    return decode_image(bytes.data(), bytes.size(), name);
}

nb::ndarray<nb::numpy, float> normalised(const Image& image, const Preprocess& steps)
{
    float* data = nullptr;
    const auto channels = static_cast<std::int64_t>(steps.mean.size());
    auto out = make_numpy<float>({channels, steps.crop_height, steps.crop_width}, &data);
    nb::gil_scoped_release release;
    preprocess(image, steps, data);
    return out;
}

}  // namespace

void bind_images(nb::module_& m)
{
    m.def(
        "decode_image", [](const nb::bytes& bytes, const std::string& name) { return from_image(decode(bytes, name)); },
        nb::arg("data"), nb::arg("name") = "<memory>");
    m.def(
        "picture_kind", [](const nb::bytes& bytes) { return picture_kind(bytes.data(), bytes.size()); },
        nb::arg("data"));
    m.def(
        "upright",
        [](const In& image, const nb::bytes& file) {
            return from_image(upright(to_image(image, "upright"), file.data(), file.size()));
        },
        nb::arg("image").noconvert(), nb::arg("file"));
    m.def(
        "resize_bicubic",
        [](const In& image, std::int64_t height, std::int64_t width) {
            return from_image(resize_bicubic(to_image(image, "resize_bicubic"), height, width));
        },
        nb::arg("image").noconvert(), nb::arg("height"), nb::arg("width"));
    m.def(
        "resize_linear",
        [](const In& image, std::int64_t height, std::int64_t width) {
            return from_image(resize_linear(to_image(image, "resize_linear"), height, width));
        },
        nb::arg("image").noconvert(), nb::arg("height"), nb::arg("width"));
    m.def(
        "preprocess_image",
        [](const nb::bytes& bytes, const std::string& name, const Preprocess& steps) {
            return normalised(decode(bytes, name), steps);
        },
        nb::arg("data"), nb::arg("name"), nb::arg("preprocess"));
    m.def(
        "preprocess_pixels",
        [](const In& image, const Preprocess& steps) {
            return normalised(to_image(image, "preprocess_pixels"), steps);
        },
        nb::arg("image").noconvert(), nb::arg("preprocess"));
}

}  // namespace vimcore::python
