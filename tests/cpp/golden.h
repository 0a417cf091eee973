// SPDX-License-Identifier: Apache-2.0
// The golden files: values of the authors' published code. Their architecture, and their tensors as numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "vimcore/vimcore.h"

namespace vimcore::golden {

inline Config config_of(const std::map<std::string, std::string>& m)
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

}  // namespace vimcore::golden
