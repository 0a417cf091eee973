// SPDX-License-Identifier: Apache-2.0
// What resizing a position table takes, for hosts and devices: cubic convolution along one axis with a = -0.75, cells
// at half coordinates, the border repeated, as torch's bicubic interpolation with align_corners=False.
#pragma once

#include <cstdint>

#include "core/class_places.h"

namespace vimcore::bicubic {

// The four cells of a row of `from` that make cell `at` of a row of `to`, ascending, and their shares.
struct Taps {
    std::int64_t cell[4];
    double weight[4];
};

VIM_HOST_DEVICE inline std::int64_t rounded_down(double x)
{
    const auto whole = static_cast<std::int64_t>(x);
    return static_cast<double>(whole) > x ? whole - 1 : whole;
}

VIM_HOST_DEVICE inline Taps taps(std::int64_t at, std::int64_t from, std::int64_t to)
{
    constexpr double a = -0.75;
    const double sample = (static_cast<double>(at) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    const std::int64_t first = rounded_down(sample);
    Taps t;
    for (int i = 0; i < 4; i++) {
        const double distance = sample - static_cast<double>(first) + 1 - i, x = distance < 0 ? -distance : distance;
        t.weight[i] = x <= 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
        const std::int64_t cell = first - 1 + i;
        t.cell[i] = cell < 0 ? 0 : cell >= from ? from - 1 : cell;
    }
    return t;
}

// The cells [begin, end) of a row of `to` that may depend on `cell` of a row of `from`: all that do, and a few more.
struct Reach {
    std::int64_t begin, end;
};

VIM_HOST_DEVICE inline Reach reach(std::int64_t cell, std::int64_t from, std::int64_t to)
{
    const double scale = static_cast<double>(to) / static_cast<double>(from);
    const std::int64_t begin = rounded_down((static_cast<double>(cell) - 1.5) * scale - 0.5) - 1;
    const std::int64_t end = rounded_down((static_cast<double>(cell) + 2.5) * scale - 0.5) + 3;
    return {cell == 0 || begin < 0 ? 0 : begin, cell == from - 1 || end > to ? to : end};
}

// The share of `cell` of a row of `from` in cell `at` of a row of `to`.
VIM_HOST_DEVICE inline double share(std::int64_t cell, std::int64_t at, std::int64_t from, std::int64_t to)
{
    const Taps t = taps(at, from, to);
    double sum = 0;
    for (int i = 0; i < 4; i++)
        if (t.cell[i] == cell) sum += t.weight[i];
    return sum;
}

}  // namespace vimcore::bicubic
