// SPDX-License-Identifier: Apache-2.0
// The network against golden values of the authors' published code: logits, input gradient, every parameter gradient.
// In bfloat16 it may err by twice of what torch does, see tests/python/half_twin.py. Usage: test_golden FOLDER
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "core/context_internals.h"
#include "golden.h"
#include "isa.h"
#include "kernels.h"
#include "vimcore/vimcore.h"

using namespace vimcore;
using namespace vimcore::golden;

namespace {

template <class T>
constexpr DType type = DType::bf16;
template <>
constexpr DType type<float> = DType::f32;
template <>
constexpr DType type<double> = DType::f64;

// Relative errors: of the logits, of all gradients together, of the worst one.
struct Errors {
    double logits = 0, gradients = 0, worst = 0;
};

// Sums of squares of what is compared.
struct Sums {
    double difference = 0, norm = 0;

    template <class T>
    double add(const std::vector<T>& found, const Tensor& golden)
    {
        double size = 0;
        for (const double value : values<double>(golden)) size += value * value;
        const double error = relative(found, golden);
        difference += error * error * size;
        norm += size;
        return size > 0 ? error : 0;
    }
};

// Activations of T, everything else of cpu::Wide<T>.
template <class T>
Errors run(const std::string& path, Memory memory, std::int64_t tile)
{
    using W = cpu::Wide<T>;
    const SafetensorsFile file = SafetensorsFile::open(path);
    const Config config = config_of(file.metadata());
    config.validate();
    Params params, gradients;
    std::map<std::string, std::vector<W>> weights, grads;
    for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        const Tensor* golden = file.find("weights." + name);
        CHECK(golden && golden->shape == shape);
        weights[name] = values<W>(*golden);
        tensor = {weights[name].data(), shape, type<W>, {}};
    });
    for_each_param(config, gradients, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        grads[name].assign(static_cast<std::size_t>(shape.numel()), W(0));
        tensor = {grads[name].data(), shape, type<W>, {}};
    });
    params.changed();
    std::vector<T> images = values<T>(*file.find("input")), probe = values<T>(*file.find("probe")),
                   logits(probe.size());
    std::vector<T> again(probe.size()), dimages(images.size());
    const Tensor x{images.data(), file.find("input")->shape, type<T>, {}};
    Context ctx(Device::cpu(), 2);
    internals(ctx).tile = tile;
    Saved saved;
    saved.memory = memory;
    Outputs out, dout;
    out.logits = {logits.data(), file.find("logits")->shape, type<T>, {}};
    forward(ctx, config, params, x, out, &saved);
    out.logits.data = again.data();
    forward(ctx, config, params, x, out);
    for (std::size_t i = 0; i < logits.size(); i++)  // inference is training's forward, bit for bit
        CHECK(static_cast<W>(logits[i]) == static_cast<W>(again[i]));
    dout.logits = {probe.data(), out.logits.shape, type<T>, {}};
    backward(ctx, config, params, x, saved, dout, gradients, {dimages.data(), x.shape, type<T>, {}});

    Sums sums;
    Errors errors;
    errors.logits = relative(logits, *file.find("logits"));
    errors.worst = sums.add(dimages, *file.find("input_grad"));
    std::string where = "input_grad";
    for (const auto& [name, grad] : grads) {
        const double e = sums.add(grad, *file.find("grad." + name));
        if (!(e <= errors.worst)) errors.worst = e, where = name;
    }
    errors.gradients = std::sqrt(sums.difference / sums.norm);
    std::printf("%-60s %s %s tile %3d: logits %.1e, gradients %.1e, worst %.1e (%s)\n", path.c_str(), name_of(type<T>),
                name_of(memory), static_cast<int>(tile), errors.logits, errors.gradients, errors.worst, where.c_str());
    return errors;
}

template <class T>
void check(const std::string& path, Memory memory, std::int64_t tile, double logits_tol, double grad_tol)
{
    const Errors errors = run<T>(path, memory, tile);
    CHECK_CLOSE(errors.logits, 0, logits_tol);
    CHECK_CLOSE(errors.worst, 0, grad_tol);
}

// What torch's bf16 gives, by file.
std::map<std::string, Errors> read_yardstick(const std::string& path)
{
    std::map<std::string, Errors> found;
    std::ifstream file(path);
    std::string line;
    for (std::getline(file, line); std::getline(file, line);) {
        const std::size_t comma = line.find(',');
        Errors& errors = found[line.substr(0, comma)];
        CHECK(std::sscanf(line.c_str() + comma, ",%lf,%lf,%lf", &errors.logits, &errors.gradients, &errors.worst) == 3);
    }
    return found;
}

}  // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    if (bf16_unit().empty()) setenv("VIMCORE_ISA", build_info().isa.c_str(), 1);  // emulated
    const std::map<std::string, Errors> yardstick = read_yardstick(std::string(argv[1]) + "/torch_bf16.csv");
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
        if (entry.path().extension() != ".safetensors") continue;
        files++;
        const std::string path = entry.path().string();
        const Errors& torch = yardstick.at(entry.path().stem().string());
        CHECK(torch.logits > 1e-4 && torch.worst < 0.3);
        const std::pair<Memory, std::int64_t> ways[] = {
            {Memory::least, 64}, {Memory::lean, 0}, {Memory::lean, 64}, {Memory::fast, 0}};
        for (const auto& [memory, tile] : ways) {
            check<float>(path, memory, tile, 1e-5, 1e-4);
            check<double>(path, memory, tile, 1e-12, 1e-6);  // gradients are stored in float32
            const Errors narrow = run<cpu::bf16>(path, memory, tile);
            CHECK(narrow.logits <= 2 * torch.logits);
            CHECK(narrow.gradients <= 2 * torch.gradients);
            CHECK(narrow.worst <= 2 * torch.worst);
        }
    }
    CHECK(files == 18);
    return check_failures();
}
