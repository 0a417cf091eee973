// SPDX-License-Identifier: Apache-2.0
// For tests of the whole network on the device: weights, designs, what a forward and a backward give.
#pragma once

#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "check_cuda.h"
#include "vimcore/vimcore.h"

namespace vimcore::test {

// NetworkWeights of one network on one device, or gradients.
class NetworkWeights {
public:
    template <class F>  // values(name, shape)
    NetworkWeights(Context& ctx, const Config& config, F&& values, DType dtype = DType::f32) : ctx_(ctx)
    {
        for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            tensor = {nullptr, shape, dtype, ctx.device()};
            tensor.data = memory_.emplace_back(tensor.bytes(), ctx.device()).data();
            assign(ctx, tensor, values(name, shape));
            tensors[name] = tensor;
        });
        params.changed();
    }
    static NetworkWeights zeros(Context& ctx, const Config& config, DType dtype = DType::f32)
    {
        auto none = [](const std::string&, const Shape& shape) {
            return Floats(static_cast<std::size_t>(shape.numel()));
        };
        return NetworkWeights(ctx, config, none, dtype);
    }
    std::map<std::string, Floats> values() const
    {
        std::map<std::string, Floats> all;
        for (const auto& [name, tensor] : tensors) all[name] = values_of(ctx_, tensor);
        return all;
    }
    Params params;
    std::map<std::string, Tensor> tensors;

private:
    Context& ctx_;
    std::deque<Buffer> memory_;
};

inline Floats random_weight(const Config& config, const std::string& name, const Shape& shape)
{
    Random random(std::hash<std::string>{}(name));
    Floats values = random.normal(shape.numel(), 0.2f);
    const bool decay = name.find("A_log") != std::string::npos || name.find("A_b_log") != std::string::npos;
    for (std::size_t i = 0; i < values.size(); i++) {
        if (decay) values[i] = std::log(1.0f + static_cast<float>(i % static_cast<std::size_t>(config.d_state)));
        if (name.find("norm") != std::string::npos) values[i] += 1.0f;
    }
    return values;
}

inline std::vector<Config> designs()
{
    std::vector<Config> all;
    auto add = [&](auto&& change) {
        Config c;
        c.img_height = 20;
        c.img_width = 28;
        c.patch_size = c.stride = 4;
        c.embed_dim = 24;
        c.depth = 2;
        c.num_classes = 5;
        change(c);
        c.validate();
        all.push_back(c);
    };
    for (Directions d :
         {Directions::none, Directions::sequence, Directions::block, Directions::ssm, Directions::ssm_conv})
        add([&](Config& c) { c.directions = d; });
    for (ClassToken t : {ClassToken::head, ClassToken::double_, ClassToken::random})
        add([&](Config& c) { c.class_token = t; });
    for (Pool p : {Pool::mean, Pool::max, Pool::last, Pool::all})
        add([&](Config& c) { c.class_token = ClassToken::none, c.pool = p; });
    add([](Config& c) { c.norm = Norm::layer, c.layer_scale = 0.1; });
    add([](Config& c) { c.rope = true, c.class_token = ClassToken::none; });
    add([](Config& c) { c.rope = c.rope_residual = true, c.class_token = ClassToken::head; });
    add([](Config& c) { c.stride = 2, c.pos_embed = false, c.average_directions = false; });
    add([](Config& c) { c.d_state = 8, c.d_conv = 3, c.num_classes = 0, c.in_chans = 1; });
    add([](Config& c) { c.d_state = 5, c.d_conv = 2, c.expand = 3, c.dt_rank = 7; });
    add([](Config& c) { c.class_token = ClassToken::registers, c.registers = 4, c.neck_reduction = 2; });
    add([](Config& c) { c.class_token = ClassToken::registers, c.registers = 3, c.num_classes = 0; });
    add([](Config& c) { c.frames = 3, c.class_token = ClassToken::head, c.average_directions = false; });
    add([](Config& c) { c.embed_dim = 64, c.img_height = c.img_width = 4; });  // one patch and the class token
    return all;
}

inline double difference(const Floats& a, const Floats& b)
{
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < b.size(); i++) {
        difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
        norm += static_cast<double>(b[i]) * b[i];
    }
    return a.size() == b.size() ? std::sqrt(difference / norm) : NAN;
}

}  // namespace vimcore::test
