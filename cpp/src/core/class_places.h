// SPDX-License-Identifier: Apache-2.0
// Which token of a sequence, or row of a table, is a class token and which a patch; for hosts and devices.
#pragma once

#include <cstdint>

#include "vimcore/config.h"

#ifdef __CUDACC__
#define VIM_HOST_DEVICE __host__ __device__
#else
#define VIM_HOST_DEVICE
#endif

namespace vimcore {

// The class token at t, counted from 0, or -1: a patch.
VIM_HOST_DEVICE inline std::int64_t class_token_at(const ClassPlaces& places, std::int64_t t)
{
    const std::int64_t distance = t - places.first, k = distance / places.step;
    return distance >= 0 && k < places.count && k * places.step == distance ? k : -1;
}

// The patch at t, where no class token stands.
VIM_HOST_DEVICE inline std::int64_t patch_at(const ClassPlaces& places, std::int64_t t)
{
    if (t < places.first) return t;
    const std::int64_t before = (t - places.first) / places.step + 1;
    return t - (before < places.count ? before : places.count);
}

// Where a patch stands.
VIM_HOST_DEVICE inline std::int64_t place_of(const ClassPlaces& places, std::int64_t patch)
{
    if (patch < places.first) return patch;
    const std::int64_t between = places.step - 1;  // patches from one class token to the next
    const std::int64_t before = between > 0 ? (patch - places.first) / between + 1 : places.count;
    return patch + (before < places.count ? before : places.count);
}

// How many class tokens the first of two tensors holds, of which each may be none.
inline std::int64_t held_by_first(const Tensor (&tokens)[2])
{
    return tokens[1] ? 1 : tokens[0] ? tokens[0].size(1) : 0;
}

}  // namespace vimcore
