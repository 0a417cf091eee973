// SPDX-License-Identifier: Apache-2.0
// bfloat16 activations on the CPU: the network against itself in float64, and what must not change its answers. It runs
// on the machine's unit for bf16 where there is one, with an argument on an emulated one.
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
    CHECK(run<bf16>(c, images, batch, 1, 0, false).logits == narrow.logits);
    double worst = relative(narrow.dimages, exact.dimages);
    for (const auto& [name, values] : exact.grads) {
        const double of_this = relative(narrow.grads.at(name), values);
        if (of_this > worst) std::printf(", %s %.2g", name.c_str(), of_this);
        worst = std::max(worst, of_this);
    }
    std::printf("\n");
    CHECK(worst < 0.05);
}

}  // namespace

int main(int argc, char**)
{
    if (argc > 1) setenv("VIMCORE_ISA", cpu::isas_of_float().back().c_str(), 1);
    if (bf16_unit().empty()) {
        const Config c = small(Directions::none);
        CHECK_THROWS(run<bf16>(c, images_of(c, 1), 1, 1, 0, false), Error);
        return check_failures();
    }
    std::printf("bf16: %s\n", bf16_unit().c_str());
    for (Directions d :
         {Directions::none, Directions::sequence, Directions::block, Directions::ssm, Directions::ssm_conv})
        test_network(d, 24);
    test_network(Directions::ssm_conv, 35);
    return check_failures();
}
