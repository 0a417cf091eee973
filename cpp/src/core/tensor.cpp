// SPDX-License-Identifier: Apache-2.0
#include "vimcore/tensor.h"

#include <charconv>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "core/backend.h"

namespace vimcore {

std::size_t size_of(DType dtype)
{
    switch (dtype) {
        case DType::f64:
        case DType::i64:
        case DType::u64:
        case DType::c64:
            return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32:
            return 4;
        case DType::f16:
        case DType::bf16:
        case DType::i16:
        case DType::u16:
        case DType::bf16_panels:
            return 2;
        case DType::i8:
        case DType::u8:
        case DType::boolean:
        case DType::f8_e4m3:
        case DType::f8_e4m3fnuz:
        case DType::f8_e5m2:
        case DType::f8_e5m2fnuz:
            return 1;
    }
    return 1;
}

const char* name_of(DType dtype)
{
    static constexpr const char* names[dtype_count + 1] = {
        "f32", "f64", "f16",  "bf16",    "i64",         "i32",     "i16",         "i8",  "u64",        "u32",
        "u16", "u8",  "bool", "f8_e4m3", "f8_e4m3fnuz", "f8_e5m2", "f8_e5m2fnuz", "c64", "bf16_panels"};
    return names[static_cast<int>(dtype)];
}

std::string to_string(Device device)
{
    return device.type == Device::Type::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

Device device_from(const std::string& text)
{
    if (text == "cpu") return Device::cpu();
    if (text == "cuda") return Device::cuda();
    if (text.starts_with("cuda:")) {
        int index = -1;
        const char* const last = text.data() + text.size();
        const auto [end, error] = std::from_chars(text.data() + 5, last, index);
        if (error == std::errc() && end == last && index >= 0) return Device::cuda(index);
    }
    throw std::invalid_argument("device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"" + text + '"');
}

Shape::Shape(std::initializer_list<std::int64_t> sizes) : Shape(sizes.begin(), static_cast<int>(sizes.size())) {}

Shape::Shape(const std::int64_t* sizes, int rank) : rank_(rank)
{
    if (rank < 0 || rank > max_rank)
        throw std::invalid_argument("[shape] rank " + std::to_string(rank) + " is not in 0.." +
                                    std::to_string(max_rank));
    for (int i = 0; i < rank; i++) {
        if (sizes[i] < 0) throw std::invalid_argument("[shape] negative size " + std::to_string(sizes[i]));
        sizes_[i] = sizes[i];
    }
}

std::int64_t Shape::numel() const
{
    std::int64_t product = 1;
    for (std::int64_t size : *this) product *= size;
    return product;
}

Shape Shape::with(int axis, std::int64_t size) const
{
    Shape shape = *this;
    shape.sizes_[static_cast<std::size_t>(axis < 0 ? axis + rank_ : axis)] = size;
    return shape;
}

bool Shape::operator==(const Shape& other) const
{
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; i++)
        if (sizes_[i] != other.sizes_[i]) return false;
    return true;
}

std::string to_string(const Shape& shape)
{
    std::string text = "(";
    for (int i = 0; i < shape.rank(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.rank() == 1 ? ",)" : ")");
}

std::string describe(const Tensor& tensor)
{
    return to_string(tensor.shape) + " " + name_of(tensor.dtype) + " " + to_string(tensor.device);
}

Tensor Tensor::slice(std::int64_t begin, std::int64_t end) const
{
    if (!data || shape.rank() == 0) return {};
    const std::int64_t row = Shape(shape.begin() + 1, shape.rank() - 1).numel();
    Tensor part = *this;
    part.shape = shape.with(0, end - begin);
    part.data = static_cast<char*>(data) + begin * row * static_cast<std::int64_t>(size_of(dtype));
    return part;
}

Tensor Tensor::operator[](std::int64_t index) const
{
    if (!data || shape.rank() == 0) return {};
    Tensor part = slice(index, index + 1);
    part.shape = Shape(shape.begin() + 1, shape.rank() - 1);
    return part;
}

Tensor Tensor::view(const Shape& other) const
{
    if (!data) return {};
    if (other.numel() != numel())
        throw std::invalid_argument("[view] " + to_string(shape) + " does not have the elements of " +
                                    to_string(other));
    Tensor result = *this;
    result.shape = other;
    return result;
}

namespace {

std::mutex give_back_mutex;
std::shared_ptr<const GiveBackMemory> give_back_memory;

}  // namespace

void set_give_back_memory(GiveBackMemory give_back)
{
    auto next = give_back ? std::make_shared<const GiveBackMemory>(std::move(give_back)) : nullptr;
    std::lock_guard lock(give_back_mutex);
    give_back_memory.swap(next);
}

bool others_gave_back(int device, std::size_t bytes)
{
    std::shared_ptr<const GiveBackMemory> asked;
    {
        std::lock_guard lock(give_back_mutex);
        asked = give_back_memory;
    }
    return asked && (*asked)(device, bytes);
}

Buffer::Buffer(std::size_t bytes, Device device) : bytes_(bytes), device_(device)
{
    if (bytes > 0) data_ = backend_of(device).allocate(bytes, device.index);
}

Buffer::~Buffer()
{
    if (data_) backend_of(device_).release(data_, device_.index);
}

void Buffer::swap(Buffer& other) noexcept
{
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(device_, other.device_);
}

}  // namespace vimcore
