// SPDX-License-Identifier: Apache-2.0
// Training without Python: a small Vim learns handwritten digits. The file it writes is read by Model::load,
// `vim-infer` and `vimcore predict`.
//   example_train python/vimcore/data/digits.npz digits.safetensors [epochs] [held_out.safetensors]
// The last argument: the held-out images with the network's logits, to compare with.
#include <vimcore/vimcore.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numbers>
#include <numeric>
#include <random>

#include "npz.h"

namespace {

constexpr std::int64_t side = 32, batch_size = 32;
constexpr double peak_lr = 2e-3, last_lr = 1e-5, smoothing = 0.1;
constexpr int warmup_epochs = 3;

struct Data {
    std::vector<float> images;  // (N, 1, side, side)
    std::vector<std::int64_t> labels;
    std::int64_t count() const { return static_cast<std::int64_t>(labels.size()); }
};

vimcore::Preprocess picture_steps()
{
    vimcore::Preprocess steps;
    steps.resize = steps.crop_height = steps.crop_width = side;
    steps.mean = {0.3};
    steps.std = {0.38};
    return steps;
}

// Every fifth digit of a class is held out. Pixels go from 0 (paper) to 16 (ink) and become pictures of 32 x 32.
void read_digits(const char* path, Data& train, Data& held_out)
{
    std::size_t count = 0, labelled = 0;
    const auto pixels = npz::read(path, "images", 64, count), labels = npz::read(path, "labels", 1, labelled);
    npz::require(count == labelled && count > 0, "not as many labels as images");
    int seen[10] = {};
    for (std::size_t i = 0; i < count; i++) {
        npz::require(labels[i] < 10, "a label that is no digit");
        vimcore::Image digit{8, 8, {}};
        for (std::size_t p = 0; p < 64; p++) {
            const auto grey =
                static_cast<std::uint8_t>(std::lround(std::min<int>(pixels[64 * i + p], 16) * 255 / 16.0));
            digit.pixels.insert(digit.pixels.end(), 3, grey);
        }
        Data& part = seen[labels[i]]++ % 5 == 2 ? held_out : train;
        part.labels.push_back(labels[i]);
        part.images.resize(part.images.size() + side * side);
        vimcore::preprocess(vimcore::resize_bicubic(digit, side, side), picture_steps(),
                            part.images.data() + part.images.size() - side * side);
    }
}

// The picture moved by (dy, dx) pixels; paper follows.
void shift(const float* from, int dy, int dx, float* to)
{
    const float paper = -0.3f / 0.38f;
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            const int sy = y - dy, sx = x - dx;
            to[y * side + x] = sy >= 0 && sy < side && sx >= 0 && sx < side ? from[sy * side + sx] : paper;
        }
}

double learning_rate(int step, int steps, int warmup)
{
    if (step < warmup) return peak_lr * (step + 1) / warmup;
    const double progress = double(step - warmup) / std::max(steps - warmup, 1);
    return last_lr + 0.5 * (peak_lr - last_lr) * (1 + std::cos(std::numbers::pi * progress));
}

void fit(const vimcore::Config& config, vimcore::Weights& weights, const Data& data, int epochs)
{
    vimcore::Context ctx(vimcore::Device::cpu(), 1);  // the network is so small that more threads mostly wait
    vimcore::Weights gradients(config);
    vimcore::AdamW optimizer(config, weights.params, gradients.params, {.weight_decay = 0.05});
    vimcore::Saved saved;
    std::vector<float> images(batch_size * side * side), logits(batch_size * 10), dlogits(logits.size());
    std::vector<std::int64_t> order(data.labels.size()), labels;
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(0);
    const int steps_per_epoch = static_cast<int>((data.count() + batch_size - 1) / batch_size);

    for (int epoch = 0; epoch < epochs; epoch++) {
        for (std::size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
        double total = 0;
        for (int step = 0; step < steps_per_epoch; step++) {
            const std::int64_t first = step * batch_size, batch = std::min(batch_size, data.count() - first);
            labels.clear();
            for (std::int64_t b = 0; b < batch; b++) {
                const std::int64_t i = order[static_cast<std::size_t>(first + b)];
                shift(data.images.data() + i * side * side, static_cast<int>(random() % 5) - 2,
                      static_cast<int>(random() % 5) - 2, images.data() + b * side * side);
                labels.push_back(data.labels[static_cast<std::size_t>(i)]);
            }
            const vimcore::Tensor x{images.data(), {batch, 1, side, side}};
            vimcore::Outputs out, dout;
            out.logits = {logits.data(), {batch, 10}};
            dout.logits = {dlogits.data(), {batch, 10}};

            vimcore::forward(ctx, config, weights.params, x, out, &saved);
            const double loss = vimcore::cross_entropy(out.logits, labels, dout.logits, smoothing);
            gradients.zero();
            vimcore::backward(ctx, config, weights.params, x, saved, dout, gradients.params, {});
            optimizer.step(learning_rate(epoch * steps_per_epoch + step, epochs * steps_per_epoch,
                                         std::min(warmup_epochs, (epochs + 4) / 5) * steps_per_epoch));

            total += loss * static_cast<double>(batch);
            std::fprintf(stderr, "\repoch %d/%d, step %d/%d, loss %.3f ", epoch + 1, epochs, step + 1, steps_per_epoch,
                         loss);
        }
        std::fprintf(stderr, "\r");
        std::printf("epoch %d/%d: mean loss %.4f\n", epoch + 1, epochs, total / static_cast<double>(data.count()));
        std::fflush(stdout);
    }
}

int run(const char* digits, const char* weights_path, int epochs, const char* held_out_path)
{
    Data train, held_out;
    read_digits(digits, train, held_out);
    vimcore::Config config;
    config.img_height = config.img_width = side;
    config.patch_size = config.stride = 8;  // 4 x 4 patches and the class token in the middle
    config.in_chans = 1;
    config.num_classes = 10;
    config.embed_dim = 64;
    config.depth = 4;

    vimcore::Weights weights(config);
    vimcore::initialize(config, weights.params, 0);
    std::printf("%lld digits to learn from, %lld held out, %lld weights\n", static_cast<long long>(train.count()),
                static_cast<long long>(held_out.count()), static_cast<long long>(weights.count()));
    fit(config, weights, train, epochs);
    vimcore::save_model(weights_path, config, weights.params, {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"},
                        picture_steps());

    vimcore::Session session(vimcore::Model::load(weights_path), {.max_batch = batch_size, .threads = 1});
    std::vector<float> logits = session.run(held_out.images.data(), held_out.count());
    std::int64_t right = 0;
    for (std::int64_t i = 0; i < held_out.count(); i++) {
        const auto row = logits.begin() + 10 * i;
        right += std::max_element(row, row + 10) - row == held_out.labels[static_cast<std::size_t>(i)];
    }
    std::printf("held-out accuracy %.1f %% (%lld of %lld); weights in %s\n",
                100.0 * static_cast<double>(right) / static_cast<double>(held_out.count()),
                static_cast<long long>(right), static_cast<long long>(held_out.count()), weights_path);
    if (held_out_path) {
        const std::int64_t count = held_out.count();
        const vimcore::Tensor x{held_out.images.data(), {count, 1, side, side}}, answers{logits.data(), {count, 10}},
            labels{held_out.labels.data(), {count}, vimcore::DType::i64};
        vimcore::save_safetensors(held_out_path, {{"images", x}, {"labels", labels}, {"logits", answers}}, {});
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv)
try {
    const int epochs = argc > 3 ? std::atoi(argv[3]) : 20;
    if (argc < 3 || argc > 5 || epochs < 1) {
        std::fprintf(stderr, "usage: example_train DIGITS.npz WEIGHTS.safetensors [EPOCHS] [HELD_OUT.safetensors]\n");
        return 2;
    }
    return run(argv[1], argv[2], epochs, argc > 4 ? argv[4] : nullptr);
} catch (const std::exception& error) {
    return std::fprintf(stderr, "\n%s\n", error.what()), 1;
}
