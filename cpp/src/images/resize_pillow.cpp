// SPDX-License-Identifier: Apache-2.0
// Pillow's bicubic resize (a = -0.5, antialiased, two passes over 8-bit pixels with 22-bit fixed-point weights), bit
// for bit; and from there to the network's input. Every output pixel is independent, so only the crop is computed.
//   pass 1: t[y, x] = clip8((2^21 + sum_j wx[x, j] image[y, x0(x) + j]) >> 22), pass 2 the same over rows.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "files/json.h"
#include "vimcore/image.h"

#if defined(__GNUC__)
#define VIM_INLINE inline __attribute__((always_inline))
#else
#define VIM_INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define VIM_AVX2 1
#include <immintrin.h>
#endif

namespace vimcore {
namespace {

constexpr std::int64_t max_side = 65535;
constexpr std::int64_t max_pixels = std::int64_t{1} << 30;
constexpr int weight_bits = 22;

double cubic(double x)
{
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

// Weights of output positions begin..end-1 of `out`, made from `in` positions.
struct Weights {
    int taps = 0;                   // room per output position
    std::vector<int> first, count;  // input positions used
    std::vector<std::int32_t> values;

    Weights(std::int64_t in, std::int64_t out, std::int64_t begin, std::int64_t end)
    {
        const double scale = static_cast<double>(in) / static_cast<double>(out);
        const double filter = std::max(scale, 1.0), support = 2.0 * filter, step = 1.0 / filter;
        taps = static_cast<int>(std::ceil(support)) * 2 + 2;  // one more than needed: even, the last is 0
        const auto size = static_cast<std::size_t>(end - begin);
        first.resize(size);
        count.resize(size);
        values.assign(size * static_cast<std::size_t>(taps), 0);
        std::vector<double> weight(static_cast<std::size_t>(taps));
        for (std::size_t i = 0; i < size; ++i) {
            const double centre = (static_cast<double>(begin + static_cast<std::int64_t>(i)) + 0.5) * scale;
            const int low = std::max(0, static_cast<int>(centre - support + 0.5));
            const int high = static_cast<int>(std::min(in, static_cast<std::int64_t>(centre + support + 0.5)));
            double sum = 0.0;
            for (int j = 0; j < high - low; ++j) sum += weight[j] = cubic((j + low - centre + 0.5) * step);
            for (int j = 0; j < high - low; ++j) {
                const double value = (sum != 0.0 ? weight[j] / sum : weight[j]) * (1 << weight_bits);
                values[i * taps + j] = static_cast<std::int32_t>(value < 0 ? value - 0.5 : value + 0.5);
            }
            first[i] = low;
            count[i] = high - low;
        }
    }
};

VIM_INLINE std::uint8_t clip8(std::int32_t sum)
{
    const std::int32_t value = sum >> weight_bits;
    return static_cast<std::uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

#if VIM_AVX2
// Integers: the same result on every machine. Baseline x86-64 has no 32-bit vector multiply.
bool has_avx2()
{
    static const bool found = [] {
        const char* forced = std::getenv("VIMCORE_ISA");
        return __builtin_cpu_supports("avx2") && !(forced && std::strcmp(forced, "baseline") == 0);
    }();
    return found;
}

// One row of the horizontal pass for RGB (see resize_row), two pixels a step in the halves of one vector:
// (r g b 0 | r g b 0). An odd count takes one pixel more, with weight 0.
__attribute__((target("avx2"))) void resize_row_avx2(const std::uint8_t* in, int begin, int end, const Weights& weights,
                                                     std::size_t width, std::uint8_t* out)
{
    const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const std::int32_t* values = weights.values.data();
    const int* firsts = weights.first.data();
    const int* counts = weights.count.data();
    for (std::size_t x = 0; x < width; ++x, values += weights.taps) {
        const std::uint8_t* p = in + static_cast<std::size_t>(firsts[x] - begin) * 3;
        const int count = counts[x], safe = end - firsts[x] - 2;  // a load takes 8 bytes: two more pixels must exist
        __m256i sums = _mm256_setzero_si256();
        int j = 0;
        for (; j < count && j < safe; j += 2) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 3 * j));
            const __m256i pixels = _mm256_cvtepu8_epi32(_mm_shuffle_epi8(bytes, spread));
            const __m256i pair = _mm256_setr_m128i(_mm_set1_epi32(values[j]), _mm_set1_epi32(values[j + 1]));
            sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(pixels, pair));
        }
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        for (; j < count; ++j) {  // at the right border
            const __m128i pixel = _mm_setr_epi32(p[3 * j], p[3 * j + 1], p[3 * j + 2], 0);
            sum = _mm_add_epi32(sum, _mm_mullo_epi32(pixel, _mm_set1_epi32(values[j])));
        }
        sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(1 << (weight_bits - 1))), weight_bits);
        const __m128i words = _mm_packs_epi32(sum, sum);
        const std::int32_t rgb = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));  // both packs saturate, as clip8
        __builtin_memcpy(out + 3 * x, &rgb, 3);
    }
}
#endif

// One row of the horizontal pass. `in` holds the input columns begin..end-1.
template <int channels>
void resize_row(const std::uint8_t* in, int begin, [[maybe_unused]] int end, const Weights& weights, std::size_t width,
                std::uint8_t* out)
{
#if VIM_AVX2
    if (channels == 3 && has_avx2()) return resize_row_avx2(in, begin, end, weights, width, out);
#endif
    for (std::size_t x = 0; x < width; ++x) {
        const std::int32_t* w = &weights.values[x * weights.taps];
        const std::uint8_t* p = in + static_cast<std::size_t>(weights.first[x] - begin) * channels;
        std::int32_t sum[channels];
        for (int c = 0; c < channels; ++c) sum[c] = 1 << (weight_bits - 1);
        for (int j = 0; j < weights.count[x]; ++j)
            for (int c = 0; c < channels; ++c) sum[c] += p[j * channels + c] * w[j];
        for (int c = 0; c < channels; ++c) out[x * channels + c] = clip8(sum[c]);
    }
}

// One row of the vertical pass: a weighted sum of `count` rows, vectorised along the row in strips that stay in cache.
VIM_INLINE void sum_rows_body(const std::uint8_t* in, std::size_t stride, const std::int32_t* weight, int count,
                              std::size_t size, std::uint8_t* out)
{
    constexpr std::size_t strip = 256;
    std::int32_t sum[strip];
    for (std::size_t begin = 0; begin < size; begin += strip) {
        const std::size_t n = size - begin < strip ? size - begin : strip;
        for (std::size_t i = 0; i < n; ++i) sum[i] = 1 << (weight_bits - 1);
        for (int j = 0; j < count; ++j) {
            const std::uint8_t* row = in + static_cast<std::size_t>(j) * stride + begin;
            const std::int32_t w = weight[j];
            for (std::size_t i = 0; i < n; ++i) sum[i] += row[i] * w;
        }
        for (std::size_t i = 0; i < n; ++i) out[begin + i] = clip8(sum[i]);
    }
}

#if VIM_AVX2
__attribute__((target("avx2"))) void sum_rows_avx2(const std::uint8_t* in, std::size_t stride,
                                                   const std::int32_t* weight, int count, std::size_t size,
                                                   std::uint8_t* out)
{
    sum_rows_body(in, stride, weight, count, size, out);
}
#endif

void sum_rows(const std::uint8_t* in, std::size_t stride, const std::int32_t* weight, int count, std::size_t size,
              std::uint8_t* out)
{
#if VIM_AVX2
    if (has_avx2()) return sum_rows_avx2(in, stride, weight, count, size, out);
#endif
    sum_rows_body(in, stride, weight, count, size, out);
}

struct Window {
    std::int64_t top, left, height, width;
};

// The window of `in` (in_height, in_width, channels) resized to height x width.
template <int channels>
std::vector<std::uint8_t> resample(const std::uint8_t* in, std::int64_t in_height, std::int64_t in_width,
                                   std::int64_t height, std::int64_t width, const Window& window)
{
    const auto out_height = static_cast<std::size_t>(window.height), out_width = static_cast<std::size_t>(window.width);
    const std::size_t in_stride = static_cast<std::size_t>(in_width) * channels, stride = out_width * channels;
    std::vector<std::uint8_t> out(out_height * stride);
    const Weights wx(in_width, width, window.left, window.left + window.width);
    const Weights wy(in_height, height, window.top, window.top + window.height);

    // Pillow 13 and later take the vertical pass first where it removes many more rows than the other removes columns.
    if (height < in_height && in_height - height > 2 * (in_width - width)) {
        const int begin = wx.first.front(), end = wx.first.back() + wx.count.back();
        std::vector<std::uint8_t> row(static_cast<std::size_t>(end - begin) * channels);
        for (std::size_t y = 0; y < out_height; ++y) {
            const std::uint8_t* from = in + static_cast<std::size_t>(wy.first[y]) * in_stride;
            sum_rows(from + static_cast<std::size_t>(begin) * channels, in_stride, &wy.values[y * wy.taps], wy.count[y],
                     row.size(), row.data());
            resize_row<channels>(row.data(), begin, end, wx, out_width, &out[y * stride]);
        }
        return out;
    }
    const int begin = wy.first.front(), end = wy.first.back() + wy.count.back();
    std::vector<std::uint8_t> rows(static_cast<std::size_t>(end - begin) * stride);
    for (int y = begin; y < end; ++y)
        resize_row<channels>(in + static_cast<std::size_t>(y) * in_stride, 0, static_cast<int>(in_width), wx, out_width,
                             &rows[static_cast<std::size_t>(y - begin) * stride]);
    for (std::size_t y = 0; y < out_height; ++y)
        sum_rows(&rows[static_cast<std::size_t>(wy.first[y] - begin) * stride], stride, &wy.values[y * wy.taps],
                 wy.count[y], stride, &out[y * stride]);
    return out;
}

void check_image(const char* who, const Image& image)
{
    if (image.height < 1 || image.width < 1 || image.height > max_side || image.width > max_side ||
        image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3))
        throw std::invalid_argument(std::string("[") + who +
                                    "] image: expected 1 to 65535 pixels a side and (height, width, 3) bytes, got " +
                                    std::to_string(image.height) + " x " + std::to_string(image.width) + " and " +
                                    std::to_string(image.pixels.size()) + " bytes");
}

std::vector<std::uint8_t> luminance(const Image& image)
{
    std::vector<std::uint8_t> grey(image.pixels.size() / 3);
    const std::uint8_t* p = image.pixels.data();
    for (std::size_t i = 0; i < grey.size(); ++i)
        grey[i] = static_cast<std::uint8_t>(
            (19595u * p[3 * i] + 38470u * p[3 * i + 1] + 7471u * p[3 * i + 2] + 32768u) >> 16);
    return grey;
}

// Half of a difference, halves to even: Python's round((size - crop) / 2), which decides torchvision's crop.
std::int64_t half_even(std::int64_t difference)
{
    const std::int64_t low = difference / 2;
    return difference % 2 != 0 && low % 2 != 0 ? low + 1 : low;
}

void check_options(const Preprocess& options)
{
    const auto check = [](const char* name, std::int64_t value, std::int64_t low) {
        if (value < low || value > max_side)
            throw std::invalid_argument(std::string("[preprocess] ") + name + ": expected " + std::to_string(low) +
                                        " to " + std::to_string(max_side) + ", got " + std::to_string(value));
    };
    check("resize", options.resize, 0);
    check("crop height", options.crop_height, 1);
    check("crop width", options.crop_width, 1);
    if ((options.mean.size() != 1 && options.mean.size() != 3) || options.std.size() != options.mean.size())
        throw std::invalid_argument("[preprocess] mean and std: expected 1 or 3 values each, got " +
                                    std::to_string(options.mean.size()) + " and " + std::to_string(options.std.size()));
    // Far beyond any statistics of pixels from 0 to 1; the network's input stays finite.
    const auto limit = [](const char* name, const std::vector<double>& values, double low, double high) {
        for (const double value : values)
            if (!(value >= low && value <= high))
                throw std::invalid_argument(std::string("[preprocess] ") + name + ": expected " + json::number(low) +
                                            " to " + json::number(high) + ", got " +
                                            (std::isfinite(value) ? json::number(value) : std::to_string(value)));
    };
    limit("mean", options.mean, -1e6, 1e6);
    limit("std", options.std, 1e-6, 1e6);
}

}  // namespace

Image resize_bicubic(const Image& image, std::int64_t height, std::int64_t width)
{
    check_image("resize_bicubic", image);
    if (height < 1 || width < 1 || height > max_side || width > max_side || height * width > max_pixels)
        throw std::invalid_argument("[resize_bicubic] size: expected 1 to 65535 a side and at most 2^30 pixels, got " +
                                    std::to_string(height) + " x " + std::to_string(width));
    return {height, width,
            resample<3>(image.pixels.data(), image.height, image.width, height, width, {0, 0, height, width})};
}

// Order for one channel: luminance, then resize. Pillow users write image.convert("L") first; the other order
// rounds differently.
void preprocess(const Image& image, const Preprocess& options, float* out)
{
    check_image("preprocess", image);
    check_options(options);
    const int channels = static_cast<int>(options.mean.size());
    std::vector<std::uint8_t> grey;
    if (channels == 1) grey = luminance(image);
    const std::uint8_t* pixels = channels == 1 ? grey.data() : image.pixels.data();

    std::int64_t height = image.height, width = image.width;
    if (options.resize > 0) {  // short side; the long side is truncated as torchvision does
        const auto scaled = [&](std::int64_t size, std::int64_t by) {
            return static_cast<std::int64_t>(static_cast<double>(options.resize * size) / static_cast<double>(by));
        };
        const std::int64_t old_height = height, old_width = width;
        height = old_height <= old_width ? options.resize : scaled(old_height, old_width);
        width = old_width <= old_height ? options.resize : scaled(old_width, old_height);
    }

    // Where the crop lies in the resized image, and where that part lies in the output (zero padding around it).
    const std::int64_t crop_height = options.crop_height, crop_width = options.crop_width;
    const std::int64_t pad_top = std::max<std::int64_t>(0, (crop_height - height) / 2);
    const std::int64_t pad_left = std::max<std::int64_t>(0, (crop_width - width) / 2);
    Window window{0, 0, std::min(height, crop_height), std::min(width, crop_width)};
    if (height > crop_height) window.top = half_even(height - crop_height);
    if (width > crop_width) window.left = half_even(width - crop_width);
    const auto resize = channels == 1 ? resample<1> : resample<3>;
    const std::vector<std::uint8_t> part = resize(pixels, image.height, image.width, height, width, window);

    for (int c = 0; c < channels; ++c) {
        const auto mean = static_cast<float>(options.mean[c]), std = static_cast<float>(options.std[c]);
        float table[256];
        for (int i = 0; i < 256; ++i) table[i] = (static_cast<float>(i) / 255.0f - mean) / std;
        float* plane = out + static_cast<std::size_t>(c * crop_height * crop_width);
        if (window.height < crop_height || window.width < crop_width)
            std::fill_n(plane, static_cast<std::size_t>(crop_height * crop_width), table[0]);
        for (std::int64_t y = 0; y < window.height; ++y) {
            const std::uint8_t* from = &part[static_cast<std::size_t>(y * window.width) * channels + c];
            float* to = plane + (y + pad_top) * crop_width + pad_left;
            for (std::int64_t x = 0; x < window.width; ++x) to[x] = table[from[x * channels]];
        }
    }
}

namespace {

Preprocess from_values(const std::vector<std::string>& keys, const std::vector<json::Value>& values)
{
    Preprocess options;
    for (std::size_t i = 0; i < keys.size(); ++i) {
        const std::string& key = keys[i];
        const json::Value& value = values[i];
        const std::string what = "[preprocess] " + json::printable(key, 40);
        if (key == "resize") {
            options.resize = value.as_integer(what);
        } else if (key == "crop") {
            if (value.kind == json::Kind::integer) {
                options.crop_height = options.crop_width = value.number.integer;
            } else {
                if (value.kind != json::Kind::array || value.items.size() != 2)
                    throw std::invalid_argument(what + ": expected an integer or [height, width]");
                options.crop_height = value.items[0].as_integer(what);
                options.crop_width = value.items[1].as_integer(what);
            }
        } else if (key == "mean" || key == "std") {
            std::vector<double>& list = key == "mean" ? options.mean : options.std;
            list.clear();
            for (const json::Value& item : value.as_array(what)) list.push_back(item.as_real(what));
        } else if (key == "interpolation") {
            if (value.as_string(what) != "bicubic")
                throw std::invalid_argument(what + ": only \"bicubic\" is supported");
        } else {
            throw std::invalid_argument("[preprocess] unknown key \"" + json::printable(key, 40) + '"');
        }
    }
    check_options(options);
    return options;
}

}  // namespace

Options Preprocess::options() const
{
    check_options(*this);
    const auto list = [](const std::vector<double>& values) {
        return std::vector<Option>(values.begin(), values.end());
    };
    return {{"resize", resize},
            {"crop", std::vector<Option>{crop_height, crop_width}},
            {"mean", list(mean)},
            {"std", list(std)},
            {"interpolation", std::string("bicubic")}};
}

Preprocess Preprocess::from_options(const Options& options)
{
    std::vector<std::string> keys;
    std::vector<json::Value> values;
    for (const auto& [key, option] : options) {
        keys.push_back(key);
        values.push_back(json::value_of(option));
    }
    return from_values(keys, values);
}

std::string Preprocess::to_json() const { return json::object(options()); }

Preprocess Preprocess::from_json(const std::string& text)
{
    const json::Value root = json::parse(text);
    root.require_object("[preprocess]");
    return from_values(root.keys, root.items);
}

}  // namespace vimcore
