// SPDX-License-Identifier: Apache-2.0
// The library in 20 lines: what is in a picture?  example_embed vim.safetensors cat.jpg
#include <vimcore/vimcore.h>

#include <algorithm>
#include <cstdio>
#include <exception>

int main(int argc, char** argv)
try {
    if (argc != 3) return std::fprintf(stderr, "usage: example_embed WEIGHTS PICTURE\n"), 2;
    const auto model = vimcore::Model::load(argv[1]);  // immutable: share it between threads
    const vimcore::Config& config = model->config();
    const auto labels = vimcore::labels_of(config, model->metadata());
    const auto steps = vimcore::preprocess_of(config, model->metadata()).value();

    std::vector<float> image(static_cast<std::size_t>(config.in_chans * config.img_height * config.img_width));
    vimcore::load_image(argv[2], steps, image.data());  // decode, resize, crop, normalise

    vimcore::Session session(model, {.max_batch = 8});  // one per thread
    const std::vector<float> logits = session.run(image.data(), 1);
    const auto best = static_cast<std::size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    std::printf("%s\n", labels.empty() ? std::to_string(best).c_str() : labels[best].c_str());
} catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
