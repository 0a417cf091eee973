// SPDX-License-Identifier: Apache-2.0
// What the decoders of picture formats share; for them and decode_image alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "vimcore/image.h"

namespace vimcore {

constexpr std::uint64_t max_image_side = 65535;
constexpr std::uint64_t max_image_pixels = std::uint64_t{1} << 30;

struct ImageFile {
    const unsigned char* bytes;
    std::size_t size;
    const std::string& name;

    [[noreturn]] void fail(const std::string& what) const;  // vimcore::Error
};

// Room for the pixels of an image; an error where it is empty or larger than the limits above.
Image make_image(const ImageFile& file, std::uint64_t height, std::uint64_t width);

// As stored: orientation.h turns them upright.
Image decode_jpeg(const ImageFile& file);
Image decode_png(const ImageFile& file);

}  // namespace vimcore
