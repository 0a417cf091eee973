// SPDX-License-Identifier: Apache-2.0
// The network against golden values of the authors' published code: logits, input gradient, every parameter gradient.
// Usage: test_golden FOLDER
#include <cstdio>
#include <filesystem>
#include <map>
#include <vector>

#include "check.h"
#include "core/context_internals.h"
#include "golden.h"
#include "vimcore/vimcore.h"

using namespace vimcore;
using namespace vimcore::golden;

namespace {

template <class T>
void run(const std::string& path, Memory memory, std::int64_t tile, double logits_tol, double grad_tol)
{
    const SafetensorsFile file = SafetensorsFile::open(path);
    const Config config = config_of(file.metadata());
    config.validate();
    Params params, gradients;
    std::map<std::string, std::vector<T>> weights, grads;
    for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        const Tensor* golden = file.find("weights." + name);
        CHECK(golden && golden->shape == shape);
        weights[name] = values<T>(*golden);
        tensor = {weights[name].data(), shape, dtype_of<T>, {}};
    });
    for_each_param(config, gradients, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        grads[name].assign(static_cast<std::size_t>(shape.numel()), T(0));
        tensor = {grads[name].data(), shape, dtype_of<T>, {}};
    });
    params.changed();
    std::vector<T> images = values<T>(*file.find("input")), probe = values<T>(*file.find("probe")),
                   logits(probe.size());
    std::vector<T> again(probe.size()), dimages(images.size());
    const Tensor x{images.data(), file.find("input")->shape, dtype_of<T>, {}};
    Context ctx(Device::cpu(), 2);
    internals(ctx).tile = tile;
    Saved saved;
    saved.memory = memory;
    Outputs out, dout;
    out.logits = {logits.data(), file.find("logits")->shape, dtype_of<T>, {}};
    forward(ctx, config, params, x, out, &saved);
    out.logits.data = again.data();
    forward(ctx, config, params, x, out);
    CHECK(logits == again);  // inference is training's forward, bit for bit
    dout.logits = {probe.data(), out.logits.shape, dtype_of<T>, {}};
    backward(ctx, config, params, x, saved, dout, gradients, {dimages.data(), x.shape, dtype_of<T>, {}});

    const double error = relative(logits, *file.find("logits"));
    CHECK_CLOSE(error, 0, logits_tol);
    double worst = relative(dimages, *file.find("input_grad"));
    std::string where = "input_grad";
    for (const auto& [name, grad] : grads) {
        const double e = relative(grad, *file.find("grad." + name));
        if (!(e <= worst)) worst = e, where = name;
    }
    CHECK_CLOSE(worst, 0, grad_tol);
    std::printf("%-60s %s %s tile %3d: logits %.1e, worst gradient %.1e (%s)\n", path.c_str(), name_of(dtype_of<T>),
                name_of(memory), static_cast<int>(tile), error, worst, where.c_str());
}

}  // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
        if (entry.path().extension() != ".safetensors") continue;
        files++;
        const std::pair<Memory, std::int64_t> ways[] = {
            {Memory::least, 64}, {Memory::lean, 0}, {Memory::lean, 64}, {Memory::fast, 0}};
        for (const auto& [memory, tile] : ways) {
            run<float>(entry.path().string(), memory, tile, 1e-5, 1e-4);
            run<double>(entry.path().string(), memory, tile, 1e-12, 1e-6);  // gradients are stored in float32
        }
    }
    CHECK(files == 18);
    return check_failures();
}
