// SPDX-License-Identifier: Apache-2.0
// Runs a package of AOTInductor without Python: run_package model.pt2 images.f32 H W writes logits, a line an image.
// libvimcore_torch.so, which it is linked with and does not call, registers the operator.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv)
try {
    if (argc != 5) {
        std::fprintf(stderr, "usage: run_package model.pt2 images.f32 HEIGHT WIDTH (float32, (B, 3, H, W))\n");
        return 2;
    }
    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const std::int64_t height = std::stoll(argv[3]), width = std::stoll(argv[4]), image = 3 * height * width * 4;
    if (image <= 0 || bytes.empty() || static_cast<std::int64_t>(bytes.size()) % image != 0) {
        std::fprintf(stderr, "run_package: %s: no whole number of images of this size\n", argv[2]);
        return 1;
    }
    const std::int64_t count = static_cast<std::int64_t>(bytes.size()) / image;
    const at::Tensor images = torch::from_blob(bytes.data(), {count, 3, height, width}, torch::kFloat32).clone();

    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    const at::Tensor logits = loader.run({images})[0].contiguous();
    for (std::int64_t i = 0; i < logits.size(0); i++)
        for (std::int64_t k = 0; k < logits.size(1); k++)
            std::printf("%.9g%c", static_cast<double>(logits.data_ptr<float>()[i * logits.size(1) + k]),
                        k + 1 < logits.size(1) ? ' ' : '\n');
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what());
    return 1;
}
