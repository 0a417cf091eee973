// SPDX-License-Identifier: Apache-2.0
// Files: safetensors, images and their preprocessing.
#include <complex>
#include <cstring>

#include "convert.h"
#include "files/float_types.h"
#include "files/safetensors_format.h"
#include "images/orientation.h"
#include "network/model_file.h"

namespace vimcore::python {

namespace {

std::vector<std::size_t> shape_of(const Tensor& tensor) { return {tensor.shape.begin(), tensor.shape.end()}; }

// A numpy array of its own with the bytes of `tensor`.
template <class T>
nb::object copy_out(const SafetensorsFile& file, const Tensor& tensor)
{
    T* data = nullptr;
    auto out = make_numpy<T>(shape_of(tensor), &data);
    file.copy(tensor, data);
    return nb::cast(out);
}

// Float types that numpy lacks, as float32, which is exact.
nb::object widened(const SafetensorsFile& file, const Tensor& tensor)
{
    float* data = nullptr;
    auto out = make_numpy<float>(shape_of(tensor), &data);
    read_floats(file, tensor, data);
    return nb::cast(out);
}

nb::object to_numpy(const SafetensorsFile& file, const Tensor& tensor)
{
    switch (tensor.dtype) {
        case DType::f32:
            return copy_out<float>(file, tensor);
        case DType::f64:
            return copy_out<double>(file, tensor);
        case DType::i64:
            return copy_out<std::int64_t>(file, tensor);
        case DType::i32:
            return copy_out<std::int32_t>(file, tensor);
        case DType::i16:
            return copy_out<std::int16_t>(file, tensor);
        case DType::i8:
            return copy_out<std::int8_t>(file, tensor);
        case DType::u64:
            return copy_out<std::uint64_t>(file, tensor);
        case DType::u32:
            return copy_out<std::uint32_t>(file, tensor);
        case DType::u16:
            return copy_out<std::uint16_t>(file, tensor);
        case DType::u8:
            return copy_out<std::uint8_t>(file, tensor);
        case DType::boolean:
            return copy_out<bool>(file, tensor);
        case DType::bf16:
        case DType::f8_e4m3:
        case DType::f8_e4m3fnuz:
        case DType::f8_e5m2:
        case DType::f8_e5m2fnuz:
            return widened(file, tensor);
        case DType::c64:
            return copy_out<std::complex<float>>(file, tensor);
        case DType::f16:
            return copy_out<std::uint16_t>(file, tensor).attr("view")("float16");
    }
    throw Error("[safetensors] unknown type");
}

nb::tuple read_safetensors(nb::handle path)
{
    const SafetensorsFile file = SafetensorsFile::open(path_of(path));
    nb::dict tensors, metadata;
    for (const auto& [name, tensor] : file.tensors()) tensors[name.c_str()] = to_numpy(file, tensor);
    for (const auto& [key, value] : file.metadata()) metadata[key.c_str()] = value;
    return nb::make_tuple(tensors, metadata);
}

// Names, types and shapes without reading the tensors: [(name, "f32", shape)], metadata.
nb::tuple safetensors_header(nb::handle path)
{
    const SafetensorsFile file = SafetensorsFile::open(path_of(path));
    nb::list tensors;
    nb::dict metadata;
    for (const auto& [name, tensor] : file.tensors()) {
        nb::list shape;
        for (std::int64_t size : tensor.shape) shape.append(size);
        tensors.append(nb::make_tuple(name, name_of(tensor.dtype), nb::tuple(shape)));
    }
    for (const auto& [key, value] : file.metadata()) metadata[key.c_str()] = value;
    return nb::make_tuple(tensors, metadata);
}

// A file that can be read but does not fit is a ValueError.
template <class Check>
auto fitting(Check&& check)
{
    try {
        return check();
    } catch (const Error& error) {
        throw std::invalid_argument(error.what());
    }
}

// Config, labels or None, preprocessing or None of a file's metadata.
nb::tuple describe(const std::map<std::string, std::string>& metadata, nb::handle path)
{
    const ModelFile file = fitting([&] { return ModelFile::describe(metadata, path_of(path)); });
    nb::list labels;
    for (const std::string& label : file.labels) labels.append(label);
    return nb::make_tuple(file.config.to_json(), file.labels.empty() ? nb::none() : nb::object(labels),
                          file.preprocess.empty() ? nb::none() : nb::object(nb::str(file.preprocess.c_str())));
}

// The metadata of a vimcore file whose tensors fit it, and the names of tensors that its architecture lacks; those are
// errors unless `more`.
nb::tuple check_file(nb::handle path, bool more)
{
    const std::string name = path_of(path);
    const SafetensorsFile file = SafetensorsFile::open(name);
    const std::vector<std::string> others =
        fitting([&] { return check_tensors(file, ModelFile::describe(file.metadata(), name).config, name, more); });
    nb::dict metadata;
    for (const auto& [key, value] : file.metadata()) metadata[key.c_str()] = value;
    return nb::make_tuple(metadata, others);
}

void write_safetensors(nb::handle target, nb::dict tensors, nb::dict metadata)
{
    const std::string path = path_of(target);
    std::vector<std::pair<std::string, Tensor>> list;
    std::vector<In> alive;
    for (auto [key, value] : tensors) {
        const auto name = nb::cast<std::string>(key);
        In array;
        if (!nb::try_cast<In>(value, array, false))
            throw std::invalid_argument("[write_safetensors] " + name + ": expected an array, got " +
                                        nb::cast<std::string>(nb::str(value.type())));
        list.emplace_back(name, to_host_tensor(array, "write_safetensors", name));
        alive.push_back(std::move(array));
    }
    std::map<std::string, std::string> entries;
    for (auto [key, value] : metadata) {
        if (!nb::isinstance<nb::str>(key) || !nb::isinstance<nb::str>(value))
            throw std::invalid_argument("[write_safetensors] metadata: expected text keys and values");
        entries[nb::cast<std::string>(key)] = nb::cast<std::string>(value);
    }
    nb::gil_scoped_release release;
    save_safetensors(path, list, entries);
}

nb::ndarray<nb::numpy, std::uint8_t> from_image(const Image& image)
{
    std::uint8_t* data = nullptr;
    auto out = make_numpy<std::uint8_t>(
        {static_cast<std::size_t>(image.height), static_cast<std::size_t>(image.width), 3}, &data);
    std::memcpy(data, image.pixels.data(), image.pixels.size());
    return out;
}

Image to_image(const In& array, const char* op)
{
    const Tensor x = to_host_tensor(array, op, "image");
    if (x.dtype != DType::u8 || x.shape.rank() != 3 || x.size(2) != 3 || x.numel() == 0)
        throw std::invalid_argument(std::string("[") + op + "] image: expected (H, W, 3) u8 cpu, got " + describe(x));
    Image image;
    image.height = x.size(0);
    image.width = x.size(1);
    image.pixels.assign(x.as<std::uint8_t>(), x.as<std::uint8_t>() + x.numel());
    return image;
}

Image decode(const nb::bytes& bytes, const std::string& name)
{
    nb::gil_scoped_release release;
    return decode_image(bytes.data(), bytes.size(), name);
}

nb::ndarray<nb::numpy, float> normalised(const Image& image, const std::string& json)
{
    const Preprocess options = Preprocess::from_json(json);
    float* data = nullptr;
    auto out = make_numpy<float>({options.mean.size(), static_cast<std::size_t>(options.crop_height),
                                  static_cast<std::size_t>(options.crop_width)},
                                 &data);
    nb::gil_scoped_release release;
    preprocess(image, options, data);
    return out;
}

}  // namespace

void bind_files(nb::module_& m)
{
    m.def("read_safetensors", &read_safetensors, nb::arg("path"));
    m.def("safetensors_header", &safetensors_header, nb::arg("path"));
    m.def("describe", &describe, nb::arg("metadata"), nb::arg("path"));
    m.def("check_file", &check_file, nb::arg("path"), nb::arg("more") = false);
    m.def(
        "foreign_kind",
        [](const nb::bytes& head, std::uint64_t size) {
            return safetensors::foreign_kind({head.c_str(), head.size()}, size);
        },
        nb::arg("head"), nb::arg("size"));
    m.def("write_safetensors", &write_safetensors, nb::arg("path"), nb::arg("tensors"),
          nb::arg("metadata") = nb::dict());

    m.def(
        "decode_image", [](const nb::bytes& bytes, const std::string& name) { return from_image(decode(bytes, name)); },
        nb::arg("data"), nb::arg("name") = "<memory>");
    m.def(
        "upright",
        [](const In& image, const nb::bytes& file) {
            return from_image(upright(to_image(image, "upright"), orientation_of(file.data(), file.size())));
        },
        nb::arg("image").noconvert(), nb::arg("file"));
    m.def(
        "resize_bicubic",
        [](const In& image, std::int64_t height, std::int64_t width) {
            return from_image(resize_bicubic(to_image(image, "resize_bicubic"), height, width));
        },
        nb::arg("image").noconvert(), nb::arg("height"), nb::arg("width"));
    m.def(
        "preprocess_image",
        [](const nb::bytes& bytes, const std::string& name, const std::string& json) {
            return normalised(decode(bytes, name), json);
        },
        nb::arg("data"), nb::arg("name"), nb::arg("preprocess_json"));
    m.def(
        "preprocess_pixels",
        [](const In& image, const std::string& json) { return normalised(to_image(image, "preprocess_pixels"), json); },
        nb::arg("image").noconvert(), nb::arg("preprocess_json"));
    m.def(
        "preprocess_normalize", [](const std::string& json) { return Preprocess::from_json(json).to_json(); },
        nb::arg("preprocess_json"));
    m.def("preprocess_default", [] { return Preprocess{}.to_json(); });
}

}  // namespace vimcore::python
