// SPDX-License-Identifier: Apache-2.0
// Random numbers in memory of the CPU, and tensors of them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "vimcore/tensor.h"

namespace vimcore {

template <class T>
using Values = std::vector<T>;

template <class T>
Values<T> random_values(std::int64_t count, unsigned seed)
{
    std::mt19937 rng(seed);
    std::normal_distribution<T> normal;
    Values<T> values(static_cast<std::size_t>(count));
    for (T& v : values) v = normal(rng);
    return values;
}

template <class T>
Tensor view(const Values<T>& values, const Shape& shape)
{
    return {const_cast<T*>(values.data()), shape, dtype_of<T>, {}};
}

}  // namespace vimcore
