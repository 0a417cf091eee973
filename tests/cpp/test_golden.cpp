// SPDX-License-Identifier: Apache-2.0
// The network against golden values of the authors' published code: logits, input gradient, every parameter gradient.
// Usage: test_golden FOLDER
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <vector>

#include "check.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

Config config_of(const std::map<std::string, std::string>& m)
{
    auto text = [&](const char* key, const char* otherwise) {
        auto found = m.find(key);
        return found == m.end() ? std::string(otherwise) : found->second;
    };
    auto number = [&](const char* key, const char* otherwise) { return std::stoll(text(key, otherwise)); };
    auto flag = [&](const char* key, bool otherwise) { return text(key, otherwise ? "True" : "False") == "True"; };
    Config c;
    c.img_height = c.img_width = number("img_size", "224");
    c.patch_size = number("patch_size", "16");
    c.stride = number("stride", "16");
    c.embed_dim = number("embed_dim", "192");
    c.depth = number("depth", "24");
    c.d_state = number("d_state", "16");
    c.num_classes = number("num_classes", "1000");
    const std::string type = text("bimamba_type", "v2");
    c.directions = flag("if_bidirectional", false) ? Directions::block
                   : type == "v2"                  ? Directions::ssm_conv
                   : type == "v1"                  ? Directions::ssm
                                                   : Directions::none;
    c.average_directions = flag("if_divide_out", true);
    if (!flag("if_cls_token", true))
        c.class_token = ClassToken::none;
    else if (flag("use_double_cls_token", false))
        c.class_token = ClassToken::double_;
    else
        c.class_token = flag("use_middle_cls_token", true) ? ClassToken::middle : ClassToken::head;
    const std::string pool = text("final_pool_type", "none");
    c.pool = pool == "mean" ? Pool::mean : pool == "max" ? Pool::max : pool == "all" ? Pool::all : Pool::last;
    c.norm = flag("rms_norm", true) ? Norm::rms : Norm::layer;
    c.rope = flag("if_rope", false) || flag("if_rope_residual", false);
    c.rope_residual = flag("if_rope_residual", false);
    c.rope_grid = number("pt_hw_seq_len", "14");
    if (m.count("init_layer_scale")) c.layer_scale = std::stod(m.at("init_layer_scale"));
    return c;
}

template <class T>
std::vector<T> values(const Tensor& tensor)
{
    std::vector<T> out(static_cast<std::size_t>(tensor.numel()));
    for (std::size_t i = 0; i < out.size(); i++) {
        if (tensor.dtype == DType::f64) {
            double value;
            std::memcpy(&value, static_cast<const char*>(tensor.data) + 8 * i, 8);
            out[i] = static_cast<T>(value);
        } else {
            float value;
            std::memcpy(&value, static_cast<const char*>(tensor.data) + 4 * i, 4);
            out[i] = static_cast<T>(value);
        }
    }
    return out;
}

// |a - b| / |b|
template <class T>
double relative(const std::vector<T>& a, const Tensor& golden)
{
    const std::vector<double> b = values<double>(golden);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < b.size(); i++) {
        difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
        norm += b[i] * b[i];
    }
    return std::sqrt(difference / std::max(norm, 1e-300));
}

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
    ctx.tile = tile;
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
                memory == Memory::lean ? "lean" : "fast", static_cast<int>(tile), error, worst, where.c_str());
}

}  // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
        if (entry.path().extension() != ".safetensors") continue;
        files++;
        for (Memory memory : {Memory::lean, Memory::fast})
            for (std::int64_t tile : {0, 64}) {
                run<float>(entry.path().string(), memory, tile, 1e-5, 1e-4);
                run<double>(entry.path().string(), memory, tile, 1e-12, 1e-6);  // gradients are stored in float32
            }
    }
    CHECK(files == 18);
    return check_failures();
}
