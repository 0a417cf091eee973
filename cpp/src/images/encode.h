// SPDX-License-Identifier: Apache-2.0
// Pictures as bytes of a file. vimcore::Error "[who] ..." where the library was built without the format.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "vimcore/image.h"

namespace vimcore {

std::vector<unsigned char> encode_jpeg(const std::string& who, const Image& image, int quality);

// Indices (height, width), 8 bits each, and the colours of 1 to 256 of them.
std::vector<unsigned char> encode_png(const std::string& who, std::int64_t height, std::int64_t width,
                                      const std::uint8_t* indices,
                                      const std::vector<std::array<std::uint8_t, 3>>& palette);

}  // namespace vimcore
