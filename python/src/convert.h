// SPDX-License-Identifier: Apache-2.0
// From Python arrays (numpy, torch, anything with DLPack) to Tensor and back. Arrays are never converted or copied
// on the way in: what does not fit is an error that names the argument.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "vimcore/vimcore.h"

namespace vimcore::python {

namespace nb = nanobind;

using In = nb::ndarray<nb::ro>;  // only read
using Out = nb::ndarray<>;       // written
using MaybeIn = std::optional<In>;
using MaybeOut = std::optional<Out>;

// "float32", "bfloat16" or "float16", as torch and numpy call them. `name` is for the error.
inline DType to_float_type(const std::string& name, const std::string& type)
{
    if (type == "float32") return DType::f32;
    if (type == "float16") return DType::f16;
    if (type == "bfloat16") return DType::bf16;
    throw std::invalid_argument(name + ": expected \"float32\", \"bfloat16\" or \"float16\", got \"" + type + "\"");
}

// The type, or nullopt where the library has none for it.
inline std::optional<DType> to_dtype(nb::dlpack::dtype type)
{
    using Code = nb::dlpack::dtype_code;
    if (type.lanes != 1) return std::nullopt;
    const auto code = static_cast<Code>(type.code);
    if (code == Code::Bool && type.bits == 8) return DType::boolean;
    if (code == Code::Bfloat && type.bits == 16) return DType::bf16;
    if (code == Code::Float) {
        if (type.bits == 64) return DType::f64;
        if (type.bits == 32) return DType::f32;
        if (type.bits == 16) return DType::f16;
    }
    if (code == Code::Int || code == Code::UInt) {
        const bool sign = code == Code::Int;
        if (type.bits == 64) return sign ? DType::i64 : DType::u64;
        if (type.bits == 32) return sign ? DType::i32 : DType::u32;
        if (type.bits == 16) return sign ? DType::i16 : DType::u16;
        if (type.bits == 8) return sign ? DType::i8 : DType::u8;
    }
    if (code == Code::Complex && type.bits == 64) return DType::c64;
    if (type.bits == 8) {  // DLPack's codes of 8-bit floats, which nanobind does not name
        constexpr DType floats[] = {DType::f8_e4m3, DType::f8_e4m3fnuz, DType::f8_e5m2, DType::f8_e5m2fnuz};
        if (type.code >= 10 && type.code <= 13) return floats[type.code - 10];
    }
    return std::nullopt;
}

// A view of a contiguous array on the CPU or a CUDA device. `op` and `name` are for the error.
template <class Array>
Tensor to_tensor(const Array& array, const char* op, const std::string& name)
{
    auto fail = [&](const std::string& what) {
        throw std::invalid_argument(std::string("[") + op + "] " + name + ": " + what);
    };
    const int rank = static_cast<int>(array.ndim());
    if (rank > Shape::max_rank) fail("expected at most 8 axes, got " + std::to_string(rank));
    Tensor tensor;
    tensor.shape = Shape(array.shape_ptr(), rank);
    const std::string got = to_string(tensor.shape);
    const std::optional<DType> dtype = to_dtype(array.dtype());
    if (!dtype)
        fail("expected a number type of torch or numpy, got type code " + std::to_string(array.dtype().code) + " of " +
             std::to_string(array.dtype().bits) + " bits");
    if (array.device_type() == nb::device::cuda::value)
        tensor.device = Device::cuda(static_cast<int>(array.device_id()));
    else if (array.device_type() != nb::device::cpu::value)
        fail("expected a cpu or cuda array, got " + got + " on device type " + std::to_string(array.device_type()));
    std::int64_t step = 1;
    for (int axis = rank - 1; axis >= 0 && tensor.shape.numel() > 0; axis--) {
        if (tensor.shape[axis] != 1 && array.stride(static_cast<std::size_t>(axis)) != step)
            fail("expected a contiguous array, got " + got + " with stride " +
                 std::to_string(array.stride(static_cast<std::size_t>(axis))) + " on axis " + std::to_string(axis));
        step *= tensor.shape[axis];
    }
    static double nothing;  // an empty array may have no address, but it is not an absent one
    const void* data = array.data();
    tensor.data = data ? const_cast<void*>(data) : &nothing;
    tensor.dtype = *dtype;
    return tensor;
}

template <class Array>
Tensor to_tensor(const std::optional<Array>& array, const char* op, const std::string& name)
{
    return array ? to_tensor(*array, op, name) : Tensor{};
}

// The same for an array that the host reads.
template <class Array>
Tensor to_host_tensor(const Array& array, const char* op, const std::string& name)
{
    const Tensor tensor = to_tensor(array, op, name);
    if (tensor.device.type != Device::Type::cpu)
        throw std::invalid_argument(std::string("[") + op + "] " + name + ": expected a cpu array, got " +
                                    describe(tensor));
    return tensor;
}

// The bytes of a path: str, bytes or os.PathLike, also with names that are not UTF-8. NUL in it: ValueError.
inline std::string path_of(nb::handle path)
{
    PyObject* bytes = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw nb::python_error();
    const nb::bytes owner = nb::steal<nb::bytes>(bytes);
    return {owner.c_str(), owner.size()};
}

// A fresh numpy array, filled by the caller.
template <class T>
nb::ndarray<nb::numpy, T> make_numpy(const Shape& shape, T** data)
{
    std::size_t sizes[Shape::max_rank], rank = 0;
    for (const std::int64_t size : shape) sizes[rank++] = static_cast<std::size_t>(size);
    const auto count = static_cast<std::size_t>(shape.numel());
    *data = new T[count ? count : 1];
    nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(*data, rank, sizes, owner);
}

// A picture (H, W, 3) of bytes.
inline Image to_image(const In& array, const char* op)
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

}  // namespace vimcore::python
