// SPDX-License-Identifier: Apache-2.0
// Loss and optimiser against figures of torch 2.13 (F.cross_entropy, torch.optim.AdamW), the initialisation against
// its distributions, and a network that learns, is saved and loaded.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

Config small()
{
    Config c;
    c.img_height = c.img_width = 16;
    c.patch_size = c.stride = 4;
    c.in_chans = 1;
    c.embed_dim = 4;
    c.depth = 2;
    c.num_classes = 3;
    return c;
}

std::map<std::string, Tensor> by_name(const Config& config, Params& params)
{
    std::map<std::string, Tensor> all;
    for_each_param(config, params, [&](const std::string& name, Tensor& t, const Shape&) { all[name] = t; });
    return all;
}

void test_cross_entropy()
{
    std::vector<float> logits{1, 2, -1, 0.5, 0.25, 100}, dlogits(6);
    const std::vector<std::int64_t> labels{0, 1};
    const Tensor x{logits.data(), {2, 3}, DType::f32, {}}, dx{dlogits.data(), {2, 3}, DType::f32, {}};
    CHECK_CLOSE(cross_entropy(x, labels, dx), 50.5495061084, 1e-9);
    const double plain[] = {-0.37025177, 0.352692256, 0.0175595135, 0, -0.5, 0.5};
    for (std::size_t i = 0; i < 6; i++) CHECK_CLOSE(dlogits[i], plain[i], 1e-7);
    CHECK_CLOSE(cross_entropy(x, labels, dx, 0.1), 48.8995061084, 1e-9);
    const double smooth[] = {-0.336918436, 0.33602559, 0.000892846813, -0.0166666667, -0.466666667, 0.483333333};
    for (std::size_t i = 0; i < 6; i++) CHECK_CLOSE(dlogits[i], smooth[i], 1e-7);
    CHECK(cross_entropy(x, labels, {}) == cross_entropy(x, labels, dx));

    logits[0] = 1e30f;  // no overflow on the way
    CHECK_CLOSE(cross_entropy(x.slice(0, 1), std::vector<std::int64_t>{0}, {}), 0, 1e-12);
    CHECK_THROWS(cross_entropy(x, std::vector<std::int64_t>{0, 3}, {}), std::invalid_argument);
    CHECK_THROWS(cross_entropy(x, std::vector<std::int64_t>{0, -1}, {}), std::invalid_argument);
    CHECK_THROWS(cross_entropy(x, std::vector<std::int64_t>{0}, {}), std::invalid_argument);
    CHECK_THROWS(cross_entropy(x.slice(0, 0), {}, {}), std::invalid_argument);
    CHECK_THROWS(cross_entropy({}, labels, {}), std::invalid_argument);
    CHECK_THROWS(cross_entropy(x, labels, dx.slice(0, 1)), std::invalid_argument);
    CHECK_THROWS(cross_entropy(x, labels, {}, 1.5), std::invalid_argument);
}

// Three steps of torch.optim.AdamW([w], lr=0.01, betas=(0.8, 0.99), eps=1e-6) on one decayed and one other tensor.
void test_adamw()
{
    const Config c = small();
    Weights weights(c), gradients(c);
    auto w = by_name(c, weights.params), g = by_name(c, gradients.params);
    const float start[] = {0.5f, -1.0f, 2.0f, 0.0f};
    for (const char* name : {"head.weight", "layers.0.norm.weight"}) std::memcpy(w[name].data, start, sizeof start);
    w["pos_embed"].as<float>()[0] = w["layers.0.mixer.A_log"].as<float>()[0] = w["cls_token"].as<float>()[0] = 1.0f;
    AdamWOptions options{.beta1 = 0.8, .beta2 = 0.99, .eps = 1e-6, .weight_decay = 0.1};
    AdamW optimizer(c, weights.params, gradients.params, options);
    for (int k = 0; k < 3; k++) {
        const float values[] = {0.1f * static_cast<float>(k + 1), -0.2f, 1e-4f * static_cast<float>(k - 1),
                                3.0f * static_cast<float>(k)};
        for (const char* name : {"head.weight", "layers.0.norm.weight"})
            std::memcpy(g[name].data, values, sizeof values);
        double squares = 0;
        for (const float v : values) squares += 2.0 * v * v;
        CHECK_CLOSE(optimizer.step(0.01), std::sqrt(squares), 1e-12);
    }
    CHECK(optimizer.steps() == 3);
    const double decayed[] = {0.468795359, -0.967033267, 2.00830913, -0.0166824982};
    const double free[] = {0.470264047, -0.970000207, 2.0143292, -0.0166903362};
    for (int i = 0; i < 4; i++) {
        CHECK_CLOSE(w["head.weight"].as<float>()[i], decayed[i], 3e-7);
        CHECK_CLOSE(w["layers.0.norm.weight"].as<float>()[i], free[i], 3e-7);
    }
    const double shrunk = std::pow(1 - 0.01 * 0.1, 3);  // no gradient: decay alone
    CHECK_CLOSE(w["layers.0.mixer.A_log"].as<float>()[0], shrunk, 1e-6);
    CHECK(w["pos_embed"].as<float>()[0] == 1.0f);
    CHECK(w["cls_token"].as<float>()[0] == 1.0f);
}

void test_adamw_options()
{
    const Config c = small();
    Weights weights(c), gradients(c);
    auto w = by_name(c, weights.params), g = by_name(c, gradients.params);
    w["layers.1.mixer.A_b_log"].as<float>()[0] = 1.0f;
    g["head.bias"].as<float>()[0] = 30.0f;
    g["head.bias"].as<float>()[1] = 40.0f;
    gradients.params.norm_weight = {};  // a weight without gradient stays as it is
    w["norm_f.weight"].as<float>()[0] = 5.0f;
    AdamW optimizer(c, weights.params, gradients.params,
                    {.beta1 = 0, .beta2 = 0, .eps = 1, .weight_decay = 0.5, .decay_A_log = false, .clip_norm = 5});
    CHECK_CLOSE(optimizer.step(0.1), 50, 1e-12);
    CHECK(w["layers.1.mixer.A_b_log"].as<float>()[0] == 1.0f);
    CHECK(w["norm_f.weight"].as<float>()[0] == 5.0f);
    CHECK_CLOSE(w["head.bias"].as<float>()[0], -0.1 * 3 / (3 + 1), 1e-7);  // clipped to (3, 4)
    CHECK_CLOSE(w["head.bias"].as<float>()[1], -0.1 * 4 / (4 + 1), 1e-7);

    const float before = w["head.bias"].as<float>()[0];
    g["head.bias"].as<float>()[1] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS(optimizer.step(0.1), Error);
    CHECK(w["head.bias"].as<float>()[0] == before && optimizer.steps() == 1);
    CHECK_THROWS(optimizer.step(-1), std::invalid_argument);
    CHECK_THROWS(AdamW(c, weights.params, gradients.params, {.beta1 = 1}), std::invalid_argument);
    CHECK_THROWS(AdamW(c, weights.params, gradients.params, {.clip_norm = -1}), std::invalid_argument);
    Config wider = c;
    wider.embed_dim = 8;
    CHECK_THROWS(AdamW(wider, weights.params, gradients.params), std::invalid_argument);
}

struct Spread {
    double mean = 0, deviation = 0, lowest = 1e30, highest = -1e30;
    explicit Spread(const Tensor& t)
    {
        double squares = 0;
        for (std::int64_t i = 0; i < t.numel(); i++) {
            const double v = t.as<float>()[i];
            mean += v;
            squares += v * v;
            lowest = std::min(lowest, v);
            highest = std::max(highest, v);
        }
        mean /= static_cast<double>(t.numel());
        deviation = std::sqrt(squares / static_cast<double>(t.numel()) - mean * mean);
    }
};

void check_uniform(const Tensor& t, double bound)
{
    const Spread s(t);
    CHECK(s.lowest >= -bound && s.lowest < -0.98 * bound && s.highest <= bound && s.highest > 0.98 * bound);
    CHECK_CLOSE(s.mean, 0, 0.05 * bound);
    CHECK_CLOSE(s.deviation, bound / std::sqrt(3.0), 0.03 * bound);
}

void check_normal(const Tensor& t, double deviation)
{
    const Spread s(t);
    CHECK_CLOSE(s.mean, 0, 0.05 * deviation);
    CHECK_CLOSE(s.deviation, deviation, 0.03 * deviation);
    CHECK(s.highest > 2.5 * deviation && s.lowest < -2.5 * deviation);
}

void test_initialisation()
{
    Config c;
    c.depth = 2;
    c.norm = Norm::layer;
    c.layer_scale = 0.25;
    Weights weights(c), again(c), other(c);
    initialize(c, weights.params, 3);
    initialize(c, again.params, 3);
    initialize(c, other.params, 4);
    auto w = by_name(c, weights.params), same = by_name(c, again.params), different = by_name(c, other.params);
    std::int64_t count = 0;
    for (const auto& [name, t] : w) {
        CHECK(std::memcmp(t.data, same[name].data, t.bytes()) == 0);
        count += t.numel();
    }
    CHECK(count == weights.count());
    CHECK(std::memcmp(w["pos_embed"].data, different["pos_embed"].data, w["pos_embed"].bytes()) != 0);

    const auto constant = [&](const std::string& name, double value) {
        const Spread s(w.at(name));
        CHECK(s.lowest == value && s.highest == value);
    };
    const std::string mixer = "layers.1.mixer.";
    check_normal(w["patch_embed.proj.weight"], 0.0410);
    check_normal(w["head.weight"], 0.02);
    check_normal(w["pos_embed"], 0.02);
    CHECK_CLOSE(Spread(w["cls_token"]).deviation, 0.02, 0.004);
    for (const char* name : {"patch_embed.proj.bias", "head.bias", "norm_f.bias", "layers.1.norm.bias"})
        constant(name, 0);
    for (const char* name : {"norm_f.weight", "layers.1.norm.weight", "layers.1.mixer.D", "layers.1.mixer.D_b"})
        constant(name, 1);
    constant(mixer + "gamma", 0.25);
    constant(mixer + "dt_proj_b.bias", 0);
    check_uniform(w[mixer + "in_proj.weight"], 1 / std::sqrt(192.0));
    check_uniform(w[mixer + "x_proj_b.weight"], 1 / std::sqrt(384.0));
    check_uniform(w[mixer + "out_proj.weight"], 1 / std::sqrt(384.0 * 2));
    check_uniform(w[mixer + "dt_proj.weight"], 1 / std::sqrt(12.0));
    check_uniform(w[mixer + "dt_proj_b.weight"], 1 / std::sqrt(12.0));
    check_uniform(w[mixer + "conv1d.weight"], 0.5);
    check_uniform(w[mixer + "conv1d_b.bias"], 0.5);
    for (int n = 0; n < 16; n++) {
        CHECK(w[mixer + "A_log"].as<float>()[n] == static_cast<float>(std::log(1.0 + n)));
        CHECK(w[mixer + "A_b_log"].as<float>()[383 * 16 + n] == static_cast<float>(std::log(1.0 + n)));
    }
    double log_steps = 0, least = 1, most = 0;
    for (std::int64_t e = 0; e < 384; e++) {
        const double step = std::log1p(std::exp(w[mixer + "dt_proj.bias"].as<float>()[e]));
        log_steps += std::log10(step) / 384;
        least = std::min(least, step);
        most = std::max(most, step);
    }
    CHECK(least > 0.000999 && least < 0.0012 && most > 0.085 && most < 0.1001);
    CHECK_CLOSE(log_steps, -2, 0.1);
}

// Two kinds of images, told apart after a few steps; the file gives the same network back.
void test_training()
{
    const Config c = small();
    Weights weights(c), gradients(c);
    initialize(c, weights.params, 0);
    AdamW optimizer(c, weights.params, gradients.params);
    Context ctx(Device::cpu(), 2);
    Saved saved;
    const std::int64_t batch = 6;
    std::vector<float> images(static_cast<std::size_t>(batch * 256)), logits(18), dlogits(18);
    std::vector<std::int64_t> labels;
    for (std::int64_t b = 0; b < batch; b++) {
        labels.push_back(b % 3);
        for (std::int64_t i = 0; i < 256; i++)
            images[static_cast<std::size_t>(b * 256 + i)] = static_cast<float>((i * (b % 3 + 1)) % 7) / 7 - 0.5f;
    }
    const Tensor x{images.data(), {batch, 1, 16, 16}, DType::f32, {}};
    Outputs out, dout;
    out.logits = {logits.data(), {batch, 3}, DType::f32, {}};
    dout.logits = {dlogits.data(), {batch, 3}, DType::f32, {}};
    double first = 0, last = 0;
    for (int step = 0; step < 60; step++) {
        forward(ctx, c, weights.params, x, out, &saved);
        last = cross_entropy(out.logits, labels, dout.logits);
        if (step == 0) first = last;
        gradients.zero();
        backward(ctx, c, weights.params, x, saved, dout, gradients.params, {});
        optimizer.step(1e-2);
    }
    CHECK_CLOSE(first, std::log(3.0), 0.3);
    CHECK(last < 0.1);

    forward(ctx, c, weights.params, x, out);
    const std::string path =
        (std::filesystem::temp_directory_path() / ("vimcore-optimizer-" + std::to_string(::getpid()))).string();
    Preprocess steps;
    steps.resize = steps.crop_height = steps.crop_width = 16;
    steps.mean = steps.std = {0.5};
    save_model(path, c, weights.params, {"a", "b\"", "c"}, steps);
    const auto model = Model::load(path);
    CHECK(Session(model).run(images.data(), batch) == logits);
    CHECK(labels_of(model->config(), model->metadata()) == (std::vector<std::string>{"a", "b\"", "c"}));
    CHECK(preprocess_of(model->config(), model->metadata())->to_json() == steps.to_json());
    CHECK_THROWS(save_model(path, c, weights.params, {"a"}), std::invalid_argument);
    CHECK_THROWS(save_model(path, c, Params{}), std::invalid_argument);
    CHECK(Session(Model::load(path)).run(images.data(), batch) == logits);  // the refused saves changed nothing

    for (const DType dtype : {DType::bf16, DType::f16}) {
        save_model(path, c, weights.params, {}, steps, dtype);
        const auto file = SafetensorsFile::open(path);
        CHECK(file.find("layers.1.mixer.out_proj.weight")->dtype == dtype);
        CHECK(file.find("layers.1.mixer.A_log")->dtype == DType::f32);
        const double unit = dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        const auto rounded = Model::load(path);
        for_each_param(c, rounded->params(), [&](const std::string& name, const Tensor& found, const Shape&) {
            for_each_param(c, weights.params, [&](const std::string& other, const Tensor& wanted, const Shape&) {
                for (std::int64_t i = 0; other == name && i < wanted.numel(); i++)
                    CHECK_CLOSE(found.as<float>()[i], wanted.as<float>()[i],
                                unit * std::abs(wanted.as<float>()[i]) + 1e-7);
            });
        });
    }
    CHECK_THROWS(save_model(path, c, weights.params, {}, {}, DType::f64), std::invalid_argument);
    weights.params.blocks[0].in_proj.as<float>()[3] = 1e5f;
    CHECK_THROWS(save_model(path, c, weights.params, {}, {}, DType::f16), Error);
    std::filesystem::remove(path);
}

}  // namespace

int main()
{
    test_cross_entropy();
    test_adamw();
    test_adamw_options();
    test_initialisation();
    test_training();
    return check_failures();
}
