// SPDX-License-Identifier: Apache-2.0
// Which types the activations of a session may have, where.
#pragma once

#include <stdexcept>
#include <string>

#include "vimcore/build_info.h"
#include "vimcore/error.h"
#include "vimcore/tensor.h"

namespace vimcore {

// std::invalid_argument where no such device computes in `dtype`, Error where only this CPU does not.
inline void require_activations(const std::string& op, DType dtype, Device device)
{
    const bool cpu = device.type == Device::Type::cpu;
    if (dtype == DType::f32 || dtype == DType::bf16 || (dtype == DType::f16 && !cpu)) {
        const std::string why = cpu && dtype == DType::bf16 ? bf16_refusal() : "";
        if (!why.empty()) throw Error("[" + op + "] dtype: bf16: " + why);
        return;
    }
    throw std::invalid_argument("[" + op + "] dtype: expected " + (cpu ? "f32 or bf16" : "f32, f16 or bf16") + " on " +
                                to_string(device) + ", got " + name_of(dtype));
}

}  // namespace vimcore
