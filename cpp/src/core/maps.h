// SPDX-License-Identifier: Apache-2.0
// Maps of features and what heads for dense tasks do with them. One image at a time, channel-last float32 on the CPU.
// Every call is cut into rows for the context's threads; no result depends on the cut. Sizes are the caller's care:
// they were checked when the network was loaded. Implemented by the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/context_internals.h"
#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace vimcore {

struct Map {
    float* data = nullptr;  // pixel (0, 0)
    std::int64_t height = 0, width = 0, channels = 0;
    std::int64_t pixel = 0, row = 0;  // floats from one to the next

    float* at(std::int64_t y, std::int64_t x = 0) const { return data + y * row + x * pixel; }
    Map part(std::int64_t first, std::int64_t count) const  // some of the channels
    {
        return {data + first, height, width, count, pixel, row};
    }
};

// In the context's scratch memory, with `margin` pixels of zeros around it.
Map take_map(Context& ctx, std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t margin = 0);

enum class Activation : std::uint8_t { none, relu, gelu };

// A convolution with its weights packed for matrix products, which read the pixels where they lie:
//   same  kernel 1 or 3, stride 1, zeros around; three neighbours in a row are one row of a matrix, so that a kernel of
//         3 is three products. x is contiguous within its rows and has a margin then.
//   up    transposed, kernel 2, stride 2: a product for each of the two rows that a row becomes.
class Convolution {
public:
    Convolution() = default;
    // weight (out, in, kernel, kernel), bias (out) or null
    static Convolution same(std::int64_t kernel, std::int64_t in, std::int64_t out, const float* weight,
                            const float* bias, Activation activation);
    // weight (in, out, 2, 2), bias (out) or null
    static Convolution up(std::int64_t in, std::int64_t out, const float* weight, const float* bias,
                          Activation activation);

    std::int64_t in() const { return in_; }
    std::int64_t out() const { return out_; }
    std::int64_t kernel() const { return kernel_; }
    void operator()(Context& ctx, const Map& x, const Map& y) const;

private:
    void pack(const float* matrices, const float* bias);

    std::int64_t kernel_ = 0, in_ = 0, out_ = 0;
    std::int64_t products_ = 0, columns_ = 0, depth_ = 0;  // matrices (columns, depth)
    Activation activation_ = Activation::none;
    Buffer packed_, bias_;
};

// Where the pixels of a longer or shorter row lie in another, by half-pixel centres, clamped to it.
struct Places {
    std::span<long long> left, right;
    std::span<float> part;  // the right one's
};
Places take_places(Context& ctx, std::int64_t from, std::int64_t to);

// y = x resized to it, bilinear, or added to what it holds. x is contiguous within its rows.
void resize_linear(Context& ctx, const Map& x, const Map& y, bool add);

// Means over the bins floor(i n / s) .. ceil((i + 1) n / s) of both axes.
void average_pool(Context& ctx, const Map& x, const Map& y);
// Maxima of squares of `side` pixels, or of as many as there are; what is left over at the right and below is passed
// over.
void max_pool(Context& ctx, const Map& x, std::int64_t side, const Map& y);

// x = activation((x - mean) / sqrt(variance + eps) weight + bias); mean and variance of each group of channels.
struct GroupNorm {
    std::int64_t groups = 1;
    double eps = 1e-5;
    const float *weight = nullptr, *bias = nullptr;  // (channels)
    Activation activation = Activation::none;
};
void group_norm(Context& ctx, const GroupNorm& norm, const Map& x);

// Single rows, for one thread. out (count) = a + part (b - a).
void blend_row(const float* a, const float* b, float part, float* out, std::int64_t count);
// out (places, channels) = or += pixels of `row` at these places.
void stretch_row(const float* row, std::int64_t channels, const Places& places, float* out, bool add);
// The first largest channel of the pixels at these places.
void arg_max_row(const float* row, std::int64_t channels, const Places& places, std::uint8_t* out);

}  // namespace vimcore
