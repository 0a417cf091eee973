// SPDX-License-Identifier: Apache-2.0
// From an image file to the network's input. The same arithmetic as Pillow's bicubic resize, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vimcore/option.h"

namespace [[gnu::visibility("default")]] vimcore {

struct Image {  // 8-bit RGB, row-major, (height, width, 3)
    std::int64_t height = 0, width = 0;
    std::vector<std::uint8_t> pixels;
};

struct Preprocess {                                    // names and JSON of the metadata key vimcore.preprocess
    std::int64_t resize = 256;                         // short side, bicubic; 0: no resize
    std::int64_t crop_height = 224, crop_width = 224;  // centre crop
    std::vector<double> mean{0.485, 0.456, 0.406}, std{0.229, 0.224, 0.225};  // 3 values, or 1: luminance only

    Options options() const;  // std::invalid_argument names what is out of range
    static Preprocess from_options(const Options& options);
    std::string to_json() const;
    static Preprocess from_json(const std::string& text);

    bool operator==(const Preprocess&) const = default;
};

// JPEG (grey, YCbCr, RGB, CMYK), PNG (any colour type; alpha is dropped, 16 bits become 8: value / 257, rounded) and
// binary PPM/PGM (any maximum), turned as EXIF (or else XMP) in the file says. A PNG that ends behind its last pixel is
// whole. vimcore::Error names the file and what is wrong with it, of other formats which one it is; also when built
// without libjpeg or libpng.
Image decode_image(const std::string& path);
Image decode_image(const void* bytes, std::size_t size, const std::string& name);

// The format by a file's first bytes: "JPEG", "PNG", "PPM/PGM", which decode_image reads; "WebP", "TIFF", ..., or a
// phrase for what is no picture, such as "a PDF"; empty where it is none of those known.
std::string picture_kind(const void* bytes, std::size_t size);

// A picture that another program decoded, turned as EXIF (or else XMP) in its JPEG or PNG file says.
Image upright(Image image, const void* file, std::size_t size);

Image resize_bicubic(const Image& image, std::int64_t height, std::int64_t width);
// Bilinear by half-pixel centres, without antialiasing; values are rounded to 8 bits, halves up.
Image resize_linear(const Image& image, std::int64_t height, std::int64_t width);

// Writes to a temporary name in the same folder, then renames. quality 1 to 100. Error also when built without libjpeg.
void save_jpeg(const std::string& path, const Image& image, int quality = 90);

// Resize, centre crop, scale to [0, 1], normalise. out: (channels, crop_height, crop_width) float32, where channels
// is mean.size(); one channel is Pillow's "L": (19595 R + 38470 G + 7471 B + 32768) >> 16.
void preprocess(const Image& image, const Preprocess& options, float* out);

bool has_jpeg();
bool has_png();

}  // namespace vimcore
