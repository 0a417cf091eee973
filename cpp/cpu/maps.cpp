// SPDX-License-Identifier: Apache-2.0
// Convolutions as matrix products, interpolation and pools of feature maps.
#include "core/maps.h"

#include <cmath>
#include <vector>

#include "cpu_backend.h"

namespace vimcore {

using cpu::ceil_div;
using cpu::Index;
using cpu::parallel_for;
using cpu::round_up;

namespace {

constexpr Index block_pixels = 128;   // that share a panel of weights while it is in the cache
constexpr Index panel_floats = 6144;  // of a panel's piece, 24 KiB

// Pieces of `count` rows; a few for each thread.
template <class F>
void for_rows(Context& ctx, Index count, F&& f)
{
    const Index pieces = std::min<Index>(count, ctx.threads() > 1 ? 4 * ctx.threads() : 1);
    parallel_for(ctx, pieces, [&](Index piece) { f(piece, piece * count / pieces, (piece + 1) * count / pieces); });
}
Index row_pieces(Context& ctx, Index count)
{
    return std::min<Index>(count, ctx.threads() > 1 ? 4 * ctx.threads() : 1);
}

void activate(Activation activation, float* y, Index count)
{
    if (activation == Activation::relu) cpu::kernels<float>().relu(y, count);
    if (activation == Activation::gelu) cpu::kernels<float>().gelu(y, count);
}

}  // namespace

Map take_map(Context& ctx, std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t margin)
{
    const std::int64_t rows = height + 2 * margin, columns = width + 2 * margin;
    const Tensor memory = arena_of(ctx).take({rows, columns, channels}, DType::f32);
    const Map map{memory.as<float>() + (margin * columns + margin) * channels,
                  height,
                  width,
                  channels,
                  channels,
                  columns * channels};
    if (margin == 0 || counts(ctx)) return map;
    const std::int64_t band = margin * map.row, side = margin * channels;
    std::fill_n(memory.as<float>(), band, 0.0f);
    std::fill_n(map.at(height, -margin), band, 0.0f);
    for (std::int64_t y = 0; y < height; y++) {
        std::fill_n(map.at(y, -margin), side, 0.0f);
        std::fill_n(map.at(y, width), side, 0.0f);
    }
    return map;
}

Convolution Convolution::same(std::int64_t kernel, std::int64_t in, std::int64_t out, const float* weight,
                              const float* bias, Activation activation)
{
    Convolution c;
    c.kernel_ = kernel, c.in_ = in, c.out_ = out, c.activation_ = activation;
    c.products_ = kernel, c.columns_ = out, c.depth_ = kernel * in;
    std::vector<float> matrices(static_cast<std::size_t>(kernel * kernel * in * out));
    float* to = matrices.data();
    for (std::int64_t dy = 0; dy < kernel; dy++)
        for (std::int64_t o = 0; o < out; o++)
            for (std::int64_t dx = 0; dx < kernel; dx++)
                for (std::int64_t i = 0; i < in; i++) *to++ = weight[((o * in + i) * kernel + dy) * kernel + dx];
    c.pack(matrices.data(), bias);
    return c;
}

Convolution Convolution::up(std::int64_t in, std::int64_t out, const float* weight, const float* bias,
                            Activation activation)
{
    Convolution c;
    c.kernel_ = 2, c.in_ = in, c.out_ = out, c.activation_ = activation;
    c.products_ = 2, c.columns_ = 2 * out, c.depth_ = in;
    std::vector<float> matrices(static_cast<std::size_t>(4 * in * out)), both;
    float* to = matrices.data();
    for (std::int64_t dy = 0; dy < 2; dy++)
        for (std::int64_t dx = 0; dx < 2; dx++)
            for (std::int64_t o = 0; o < out; o++)
                for (std::int64_t i = 0; i < in; i++) *to++ = weight[((i * out + o) * 2 + dy) * 2 + dx];
    if (bias) {
        both.assign(bias, bias + out);
        both.insert(both.end(), bias, bias + out);
    }
    c.pack(matrices.data(), bias ? both.data() : nullptr);
    return c;
}

void Convolution::pack(const float* matrices, const float* bias)
{
    const cpu::Kernels<float>& kernel = cpu::kernels<float>();
    const Index size = round_up(columns_, kernel.nr) * depth_;
    packed_ = Buffer(static_cast<std::size_t>(products_ * size) * sizeof(float));
    for (Index p = 0; p < products_; p++)
        kernel.pack({.w = matrices + p * columns_ * depth_,
                     .ldw = depth_,
                     .n = columns_,
                     .k = depth_,
                     .transposed = false,
                     .out = static_cast<float*>(packed_.data()) + p * size});
    if (!bias) return;
    bias_ = Buffer(static_cast<std::size_t>(columns_) * sizeof(float));
    std::copy_n(bias, columns_, static_cast<float*>(bias_.data()));
}

void Convolution::operator()(Context& ctx, const Map& x, const Map& y) const
{
    const cpu::Kernels<float>& kernel = cpu::kernels<float>();
    const bool up = kernel_ == 2;
    const Index panels = ceil_div(columns_, kernel.nr), size = panels * kernel.nr * depth_;
    const auto* packed = static_cast<const float*>(packed_.data());
    const auto* bias = static_cast<const float*>(bias_.data());
    // A task is a block of rows, or a part of a long one. It goes through pieces of the sums, of which a panel fits the
    // first-level cache, and the block's part the second.
    const Index rows = std::max<Index>(1, block_pixels / std::max<Index>(x.width, 1));
    const Index parts = ceil_div(x.width, block_pixels), row_tasks = ceil_div(x.height, rows),
                blocks = row_tasks * parts;
    const Index pieces = ceil_div(depth_, std::max<Index>(panel_floats / kernel.nr, 1));
    const Index panel_parts =
        ctx.threads() > 1 ? std::clamp<Index>(ceil_div(2 * ctx.threads(), std::max<Index>(blocks, 1)), 1, panels) : 1;

    parallel_for(ctx, blocks * panel_parts, [&](Index task) {
        const Index block = task / panel_parts, share = task % panel_parts;
        const Index first = block / parts * rows, last = std::min<Index>(first + rows, x.height);
        const Index left = block % parts * x.width / parts, width = (block % parts + 1) * x.width / parts - left;
        const Index panel_begin = share * panels / panel_parts, panel_end = (share + 1) * panels / panel_parts;
        const auto multiply = [&](Index p, Index piece, Index panel, Index r) {
            const Index begin = piece * depth_ / pieces, depth = (piece + 1) * depth_ / pieces - begin;
            const bool start = piece == 0 && (up || p == 0);
            const float* in = up ? x.at(r, left) : x.at(r + p - kernel_ / 2, left - kernel_ / 2);
            // One panel, of which gemm looks for the first row at panel * nr * depth.
            kernel.gemm({.x = in + begin,
                         .ldx = x.pixel,
                         .packed = packed + p * size + panel * kernel.nr * (depth_ - depth) + begin * kernel.nr,
                         .bias = start ? bias : nullptr,
                         .y = up ? y.at(2 * r + p, 2 * left) : y.at(r, left),
                         .ldy = up ? 2 * y.pixel : y.pixel,
                         .m = width,
                         .n = columns_,
                         .k = depth,
                         .panel_begin = panel,
                         .panel_end = panel + 1,
                         .add = !start});
        };
        for (Index p = 0; p < products_; p++)
            for (Index piece = 0; piece < pieces; piece++)
                for (Index panel = panel_begin; panel < panel_end; panel++)
                    for (Index r = first; r < last; r++) multiply(p, piece, panel, r);
        if (activation_ == Activation::none) return;
        const Index from = panel_begin * kernel.nr, count = std::min<Index>(panel_end * kernel.nr, columns_) - from;
        const Index step = up ? 2 * y.pixel : y.pixel;
        for (Index r = up ? 2 * first : first; r < (up ? 2 * last : last); r++) {
            float* out = y.at(r, up ? 2 * left : left) + from;
            if (count == step)
                activate(activation_, out, width * count);
            else
                for (Index i = 0; i < width; i++) activate(activation_, out + i * step, count);
        }
    });
}

Places take_places(Context& ctx, std::int64_t from, std::int64_t to)
{
    const auto count = static_cast<std::size_t>(to);
    const Tensor index = arena_of(ctx).take({2, to}, DType::i64), part = arena_of(ctx).take({to}, DType::f32);
    auto* first = index.as<long long>();
    const Places places{{first, count}, {first + to, count}, {part.as<float>(), count}};
    if (counts(ctx)) return places;
    const float scale = static_cast<float>(from) / static_cast<float>(to);  // in float32, as torch does
    for (std::size_t i = 0; i < count; i++) {
        const float at = std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
        places.left[i] = std::min(static_cast<long long>(at), static_cast<long long>(from - 1));
        places.right[i] = std::min(places.left[i] + 1, static_cast<long long>(from - 1));
        places.part[i] = std::min(std::max(at - static_cast<float>(places.left[i]), 0.0f), 1.0f);
    }
    return places;
}

void blend_row(const float* a, const float* b, float part, float* out, std::int64_t count)
{
    cpu::kernels<float>().blend(a, b, part, out, count);
}

void stretch_row(const float* row, std::int64_t channels, const Places& places, float* out, bool add)
{
    cpu::kernels<float>().stretch({row, channels, places.left.data(), places.right.data(), places.part.data(),
                                   static_cast<Index>(places.left.size()), out, channels, add});
}

void arg_max_row(const float* row, std::int64_t channels, const Places& places, std::uint8_t* out)
{
    cpu::kernels<float>().arg_max({row, channels, places.left.data(), places.right.data(), places.part.data(),
                                   static_cast<Index>(places.left.size()), nullptr, channels, false},
                                  out);
}

void resize_linear(Context& ctx, const Map& x, const Map& y, bool add)
{
    Arena::Scope scope(arena_of(ctx));
    const cpu::Kernels<float>& kernel = cpu::kernels<float>();
    const Places rows = take_places(ctx, x.height, y.height), columns = take_places(ctx, x.width, y.width);
    const Index length = x.width * x.channels;
    const Tensor own = arena_of(ctx).take({row_pieces(ctx, y.height), length}, DType::f32);
    for_rows(ctx, y.height, [&](Index piece, Index begin, Index end) {
        auto* row = own.as<float>() + piece * length;
        for (Index r = begin; r < end; r++) {
            const auto i = static_cast<std::size_t>(r);
            kernel.blend(x.at(rows.left[i]), x.at(rows.right[i]), rows.part[i], row, length);
            kernel.stretch({row, x.channels, columns.left.data(), columns.right.data(), columns.part.data(), y.width,
                            y.at(r), y.pixel, add});
        }
    });
}

void average_pool(Context& ctx, const Map& x, const Map& y)
{
    Arena::Scope scope(arena_of(ctx));
    const Index bins = y.height * y.width;
    const Tensor sums = arena_of(ctx).take({bins, x.channels}, DType::f64);
    parallel_for(ctx, bins, [&](Index bin) {
        const Index i = bin / y.width, j = bin % y.width;
        const Index top = i * x.height / y.height, bottom = ceil_div((i + 1) * x.height, y.height);
        const Index left = j * x.width / y.width, right = ceil_div((j + 1) * x.width, y.width);
        double* sum = sums.as<double>() + bin * x.channels;
        std::fill_n(sum, x.channels, 0.0);
        for (Index r = top; r < bottom; r++)
            for (Index k = left; k < right; k++)
                for (Index c = 0; c < x.channels; c++) sum[c] += x.at(r, k)[c];
        const auto count = static_cast<double>((bottom - top) * (right - left));
        for (Index c = 0; c < x.channels; c++) y.at(i, j)[c] = static_cast<float>(sum[c] / count);
    });
}

void max_pool(Context& ctx, const Map& x, std::int64_t side, const Map& y)
{
    const Index down = std::min<Index>(side, x.height), right = std::min<Index>(side, x.width);
    for_rows(ctx, y.height, [&](Index, Index begin, Index end) {
        for (Index r = begin; r < end; r++)
            for (Index k = 0; k < y.width; k++) {
                float* out = y.at(r, k);
                std::copy_n(x.at(r * side, k * side), x.channels, out);
                for (Index i = 1; i < down * right; i++) {
                    const float* in = x.at(r * side + i / right, k * side + i % right);
                    for (Index c = 0; c < x.channels; c++) out[c] = in[c] > out[c] || in[c] != in[c] ? in[c] : out[c];
                }
            }
    });
}

void group_norm(Context& ctx, const GroupNorm& norm, const Map& x)
{
    Arena::Scope scope(arena_of(ctx));
    const Index size = x.channels / norm.groups, groups = norm.groups;
    const Tensor sums = arena_of(ctx).take({x.height, groups, 2}, DType::f64);
    const Tensor factors = arena_of(ctx).take({2, x.channels}, DType::f32);
    for_rows(ctx, x.height, [&](Index, Index begin, Index end) {
        for (Index r = begin; r < end; r++) {
            double* sum = sums.as<double>() + 2 * groups * r;
            std::fill_n(sum, 2 * groups, 0.0);
            for (Index k = 0; k < x.width; k++)
                for (Index c = 0; c < x.channels; c++) {
                    const double value = x.at(r, k)[c];
                    sum[c / size * 2] += value;
                    sum[c / size * 2 + 1] += value * value;
                }
        }
    });
    if (counts(ctx)) return;
    float *scale = factors.as<float>(), *shift = scale + x.channels;
    const auto count = static_cast<double>(x.height * x.width * size);
    for (Index g = 0; g < groups; g++) {
        double mean = 0, square = 0;
        for (Index r = 0; r < x.height; r++) {
            mean += sums.as<double>()[2 * (r * groups + g)];
            square += sums.as<double>()[2 * (r * groups + g) + 1];
        }
        mean /= count;
        const double rstd = 1 / std::sqrt(std::max(square / count - mean * mean, 0.0) + norm.eps);
        for (Index c = g * size; c < (g + 1) * size; c++) {
            scale[c] = static_cast<float>(norm.weight[c] * rstd);
            shift[c] = static_cast<float>(norm.bias[c] - mean * norm.weight[c] * rstd);
        }
    }
    for_rows(ctx, x.height, [&](Index, Index begin, Index end) {
        for (Index r = begin; r < end; r++)
            for (Index k = 0; k < x.width; k++) {
                float* at = x.at(r, k);
                for (Index c = 0; c < x.channels; c++) at[c] = at[c] * scale[c] + shift[c];
                activate(norm.activation, at, x.channels);
            }
    });
}

}  // namespace vimcore
