// SPDX-License-Identifier: Apache-2.0
// Operators on maps of features against naive loops in double, on one and on several threads; their kernels of every
// instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "core/maps.h"
#include "isa.h"

using namespace vimcore;

namespace {

unsigned state = 1;
float random_value()
{
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}
std::vector<float> random_values(std::int64_t count)
{
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = random_value();
    return values;
}

// A map filled from (height, width, channels), and back.
Map map_of(Context& ctx, std::int64_t h, std::int64_t w, std::int64_t c, const std::vector<float>& values,
           std::int64_t margin)
{
    const Map map = take_map(ctx, h, w, c, margin);
    for (std::int64_t i = 0; i < h * w * c; i++)
        map.at(i / c / w, i / c % w)[i % c] = values[static_cast<std::size_t>(i)];
    return map;
}
std::vector<float> values_of(const Map& map)
{
    std::vector<float> values;
    for (std::int64_t y = 0; y < map.height; y++)
        for (std::int64_t x = 0; x < map.width; x++)
            values.insert(values.end(), map.at(y, x), map.at(y, x) + map.channels);
    return values;
}

void check_all(const std::vector<float>& got, const std::vector<double>& want, double tolerance)
{
    CHECK(got.size() == want.size());
    for (std::size_t i = 0; i < got.size() && i < want.size(); i++) CHECK_CLOSE(got[i], want[i], tolerance);
}

double activated(Activation activation, double x)
{
    if (activation == Activation::relu) return std::max(x, 0.0);
    if (activation == Activation::gelu) return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    return x;
}

// f(context) gives the same bits on any number of threads.
template <class F>
std::vector<float> same_on_threads(F&& f)
{
    std::vector<float> first;
    for (const int threads : {1, 2, 3}) {
        Context ctx(Device::cpu(), threads);
        const Arena::Scope scope(arena_of(ctx));
        const std::vector<float> values = f(ctx);
        if (threads == 1) first = values;
        CHECK(values == first);
    }
    return first;
}

struct Case {
    std::int64_t kernel, h, w, in, out;
    Activation activation;
    bool bias;
};

void test_convolution(const Case& c)
{
    const bool up = c.kernel == 2;
    const std::int64_t k = c.kernel, h = c.h, w = c.w, in = c.in, out = c.out, spare = 3;
    const std::vector<float> x = random_values(h * w * in), weight = random_values(k * k * in * out),
                             bias = random_values(out);
    const float* b = c.bias ? bias.data() : nullptr;
    const Convolution conv = up ? Convolution::up(in, out, weight.data(), b, c.activation)
                                : Convolution::same(k, in, out, weight.data(), b, c.activation);
    const std::int64_t scale = up ? 2 : 1;
    const std::vector<float> got = same_on_threads([&](Context& ctx) {
        const Map from = map_of(ctx, h, w, in, x, up ? 0 : k / 2);
        // Into some channels of a wider map: the others stay.
        const Map wide = take_map(ctx, scale * h, scale * w, up ? out : out + spare, 1);
        for (std::int64_t i = 0; i < wide.height * wide.width * wide.channels; i++)
            wide.at(i / wide.channels / wide.width, i / wide.channels % wide.width)[i % wide.channels] = 7;
        const Map to = up ? wide : wide.part(spare, out);
        conv(ctx, from, to);
        for (std::int64_t y = 0; y < wide.height; y++) {
            CHECK(wide.at(y, -1)[0] == 0 && wide.at(y, wide.width)[wide.channels - 1] == 0);
            if (!up) CHECK(wide.at(y, 0)[spare - 1] == 7);
        }
        return values_of(to);
    });
    std::vector<double> want;
    const auto at = [&](std::int64_t y, std::int64_t col, std::int64_t i) {
        return y < 0 || y >= h || col < 0 || col >= w ? 0.0
                                                      : double{x[static_cast<std::size_t>((y * w + col) * in + i)]};
    };
    for (std::int64_t y = 0; y < scale * h; y++)
        for (std::int64_t col = 0; col < scale * w; col++)
            for (std::int64_t o = 0; o < out; o++) {
                double sum = c.bias ? bias[static_cast<std::size_t>(o)] : 0;
                for (std::int64_t i = 0; i < in; i++)
                    for (std::int64_t t = 0; t < (up ? 1 : k * k); t++)
                        if (up)
                            sum += at(y / 2, col / 2, i) *
                                   weight[static_cast<std::size_t>(((i * out + o) * 2 + y % 2) * 2 + col % 2)];
                        else
                            sum += at(y + t / k - k / 2, col + t % k - k / 2, i) *
                                   weight[static_cast<std::size_t>((o * in + i) * k * k + t)];
                want.push_back(activated(c.activation, sum));
            }
    check_all(got, want, 2e-6 * static_cast<double>(k * k * in));
}

std::vector<double> resized(const std::vector<float>& x, std::int64_t h, std::int64_t w, std::int64_t c, std::int64_t H,
                            std::int64_t W)
{
    std::vector<double> out;
    const auto place = [](std::int64_t i, std::int64_t from, std::int64_t to) {
        const double at = (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
        return std::clamp(at, 0.0, static_cast<double>(from - 1));
    };
    for (std::int64_t y = 0; y < H; y++)
        for (std::int64_t col = 0; col < W; col++)
            for (std::int64_t k = 0; k < c; k++) {
                const double a = place(y, h, H), b = place(col, w, W);
                const auto r = static_cast<std::int64_t>(a), s = static_cast<std::int64_t>(b);
                const auto value = [&](std::int64_t i, std::int64_t j) {
                    return double{x[static_cast<std::size_t>((std::min(i, h - 1) * w + std::min(j, w - 1)) * c + k)]};
                };
                const double p = a - static_cast<double>(r), q = b - static_cast<double>(s);
                out.push_back((1 - p) * ((1 - q) * value(r, s) + q * value(r, s + 1)) +
                              p * ((1 - q) * value(r + 1, s) + q * value(r + 1, s + 1)));
            }
    return out;
}

void test_resize(std::int64_t h, std::int64_t w, std::int64_t c, std::int64_t H, std::int64_t W)
{
    const std::vector<float> x = random_values(h * w * c), old = random_values(H * W * c);
    std::vector<double> want = resized(x, h, w, c, H, W);
    const auto run = [&](bool add) {
        return same_on_threads([&](Context& ctx) {
            const Map to = map_of(ctx, H, W, c, old, 1);
            resize_linear(ctx, map_of(ctx, h, w, c, x, 1), to, add);
            return values_of(to);
        });
    };
    check_all(run(false), want, 1e-5);
    for (std::size_t i = 0; i < want.size(); i++) want[i] += old[i];
    check_all(run(true), want, 1e-5);
}

void test_pools(std::int64_t h, std::int64_t w, std::int64_t c)
{
    const std::vector<float> x = random_values(h * w * c);
    const auto value = [&](std::int64_t y, std::int64_t col, std::int64_t k) {
        return double{x[static_cast<std::size_t>((y * w + col) * c + k)]};
    };
    for (const std::int64_t bins : {1, 2, 3, 6}) {
        std::vector<double> want;
        for (std::int64_t i = 0; i < bins * bins * c; i++) {
            const std::int64_t a = i / c / bins, b = i / c % bins;
            double sum = 0, count = 0;
            for (std::int64_t y = a * h / bins; y < ((a + 1) * h + bins - 1) / bins; y++)
                for (std::int64_t col = b * w / bins; col < ((b + 1) * w + bins - 1) / bins; col++)
                    sum += value(y, col, i % c), count++;
            want.push_back(sum / count);
        }
        check_all(same_on_threads([&](Context& ctx) {
                      const Map to = take_map(ctx, bins, bins, c);
                      average_pool(ctx, map_of(ctx, h, w, c, x, 0), to);
                      return values_of(to);
                  }),
                  want, 1e-6);
    }
    for (const std::int64_t side : {2, 4, 8}) {
        const std::int64_t H = std::max<std::int64_t>(h / side, 1), W = std::max<std::int64_t>(w / side, 1);
        std::vector<double> want;
        for (std::int64_t i = 0; i < H * W * c; i++) {
            double most = -2;
            for (std::int64_t y = i / c / W * side; y < std::min(h, (i / c / W + 1) * side); y++)
                for (std::int64_t col = i / c % W * side; col < std::min(w, (i / c % W + 1) * side); col++)
                    most = std::max(most, value(y, col, i % c));
            want.push_back(most);
        }
        check_all(same_on_threads([&](Context& ctx) {
                      const Map to = take_map(ctx, H, W, c);
                      max_pool(ctx, map_of(ctx, h, w, c, x, 0), side, to);
                      return values_of(to);
                  }),
                  want, 0);
    }
}

void test_group_norm(std::int64_t groups, std::int64_t c, Activation activation)
{
    const std::int64_t h = 5, w = 7, size = c / groups;
    std::vector<float> x = random_values(h * w * c);
    for (float& value : x) value = 3 * value + 2;
    const std::vector<float> weight = random_values(c), bias = random_values(c);
    const std::vector<float> got = same_on_threads([&](Context& ctx) {
        const Map map = map_of(ctx, h, w, c, x, 1);
        group_norm(
            ctx,
            {.groups = groups, .eps = 1e-5, .weight = weight.data(), .bias = bias.data(), .activation = activation},
            map);
        return values_of(map);
    });
    std::vector<double> want(x.size());
    for (std::int64_t g = 0; g < groups; g++) {
        double mean = 0, variance = 0;
        const auto each = [&](auto&& f) {
            for (std::int64_t i = 0; i < h * w; i++)
                for (std::int64_t k = g * size; k < (g + 1) * size; k++) f(static_cast<std::size_t>(i * c + k), k);
        };
        const auto count = static_cast<double>(h * w * size);
        each([&](std::size_t i, std::int64_t) { mean += x[i] / count; });
        each([&](std::size_t i, std::int64_t) { variance += (x[i] - mean) * (x[i] - mean) / count; });
        each([&](std::size_t i, std::int64_t k) {
            const auto at = static_cast<std::size_t>(k);
            want[i] = activated(activation, (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[at] + bias[at]);
        });
    }
    check_all(got, want, 1e-5);
}

// Kernels of float against the same ones of double, for any rest of a vector.
void test_kernels(const std::string& isa)
{
    const cpu::Kernels<float>& single = cpu::kernels<float>(isa);
    const cpu::Kernels<double>& wide = cpu::kernels<double>(isa);
    for (const long long n : {1, 3, 7, 8, 15, 16, 33}) {
        std::vector<float> a = random_values(n), b = random_values(n), out(static_cast<std::size_t>(n));
        for (float& value : a) value *= 4;
        const std::vector<double> da(a.begin(), a.end()), db(b.begin(), b.end());
        std::vector<double> dout(static_cast<std::size_t>(n));
        single.blend(a.data(), b.data(), 0.3f, out.data(), n);
        wide.blend(da.data(), db.data(), 0.3, dout.data(), n);
        check_all(out, dout, 1e-6);
        out = a, dout = da;
        single.relu(out.data(), n);
        wide.relu(dout.data(), n);
        check_all(out, dout, 0);
        out = a, dout = da;
        single.gelu(out.data(), n);
        for (std::size_t i = 0; i < dout.size(); i++) CHECK_CLOSE(out[i], activated(Activation::gelu, da[i]), 1e-6);
        wide.gelu(dout.data(), n);
        for (std::size_t i = 0; i < dout.size(); i++) CHECK_CLOSE(dout[i], activated(Activation::gelu, da[i]), 1e-14);
    }
    float none[3] = {std::nanf(""), -1, std::nanf("")};  // what is no number stays none
    single.relu(none, 3);
    CHECK(std::isnan(none[0]) && none[1] == 0 && std::isnan(none[2]));

    // Three pixels of n channels, places between and on them: the first of the largest.
    const long long left[] = {0, 0, 1, 2}, right[] = {1, 1, 2, 2};
    const float part[] = {0, 0.5f, 0.25f, 0};
    for (const int n : {1, 2, 7, 8, 9, 17, 255}) {
        std::vector<float> row = random_values(3 * n);
        for (float& value : row) value = std::round(3 * value);  // many are equal
        std::vector<float> out(static_cast<std::size_t>(4 * n), 1.0f);
        unsigned char classes[4];
        single.stretch({row.data(), n, left, right, part, 4, out.data(), n, true});
        single.arg_max({row.data(), n, left, right, part, 4, nullptr, n, false}, classes);
        for (int x = 0; x < 4; x++) {
            float* values = out.data() + x * n;
            for (int c = 0; c < n; c++) {
                const float a = row[static_cast<std::size_t>(left[x] * n + c)];
                const float b = row[static_cast<std::size_t>(right[x] * n + c)];
                CHECK_CLOSE(values[c], 1 + a + part[x] * (b - a), 0);  // exact for these numbers
            }
            CHECK(classes[x] == std::max_element(values, values + n) - values);
        }
    }
}

}  // namespace

int main()
{
    using enum Activation;
    for (const Case& c :
         {Case{1, 3, 5, 7, 9, none, true}, Case{1, 1, 1, 1, 1, relu, false}, Case{3, 4, 6, 5, 27, relu, true},
          Case{3, 1, 1, 4, 8, none, false}, Case{3, 2, 131, 3, 25, gelu, true}, Case{3, 9, 33, 100, 50, relu, true},
          Case{1, 2, 300, 600, 2, none, true}, Case{2, 3, 5, 6, 13, gelu, true}, Case{2, 1, 140, 3, 24, relu, false},
          Case{2, 7, 2, 70, 30, none, true}})
        test_convolution(c);
    test_resize(4, 5, 9, 16, 20);
    test_resize(1, 1, 3, 6, 5);
    test_resize(7, 12, 16, 3, 5);
    test_resize(6, 6, 1, 6, 6);
    test_pools(1, 1, 3);
    test_pools(9, 16, 8);
    test_pools(3, 25, 10);
    test_group_norm(1, 3, none);
    test_group_norm(4, 12, relu);
    test_group_norm(8, 8, gelu);
    for (const std::string& isa : cpu::isas_of_float()) test_kernels(isa);
    return check_failures();
}
