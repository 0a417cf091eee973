// SPDX-License-Identifier: Apache-2.0
#include "files/float_types.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace vimcore {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

float from_half(std::uint16_t bits)
{
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal
        const float value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -value : value;
    }
    const std::uint32_t wide = exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    float value;
    const std::uint32_t word = sign | wide;
    std::memcpy(&value, &word, 4);
    return value;
}

float from_bfloat(std::uint16_t bits)
{
    const std::uint32_t word = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// 8 bits: sign, exponent, `fraction` bits of mantissa (arXiv 2209.05433; "fnuz": arXiv 2206.02915). e4m3 has no
// infinities and one NaN of either sign; fnuz have neither infinities nor a negative zero, whose bits are the NaN.
float from_byte(std::uint8_t bits, DType dtype)
{
    const bool fnuz = dtype == DType::f8_e4m3fnuz || dtype == DType::f8_e5m2fnuz;
    const bool e4m3 = dtype == DType::f8_e4m3 || dtype == DType::f8_e4m3fnuz;
    const int fraction = e4m3 ? 3 : 2, bias = (e4m3 ? 7 : 15) + fnuz;
    const int exponent = (bits & 0x7f) >> fraction, mantissa = bits & ((1 << fraction) - 1);
    if (fnuz && bits == 0x80) return nan;
    if (dtype == DType::f8_e4m3 && (bits & 0x7f) == 0x7f) return nan;
    float value = 0;
    if (dtype == DType::f8_e5m2 && exponent == 31)
        value = mantissa ? nan : infinity;
    else
        value = std::ldexp(static_cast<float>(exponent ? mantissa + (1 << fraction) : mantissa),
                           (exponent ? exponent : 1) - bias - fraction);
    return bits & 0x80 ? -value : value;
}

std::uint16_t to_half(float value)
{
    const auto bits = std::bit_cast<std::uint32_t>(value), size = bits & 0x7fffffffu;
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    std::uint32_t half;
    if (size > 0x7f800000u)
        half = 0x7e00u;  // NaN
    else if (size >= 0x477ff000u)
        half = 0x7c00u;  // 65520 and more
    else if (size < 0x38800000u)
        half = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));  // subnormal
    else
        half = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    return static_cast<std::uint16_t>(sign | half);
}

std::uint16_t to_bfloat(float value)
{
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // NaN stays one
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T, class Convert>
void convert(const Tensor& from, float* out, Convert&& to)
{
    const auto* bytes = static_cast<const unsigned char*>(from.data);
    for (std::int64_t i = 0; i < from.numel(); i++) {
        T value;
        std::memcpy(&value, bytes + static_cast<std::int64_t>(sizeof(T)) * i, sizeof(T));
        out[i] = to(value);
    }
}

}  // namespace

bool is_float(DType dtype) { return dtype <= DType::bf16 || (dtype >= DType::f8_e4m3 && dtype <= DType::f8_e5m2fnuz); }

void to_float(const Tensor& from, float* out)
{
    if (!is_float(from.dtype))
        throw std::invalid_argument(std::string("[to_float] expected a float type, got ") + name_of(from.dtype));
    if (from.dtype == DType::f32) {
        if (from.numel() > 0) std::memcpy(out, from.data, from.bytes());
    } else if (from.dtype == DType::f64) {
        convert<double>(from, out, [](double value) { return static_cast<float>(value); });
    } else if (from.dtype == DType::f16) {
        convert<std::uint16_t>(from, out, from_half);
    } else if (from.dtype == DType::bf16) {
        convert<std::uint16_t>(from, out, from_bfloat);
    } else {
        convert<std::uint8_t>(from, out, [&](std::uint8_t value) { return from_byte(value, from.dtype); });
    }
}

bool from_float(const float* from, std::int64_t count, DType dtype, void* out)
{
    if (dtype != DType::f16 && dtype != DType::bf16)
        throw std::invalid_argument(std::string("[from_float] expected f16 or bf16, got ") + name_of(dtype));
    const bool half = dtype == DType::f16;
    const std::uint32_t infinite = half ? 0x7c00u : 0x7f80u;
    auto* const to = static_cast<std::uint16_t*>(out);
    bool holds = true;
    for (std::int64_t i = 0; i < count; i++) {
        to[i] = half ? to_half(from[i]) : to_bfloat(from[i]);
        holds &= (to[i] & 0x7fffu) != infinite || std::isinf(from[i]);
    }
    return holds;
}

void read_floats(const SafetensorsFile& file, const Tensor& tensor, float* out)
{
    if (tensor.dtype == DType::f32) return file.copy(tensor, out);
    const Buffer bytes(tensor.bytes());
    Tensor stored = tensor;
    stored.data = bytes.data();
    file.copy(tensor, stored.data);
    to_float(stored, out);
}

}  // namespace vimcore
