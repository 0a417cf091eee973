// SPDX-License-Identifier: Apache-2.0
// For tests of the CUDA backend: the same call on the device and, in float64, on the CPU, from the same values.
//
//   const Floats x = rounded(dtype, random.normal(n));          // values that the device's type holds exactly
//   auto run = [&](Side&& side) {                               // called for both
//       const Tensor in = side.activation({B, L, D}, x), out = side.result({B, L, D});
//       some_operator(side.ctx, {.x = in, .out = out});
//       return side.values(out);
//   };
//   CHECK_AGREE(run(Side::cuda(dtype)), run(Side::cpu()), tolerance(dtype));
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "core/backend.h"
#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace vimcore::test {

using Floats = std::vector<float>;
using Bytes = std::vector<unsigned char>;

// Under the address sanitizer everything takes several times as long, and it looks for accesses beyond buffers, where
// float16 does what bfloat16 does: tests leave that and repetitions out.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool brief = true;
inline const DType device_types[] = {DType::f32, DType::bf16};
#else
constexpr bool brief = false;
inline const DType device_types[] = {DType::f32, DType::f16, DType::bf16};
#endif

inline std::uint32_t bits_of(float x)
{
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(std::uint32_t bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// ---- 16-bit types on the host, to nearest even ---------------------------------------------------------------------
inline std::uint16_t to_bf16(float x)
{
    const std::uint32_t bits = bits_of(x);
    if (x != x) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(std::uint16_t x) { return float_of(std::uint32_t{x} << 16); }

inline float from_f16(std::uint16_t x)
{
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    if (exponent == 31)
        value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return x & 0x8000 ? -value : value;
}
inline std::uint16_t to_f16(float x)
{
    const auto sign = static_cast<std::uint16_t>(bits_of(x) >> 16 & 0x8000);
    if (x != x) return 0x7fff;
    const float size = std::abs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    const int exponent = std::max(std::ilogb(size), -14);  // of the last place: 2^(exponent - 10)
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<std::uint16_t>(sign + units + (exponent + 14) * 1024);
}

inline float rounded(DType dtype, float x)
{
    return dtype == DType::f16 ? from_f16(to_f16(x)) : dtype == DType::bf16 ? from_bf16(to_bf16(x)) : x;
}
inline Floats rounded(DType dtype, Floats values)
{
    for (float& x : values) x = rounded(dtype, x);
    return values;
}

inline Bytes encode(DType dtype, const Floats& values)
{
    const std::size_t size = size_of(dtype);
    Bytes bytes(values.size() * size);
    if (dtype == DType::f32 && !values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    for (std::size_t i = 0; i < values.size() && dtype != DType::f32; i++) {
        const double wide = values[i];
        const std::uint16_t narrow = dtype == DType::f16 ? to_f16(values[i]) : to_bf16(values[i]);
        std::memcpy(bytes.data() + i * size, size == 2 ? static_cast<const void*>(&narrow) : &wide, size);
    }
    return bytes;
}
inline Floats decode(DType dtype, const Bytes& bytes)
{
    const std::size_t size = size_of(dtype);
    Floats values(bytes.size() / size);
    if (dtype == DType::f32 && !values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    for (std::size_t i = 0; i < values.size() && dtype != DType::f32; i++) {
        double wide = 0;
        std::uint16_t narrow = 0;
        std::memcpy(size == 2 ? static_cast<void*>(&narrow) : &wide, bytes.data() + i * size, size);
        values[i] = size == 8 ? static_cast<float>(wide) : dtype == DType::f16 ? from_f16(narrow) : from_bf16(narrow);
    }
    return values;
}

// ---- random values, the same on every machine ----------------------------------------------------------------------
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f; }
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(next() >> 16) % n; }
    Floats uniform(std::int64_t count, float low, float high)
    {
        Floats values(static_cast<std::size_t>(count));
        for (float& x : values) x = uniform(low, high);
        return values;
    }
    Floats normal(std::int64_t count, float deviation = 1)  // a sum of uniform numbers: near enough
    {
        Floats values(static_cast<std::size_t>(count));
        for (float& x : values) x = deviation * (uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1));
        return values;
    }

private:
    std::uint64_t next()
    {
        state_ += 0x9e3779b97f4a7c15u;
        std::uint64_t z = state_;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    std::uint64_t state_;
};

// ---- tensors -------------------------------------------------------------------------------------------------------
inline Context& cuda_context()
{
    static Context ctx(Device::cuda());
    return ctx;
}
inline Context& cpu_context()
{
    static Context ctx(Device::cpu(), 1);
    return ctx;
}

inline Bytes bytes_of(Context& ctx, const Tensor& tensor)
{
    Bytes bytes(tensor.bytes());
    if (!bytes.empty()) backend_of(ctx).download(ctx, tensor, bytes.data());
    return bytes;
}
inline Floats values_of(Context& ctx, const Tensor& tensor) { return decode(tensor.dtype, bytes_of(ctx, tensor)); }
inline void assign(Context& ctx, const Tensor& tensor, const Bytes& contents)
{
    if (contents.size() != tensor.bytes())
        throw std::invalid_argument(std::to_string(contents.size()) + " bytes for " + describe(tensor));
    if (!contents.empty()) backend_of(ctx).upload(ctx, contents.data(), tensor);
}
inline void assign(Context& ctx, const Tensor& tensor, const Floats& values)
{
    assign(ctx, tensor, encode(tensor.dtype, values));
}

// One side of a comparison. Owns its tensors; a band of bytes behind each must survive, which values() and ~Side check.
class Side {
public:
    Side(Context& context, DType dtype) : ctx(context), dtype(dtype) {}
    Side(const Side&) = delete;
    Side& operator=(const Side&) = delete;
    ~Side() { check_bands(); }
    static Side cuda(DType dtype) { return {cuda_context(), dtype}; }
    static Side cpu() { return {cpu_context(), DType::f64}; }

    // A tensor of the type for activations, or wide, that holds `values`; or NaN, to be written. shift: elements
    // between an aligned address and the tensor.
    Tensor activation(const Shape& shape, const Floats& values) { return make(shape, dtype, values); }
    Tensor parameter(const Shape& shape, const Floats& values) { return make(shape, wide(dtype), values); }
    Tensor result(const Shape& shape) { return activation(shape, nothing(shape)); }
    Tensor wide_result(const Shape& shape) { return parameter(shape, nothing(shape)); }
    Tensor make(const Shape& shape, DType type, const Floats& values, std::int64_t shift = 0)
    {
        return make(shape, type, encode(type, values), shift);
    }
    Tensor make(const Shape& shape, DType type, const Bytes& contents, std::int64_t shift = 0)
    {
        Tensor tensor{nullptr, shape, type, ctx.device()};
        const std::size_t before = static_cast<std::size_t>(shift) * size_of(type);
        Buffer& memory = buffers_.emplace_back(before + tensor.bytes() + band, ctx.device());
        tensor.data = static_cast<char*>(memory.data()) + before;
        bands_.push_back(
            {static_cast<char*>(memory.data()) + before + tensor.bytes(), {band}, DType::u8, ctx.device()});
        backend_of(ctx).upload(ctx, Bytes(band, mark).data(), bands_.back());
        assign(ctx, tensor, contents);
        return tensor;
    }

    Floats values(const Tensor& tensor) { return values_of(ctx, tensor); }
    Bytes bytes(const Tensor& tensor) { return bytes_of(ctx, tensor); }

    Context& ctx;
    const DType dtype;

private:
    static constexpr std::int64_t band = 64;
    static constexpr unsigned char mark = 0x5a;

    static Floats nothing(const Shape& shape)
    {
        return Floats(static_cast<std::size_t>(shape.numel()), std::numeric_limits<float>::quiet_NaN());
    }
    void check_bands()
    {
        for (const Tensor& tensor : bands_) CHECK(bytes_of(ctx, tensor) == Bytes(band, mark));
    }

    std::deque<Buffer> buffers_;
    std::vector<Tensor> bands_;
};

// Rows of `from` elements as rows of `to`: those behind are `fill`, or are dropped.
inline Floats with_rows(const Floats& values, std::int64_t from, std::int64_t to, float fill = 0)
{
    const auto width = static_cast<std::size_t>(from), wide = static_cast<std::size_t>(to);
    Floats rows(values.size() / width * wide, fill);
    for (std::size_t r = 0; r < values.size() / width; r++)
        std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(r * width), std::min(width, wide),
                    rows.begin() + static_cast<std::ptrdiff_t>(r * wide));
    return rows;
}

// ---- comparison ----------------------------------------------------------------------------------------------------
// What rounding
// a result to dtype costs, and for float32 the order of sums and the device's functions.
inline double tolerance(DType dtype) { return dtype == DType::f16 ? 6e-4 : dtype == DType::bf16 ? 4.5e-3 : 1e-5; }

// Every |got - want| <= tolerance max(|want|, root mean square of want).
inline void check_agree(const Floats& got, const Floats& want, double tolerance, const char* file, int line,
                        const std::string& what)
{
    check_report(got.size() == want.size(), file, line, (what + ": sizes").c_str());
    if (got.size() != want.size()) return;
    double squares = 0;
    for (float x : want) squares += static_cast<double>(x) * x;
    const double typical = want.empty() ? 0 : std::sqrt(squares / static_cast<double>(want.size()));
    double worst = 0;
    std::size_t at = 0;
    for (std::size_t i = 0; i < got.size(); i++) {
        if (got[i] == want[i]) continue;  // infinities too
        const double error =
            std::abs(static_cast<double>(got[i]) - want[i]) / std::max<double>(std::abs(want[i]), typical);
        if (error <= worst) continue;
        worst = error;
        at = i;
        if (error != error) {
            worst = std::numeric_limits<double>::infinity();
            break;
        }
    }
    std::string report = what;
    if (!(worst <= tolerance))
        report += ": element " + std::to_string(at) + " is " + std::to_string(got[at]) + ", expected " +
                  std::to_string(want[at]) + ", error " + std::to_string(worst) + " of " + std::to_string(tolerance);
    check_report(worst <= tolerance, file, line, report.c_str());
}

// ---- one operator on both sides ------------------------------------------------------------------------------------
struct Output {
    std::string name;
    Floats values;
    bool wide = false;  // float32 whatever the type of activations
};
using Outputs = std::vector<Output>;

inline bool same_bits(const Floats& a, const Floats& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// f(part) for the whole batch, or for one image after the other; part(tensor) is what a call gets of a tensor.
template <class F>
void each_image(bool apart, std::int64_t batch, F&& f)
{
    if (!apart) return f([](const Tensor& t) { return t; });
    for (std::int64_t b = 0; b < batch; b++) f([b](const Tensor& t) { return t.slice(b, b + 1); });
}

// run(side, apart) -> Outputs: on the CPU, on the device, and there again image by image.
template <class F>
void compare(DType dtype, const std::string& what, F&& run)
{
    const Outputs want = run(Side::cpu(), false), got = run(Side::cuda(dtype), false);
    const Outputs apart = run(Side::cuda(dtype), true);
    for (std::size_t i = 0; i < want.size(); i++) {
        const std::string name = what + " " + name_of(dtype) + " " + want[i].name;
        check_agree(got[i].values, want[i].values, tolerance(want[i].wide ? DType::f32 : dtype), __FILE__, __LINE__,
                    name);
        check_report(same_bits(got[i].values, apart[i].values), __FILE__, __LINE__,
                     (name + ": image by image").c_str());
    }
}

template <class... A>
std::string text(const char* name, A... numbers)
{
    std::string result = name;
    ((result += ' ', result += std::to_string(numbers)), ...);
    return result;
}

inline Floats normal(std::uint64_t seed, DType dtype, std::int64_t count)
{
    return rounded(dtype, Random(seed).normal(count));
}

}  // namespace vimcore::test

#define CHECK_AGREE(got, want, tolerance) \
    ::vimcore::test::check_agree(got, want, tolerance, __FILE__, __LINE__, #got " ~ " #want)
