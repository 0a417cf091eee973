// SPDX-License-Identifier: Apache-2.0
// bfloat16 activations on the CPU: the network against itself in float64, and what must not change its answers. It runs
// on the machine's unit for bf16 where there is one, with the argument `emulated` on none, and `brief` a part of it.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "core/context_internals.h"
#include "isa.h"
#include "vimcore/vimcore.h"

using namespace vimcore;
using cpu::bf16;

namespace {

template <class T>
constexpr DType type = DType::bf16;
template <>
constexpr DType type<float> = DType::f32;
template <>
constexpr DType type<double> = DType::f64;

// Weights or zeros of type W with their memory; the same numbers for every W.
template <class W>
struct Weights {
    Params params;
    std::map<std::string, std::vector<W>> values;

    Weights(const Config& config, bool random)
    {
        std::mt19937 rng(7);
        std::normal_distribution<float> normal;
        for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            std::vector<W>& v = values[name];
            v.resize(static_cast<std::size_t>(shape.numel()));
            const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
            const float fan = static_cast<float>(shape.numel() / shape[0]);
            for (std::size_t i = 0; random && i < v.size(); i++) {
                const float draw = normal(rng);
                float value = 0.02f * draw;
                if (has("A_log") || has("A_b_log"))
                    value = std::log(1.0f + static_cast<float>(i % static_cast<std::size_t>(config.d_state)));
                else if (has("dt_proj") && has("bias"))
                    value = -4.6f + 1.2f * draw;
                else if (has("norm") || name.ends_with(".D") || name.ends_with("D_b"))
                    value = 1.0f;
                else if (shape.rank() > 1 && !has("cls_token") && !has("pos_embed"))
                    value = draw / std::sqrt(fan);
                v[i] = static_cast<W>(value);
            }
            tensor = {v.data(), shape, type<W>, {}};
        });
        params.changed();
    }
};

Config small(Directions directions, std::int64_t dim = 24)
{
    Config c;
    c.img_height = 40;
    c.img_width = 56;  // 10 x 14 patches: three tiles of 64 tokens
    c.patch_size = c.stride = 4;
    c.embed_dim = dim;
    c.depth = 2;
    c.num_classes = 5;
    c.directions = directions;
    c.validate();
    return c;
}

std::vector<float> images_of(const Config& c, std::int64_t batch)
{
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    std::vector<float> images(static_cast<std::size_t>(batch * c.in_chans * c.img_height * c.img_width));
    for (float& v : images) v = static_cast<float>(bf16(normal(rng)));  // exact in every type
    return images;
}

template <class T>
std::vector<double> as_doubles(const std::vector<T>& v)
{
    return {v.begin(), v.end()};
}

// |a - b| / |b|
double relative(const std::vector<double>& a, const std::vector<double>& b)
{
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < b.size(); i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return std::sqrt(difference / norm);
}

struct Run {
    std::vector<double> logits, dimages;
    std::map<std::string, std::vector<double>> grads;
};

// Activations of T, everything else of cpu::Wide<T>.
template <class T>
Run run(const Config& c, const std::vector<float>& images, std::int64_t batch, int threads, std::int64_t tile,
        bool train)
{
    using W = cpu::Wide<T>;
    Weights<W> weights(c, true);
    Context ctx(Device::cpu(), threads);
    internals(ctx).tile = tile;
    const std::vector<T> x(images.begin(), images.end());
    const auto tensor = [&](const std::vector<T>& v, const Shape& shape) {
        return Tensor{const_cast<T*>(v.data()), shape, type<T>, {}};
    };
    const Shape shape{batch, c.in_chans, c.img_height, c.img_width}, outputs{batch, c.num_classes};
    std::vector<T> logits(static_cast<std::size_t>(outputs.numel()));
    Outputs out;
    out.logits = tensor(logits, outputs);
    Run r;
    if (!train) {
        forward(ctx, c, weights.params, tensor(x, shape), out);
        r.logits = as_doubles(logits);
        return r;
    }
    Saved saved;
    Weights<W> gradients(c, false);
    std::vector<T> dlogits, dimages(x.size());
    for (std::size_t i = 0; i < logits.size(); i++) dlogits.push_back(T(0.125f * static_cast<float>(i % 7) - 0.375f));
    Outputs dout;
    dout.logits = tensor(dlogits, outputs);
    forward(ctx, c, weights.params, tensor(x, shape), out, &saved);
    backward(ctx, c, weights.params, tensor(x, shape), saved, dout, gradients.params, tensor(dimages, shape));
    r.logits = as_doubles(logits);
    r.dimages = as_doubles(dimages);
    for (const auto& [name, values] : gradients.values) r.grads[name] = as_doubles(values);
    return r;
}

void test_network(Directions directions, std::int64_t dim)
{
    const Config c = small(directions, dim);
    const std::int64_t batch = 3;
    const std::vector<float> images = images_of(c, batch);
    const Run exact = run<double>(c, images, batch, 1, 0, true), narrow = run<bf16>(c, images, batch, 1, 0, true);
    const double of_logits = relative(narrow.logits, exact.logits);
    std::printf("directions %d, width %d: logits %.2g", static_cast<int>(directions), static_cast<int>(dim), of_logits);
    CHECK(of_logits < 0.02 && of_logits > 0);
    double worst = relative(narrow.dimages, exact.dimages);
    for (const auto& [name, values] : exact.grads) worst = std::max(worst, relative(narrow.grads.at(name), values));
    std::printf(", the worst gradient %.2g\n", worst);
    CHECK(worst < 0.08);

    // Nothing else changes a bit.
    CHECK(run<bf16>(c, images, batch, 1, 0, false).logits == narrow.logits);
    for (int threads : {1, 2, 3}) {
        const Run again = run<bf16>(c, images, batch, threads, 0, true);
        CHECK(again.logits == narrow.logits && again.dimages == narrow.dimages && again.grads == narrow.grads);
        CHECK(run<bf16>(c, images, batch, threads, 64, false).logits == narrow.logits);
    }
    const std::size_t image = images.size() / static_cast<std::size_t>(batch);
    const std::vector<float> last(images.end() - static_cast<std::ptrdiff_t>(image), images.end());
    const std::vector<double> alone = run<bf16>(c, last, 1, 2, 0, false).logits;
    CHECK(std::equal(alone.begin(), alone.end(), narrow.logits.end() - c.num_classes));
}

// ---- the yardstick: linear maps as torch computes them in bf16, all else exactly
// -------------------------------------- Inputs, weights and outputs of every linear map are rounded to bf16; sums,
// residual, norms, convolution and scan are of float64.

std::vector<double> rounded(std::vector<double> values)
{
    for (double& v : values) v = double(float(bf16(float(v))));
    return values;
}

struct Yardstick {
    const Config& c;
    Weights<double> weights;
    Context ctx{Device::cpu(), 2};
    std::int64_t len = c.tokens();

    explicit Yardstick(const Config& config) : c(config), weights(config, true) {}

    static Tensor tensor(std::vector<double>& v, const Shape& shape) { return {v.data(), shape, DType::f64, {}}; }
    std::vector<double> linear(const std::vector<double>& input, const Tensor& weight, const Tensor& bias = {})
    {
        std::vector<double> x = rounded(input), w(weight.as<double>(), weight.as<double>() + weight.numel());
        w = rounded(w);
        const std::int64_t n = weight.size(0), k = weight.numel() / n, m = static_cast<std::int64_t>(x.size()) / k;
        std::vector<double> y(static_cast<std::size_t>(m * n));
        const LinearForward args{
            .x = tensor(x, {m, k}), .weight = tensor(w, {n, k}), .bias = bias, .y = tensor(y, {m, n})};
        linear_forward(ctx, {&args, 1});
        return rounded(y);
    }
    std::vector<double> norm(std::vector<double>& h, std::vector<double>& residual, const Tensor& weight)
    {
        const Shape shape{1, len, c.embed_dim};
        std::vector<double> out(h.size());
        norm_forward(ctx, {.h = tensor(h, shape),
                           .residual = tensor(residual, shape),
                           .weight = weight,
                           .kind = c.norm,
                           .eps = c.norm_eps,
                           .residual_out = tensor(residual, shape),
                           .out = tensor(out, shape)});
        return out;
    }
    std::vector<double> mixer(const BlockParams& p, const std::vector<double>& v)
    {
        const std::int64_t inner = c.inner(), row = c.rank() + 2 * c.d_state;
        std::vector<double> xz = linear(v, p.in_proj), y(static_cast<std::size_t>(len * inner));
        std::vector<double> u[2], q[2], dt[2];
        const DirectionParams* directions[2] = {&p.forward, &p.reverse};
        ConvForwardPass conv[2];
        ScanForwardPass scan[2];
        for (int i = 0; i < 2; i++) {
            u[i].resize(y.size());
            conv[i] = {.reverse = i == 1,
                       .weight = directions[i]->conv_weight,
                       .bias = directions[i]->conv_bias,
                       .u = tensor(u[i], {1, len, inner})};
        }
        conv1d_forward(ctx, {.x = tensor(xz, {1, len, 2 * inner}), .passes = {conv, 2}});
        for (int i = 0; i < 2; i++) {
            const DirectionParams& d = *directions[i];
            q[i] = linear(u[i], d.x_proj);
            dt[i] = rounded({d.dt_weight.as<double>(), d.dt_weight.as<double>() + d.dt_weight.numel()});
            scan[i] = {.reverse = i == 1,
                       .u = conv[i].u,
                       .q = tensor(q[i], {1, len, row}),
                       .A_log = d.A_log,
                       .D = d.D,
                       .dt_weight = tensor(dt[i], d.dt_weight.shape),
                       .dt_bias = d.dt_bias,
                       .add = i == 1,
                       .finish = i == 1};
        }
        scan_forward(ctx, {.xz = tensor(xz, {1, len, 2 * inner}),
                           .passes = {scan, 2},
                           .scale = c.direction_scale(),
                           .out = tensor(y, {1, len, inner})});
        return linear(y, p.out_proj);
    }
    // Logits of one image.
    std::vector<double> run(const std::vector<float>& image)
    {
        const Params& p = weights.params;
        std::vector<double> x(image.begin(), image.end()), cols(x.size()),
            h(static_cast<std::size_t>(len * c.embed_dim));
        patches_forward(ctx, {.images = tensor(x, {1, c.in_chans, c.img_height, c.img_width}),
                              .patch = c.patch_size,
                              .stride = c.stride,
                              .cols = tensor(cols, {1, len - 1, c.in_chans * c.patch_size * c.patch_size})});
        std::vector<double> patches = linear(cols, p.patch_weight, p.patch_bias), residual(h.size());
        tokens_forward(ctx, {.patches = tensor(patches, {1, len - 1, c.embed_dim}),
                             .class_token = {p.class_token, {}},
                             .places = c.class_places(),
                             .pos_embed = p.pos_embed,
                             .out = tensor(h, {1, len, c.embed_dim})});
        for (const BlockParams& block : p.blocks) h = mixer(block, norm(h, residual, block.norm_weight));
        const std::vector<double> tokens = norm(h, residual, p.norm_weight);
        const auto at = tokens.begin() + c.class_position() * c.embed_dim;
        return linear({at, at + c.embed_dim}, p.head_weight, p.head_bias);
    }
};

// At most twice the error of the yardstick: over many layers, and over a long sequence.
void test_against_yardstick(std::int64_t side, std::int64_t depth, std::int64_t dim)
{
    Config c = small(Directions::ssm_conv, dim);
    c.img_height = c.img_width = side;
    c.depth = depth;
    c.num_classes = 50;
    c.validate();
    const std::vector<float> image = images_of(c, 1);
    const std::vector<double> exact = run<double>(c, image, 1, 2, 0, false).logits;
    const double ours = relative(run<bf16>(c, image, 1, 2, 0, false).logits, exact);
    const double theirs = relative(Yardstick(c).run(image), exact);
    std::printf("%d layers, %d tokens: %.2g, with linear maps alone in bf16 %.2g\n", static_cast<int>(depth),
                static_cast<int>(c.tokens()), ours, theirs);
    CHECK(theirs > 1e-4 && ours < 2 * theirs);
}

}  // namespace

int main(int argc, char** argv)
{
    const std::string how = argc > 1 ? argv[1] : "";
    if (how == "emulated") setenv("VIMCORE_ISA", cpu::isas_of_float().back().c_str(), 1);
    if (bf16_unit().empty()) {
        const Config c = small(Directions::none);
        CHECK_THROWS(run<bf16>(c, images_of(c, 1), 1, 1, 0, false), Error);
        return check_failures();
    }
    std::printf("bf16: %s\n", bf16_unit().c_str());
    if (how == "brief") {
        test_network(Directions::ssm_conv, 24);
        return check_failures();
    }
    for (Directions d :
         {Directions::none, Directions::sequence, Directions::block, Directions::ssm, Directions::ssm_conv})
        test_network(d, 24);
    test_network(Directions::ssm_conv, 35);
    test_against_yardstick(56, 24, 64);
    test_against_yardstick(256, 24, 16);
    return check_failures();
}
