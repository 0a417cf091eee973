// SPDX-License-Identifier: Apache-2.0
// What reader and writer of safetensors files share: limits and the names of types; and files that are none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "vimcore/tensor.h"

namespace vimcore::safetensors {

inline constexpr std::size_t max_header = 100000000;  // the format's own limit
inline constexpr std::size_t max_tensors = 1000000;
inline constexpr std::size_t max_name = 4096;

inline std::string format_name(DType dtype)  // ours in capitals: "F32", "BOOL", "F8_E4M3"
{
    std::string name = name_of(dtype);
    for (char& c : name)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    return name;
}

inline std::optional<DType> dtype_from(const std::string& name)
{
    for (int i = 0; i < dtype_count; i++)
        if (name == format_name(static_cast<DType>(i))) return static_cast<DType>(i);
    return std::nullopt;
}

}  // namespace vimcore::safetensors
