// SPDX-License-Identifier: Apache-2.0
// Tensor: a contiguous row-major view of memory that somebody else owns. Buffer: memory that is owned.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>

namespace [[gnu::visibility("default")]] vimcore {

// The 8-bit floats and complex numbers are for files only: no operator takes them. Panels, the other way round, are for
// products of matrices only: a weight in the order in which the CPU's kernels read it, as a Model has it that was
// loaded for bf16 alone (ModelOptions).
enum class DType : std::uint8_t {
    f32,
    f64,
    f16,
    bf16,
    i64,
    i32,
    i16,
    i8,
    u64,
    u32,
    u16,
    u8,
    boolean,
    f8_e4m3,
    f8_e4m3fnuz,
    f8_e5m2,
    f8_e5m2fnuz,
    c64,  // pairs of f32
    bf16_panels,
};
inline constexpr int dtype_count = 18;  // that files have: all but panels

std::size_t size_of(DType dtype);
const char* name_of(DType dtype);

template <class T>
inline constexpr DType dtype_of = DType::u8;
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<double> = DType::f64;

// The type of parameters, residual stream, states and statistics beside activations of `dtype`: at least float32.
inline constexpr DType wide(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16 ? DType::f32 : dtype; }

struct Device {
    enum class Type : std::uint8_t { cpu, cuda };
    Type type = Type::cpu;
    int index = 0;

    static constexpr Device cpu() { return {}; }
    static constexpr Device cuda(int index = 0) { return {Type::cuda, index}; }
    bool operator==(const Device&) const = default;
};
std::string to_string(Device device);
Device device_from(const std::string& text);  // "cpu", "cuda" or "cuda:N"; else std::invalid_argument

// Sizes of a tensor, outermost first; at most 8 of them.
class Shape {
public:
    static constexpr int max_rank = 8;

    Shape() = default;
    Shape(std::initializer_list<std::int64_t> sizes);
    Shape(const std::int64_t* sizes, int rank);

    int rank() const { return rank_; }
    std::int64_t operator[](int axis) const { return sizes_[axis < 0 ? axis + rank_ : axis]; }
    std::int64_t numel() const;
    Shape with(int axis, std::int64_t size) const;  // one size replaced
    bool operator==(const Shape& other) const;
    const std::int64_t* begin() const { return sizes_.data(); }
    const std::int64_t* end() const { return sizes_.data() + rank_; }

private:
    std::array<std::int64_t, max_rank> sizes_{};
    int rank_ = 0;
};
std::string to_string(const Shape& shape);  // "(2, 197, 192)"

struct Tensor {
    void* data = nullptr;
    Shape shape;
    DType dtype = DType::f32;
    Device device{};

    explicit operator bool() const { return data != nullptr; }  // false: this optional tensor is absent
    std::int64_t size(int axis) const { return shape[axis]; }
    std::int64_t numel() const { return shape.numel(); }
    std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }
    template <class T>
    T* as() const
    {
        return static_cast<T*>(data);
    }

    Tensor slice(std::int64_t begin, std::int64_t end) const;  // along the first axis
    Tensor operator[](std::int64_t index) const;               // drops the first axis
    Tensor view(const Shape& shape) const;                     // same memory, same number of elements
};
std::string describe(const Tensor& tensor);  // "(2, 197, 192) f32 cpu"

// Owns zero or more bytes, aligned to 64. Move-only.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes, Device device = Device::cpu());
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept
    {
        swap(other);
        return *this;
    }
    ~Buffer();

    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }
    Device device() const { return device_; }

private:
    void swap(Buffer& other) noexcept;
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
    Device device_;
};

// For processes that share a device with another owner of its memory, such as torch: asked once when an allocation
// finds too little, before OutOfMemory is thrown. It gives back what nobody uses; true: the allocation is tried again.
// Called by the thread that allocates, also while others compute; nullptr: nobody is asked.
using GiveBackMemory = std::function<bool(int device, std::size_t bytes)>;
void set_give_back_memory(GiveBackMemory give_back);

}  // namespace vimcore
