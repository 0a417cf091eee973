// SPDX-License-Identifier: Apache-2.0
// Files of weights.
#include <complex>

#include "bindings.h"
#include "convert.h"

namespace vimcore::python {

namespace {

// A numpy array of its own with the bytes of `tensor`.
template <class T>
nb::object copy_out(const SafetensorsFile& file, const Tensor& tensor)
{
    T* data = nullptr;
    auto out = make_numpy<T>(tensor.shape, &data);
    file.copy(tensor, data);
    return nb::cast(out);
}

// Float types that numpy lacks, as float32, which is exact.
nb::object widened(const SafetensorsFile& file, const Tensor& tensor)
{
    float* data = nullptr;
    auto out = make_numpy<float>(tensor.shape, &data);
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
    return nb::make_tuple(file.config, file.labels.empty() ? nb::none() : nb::cast(file.labels), file.preprocess);
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

void write_safetensors(nb::handle target, nb::dict tensors, nb::dict metadata, const std::optional<std::string>& type)
{
    const std::string path = path_of(target);
    std::optional<DType> dtype;
    if (type) dtype = to_float_type("[save] dtype", *type);
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
    if (dtype)
        save_weights(path, list, entries, *dtype);
    else
        save_safetensors(path, list, entries);
}

}  // namespace

void bind_files(nb::module_& m)
{
    m.def("read_safetensors", &read_safetensors, nb::arg("path"),
          nb::sig("def read_safetensors(path: object) -> "
                  "tuple[dict[str, numpy.typing.NDArray[typing.Any]], dict[str, str]]"),
          "Arrays by name and metadata; float types that numpy lacks as float32.");
    m.def("safetensors_header", &safetensors_header, nb::arg("path"),
          nb::sig("def safetensors_header(path: object) -> "
                  "tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]"),
          "(name, type, shape) of every tensor, and metadata; the tensors are not read.");
    m.def("describe", &describe, nb::arg("metadata"), nb::arg("path"),
          nb::sig("def describe(metadata: collections.abc.Mapping[str, str], path: object) -> "
                  "tuple[Config, list[str] | None, Preprocess | None]"),
          "What a vimcore file's metadata says; ValueError names `path` and what is missing or damaged.");
    m.def("check_file", &check_file, nb::arg("path"), nb::arg("more") = false,
          nb::sig("def check_file(path: object, more: bool = False) -> tuple[dict[str, str], list[str]]"),
          "Metadata of a vimcore file, and names of tensors besides its architecture's.\n\n"
          "ValueError where tensors do not fit; those besides do not, unless `more`.");
    m.def(
        "foreign_kind",
        [](const nb::bytes& head, std::uint64_t size) { return foreign_kind({head.c_str(), head.size()}, size); },
        nb::arg("head"), nb::arg("size"));
    m.def("write_safetensors", &write_safetensors, nb::arg("path"), nb::arg("tensors"),
          nb::arg("metadata") = nb::dict(), nb::arg("dtype") = nb::none(),
          nb::sig("def write_safetensors(path: object, tensors: collections.abc.Mapping[str, typing.Any], "
                  "metadata: collections.abc.Mapping[str, str] = {}, dtype: str | None = None) -> None"),
          "Writes a file whole or not at all.\n\ndtype: \"float32\", or a 16-bit type for the weights of linear maps, "
          "the rest float32; None: as given.");
}

}  // namespace vimcore::python
