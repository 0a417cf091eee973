// SPDX-License-Identifier: Apache-2.0
// Bilinear resize of 8-bit pixels by half-pixel centres, without antialiasing; sums in float32, halves rounded up.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "images/image_formats.h"
#include "vimcore/image.h"

namespace vimcore {
namespace {

struct Neighbours {
    std::vector<std::int64_t> first, second;
    std::vector<float> part;  // the second one's

    Neighbours(std::int64_t from, std::int64_t to)
    {
        const float scale = static_cast<float>(from) / static_cast<float>(to);
        for (std::int64_t i = 0; i < to; i++) {
            const float at = std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
            first.push_back(std::min(static_cast<std::int64_t>(at), from - 1));
            second.push_back(std::min(first.back() + 1, from - 1));
            part.push_back(std::min(at - static_cast<float>(first.back()), 1.0f));
        }
    }
};

}  // namespace

Image resize_linear(const Image& image, std::int64_t height, std::int64_t width)
{
    const auto side = static_cast<std::int64_t>(max_image_side), most = static_cast<std::int64_t>(max_image_pixels);
    const auto good = [&](std::int64_t h, std::int64_t w) {
        return h >= 1 && w >= 1 && h <= side && w <= side && h * w <= most;
    };
    if (!good(image.height, image.width) ||
        image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3))
        throw std::invalid_argument("[resize_linear] image: expected 3 bytes for each of " +
                                    std::to_string(image.height) + " x " + std::to_string(image.width) +
                                    " pixels, got " + std::to_string(image.pixels.size()));
    if (!good(height, width))
        throw std::invalid_argument("[resize_linear] size: expected 1 to 65535 a side and 2^30 pixels at most, got " +
                                    std::to_string(height) + " x " + std::to_string(width));
    Image out{height, width, std::vector<std::uint8_t>(static_cast<std::size_t>(height * width * 3))};
    const Neighbours rows(image.height, height), columns(image.width, width);
    for (std::size_t y = 0; y < static_cast<std::size_t>(height); y++) {
        const std::uint8_t* top = image.pixels.data() + rows.first[y] * image.width * 3;
        const std::uint8_t* bottom = image.pixels.data() + rows.second[y] * image.width * 3;
        const float lower = rows.part[y], upper = 1 - lower;
        std::uint8_t* to = out.pixels.data() + y * static_cast<std::size_t>(width) * 3;
        for (std::size_t x = 0; x < static_cast<std::size_t>(width); x++) {
            const std::int64_t left = columns.first[x] * 3, right = columns.second[x] * 3;
            const float b = columns.part[x], a = 1 - b;
            for (int c = 0; c < 3; c++) {
                const float value =
                    upper * (a * static_cast<float>(top[left + c]) + b * static_cast<float>(top[right + c])) +
                    lower * (a * static_cast<float>(bottom[left + c]) + b * static_cast<float>(bottom[right + c]));
                *to++ = static_cast<std::uint8_t>(std::floor(value + 0.5f));
            }
        }
    }
    return out;
}

}  // namespace vimcore
