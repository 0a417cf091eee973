// SPDX-License-Identifier: Apache-2.0
// Pictures from memory or a file: which format it is, PPM/PGM itself, and which way up.
#include "vimcore/image.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "files/json.h"
#include "images/image_formats.h"
#include "images/orientation.h"
#include "vimcore/error.h"

namespace vimcore {

void ImageFile::fail(const std::string& what) const
{
    throw Error("[decode_image] " + json::printable(name, 1000) + ": " + what);
}

Image make_image(const ImageFile& file, std::uint64_t height, std::uint64_t width)
{
    const std::string size = std::to_string(height) + " x " + std::to_string(width);
    if (height < 1 || width < 1) file.fail("image of " + size + " pixels is empty");
    if (height > max_image_side || width > max_image_side || height * width > max_image_pixels)
        file.fail("image of " + size + " pixels is larger than 65535 a side or 2^30 in all");
    Image image{static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), {}};
    image.pixels.resize(height * width * 3);
    return image;
}

namespace {

constexpr std::uintmax_t max_file = std::uintmax_t{1} << 31;

bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// A level 0 ... maximum as 8 bits, by value. Grey of two bytes passes through 16 bits, as Pillow has it.
std::vector<std::uint8_t> levels_of(std::uint64_t maximum, bool grey)
{
    std::vector<std::uint8_t> levels(maximum + 1);
    for (std::uint64_t value = 0; value <= maximum; ++value) {
        const double share = static_cast<double>(value) / static_cast<double>(maximum);
        const bool deep = grey && maximum > 255;
        const auto stretched = static_cast<std::uint32_t>(std::nearbyint(share * (deep ? 65535 : 255)));
        levels[value] = static_cast<std::uint8_t>(deep ? (stretched * 255 + 32895) >> 16 : stretched);
    }
    return levels;
}

// P5 or P6, width, height, maximum, one white space, samples of one byte or two; '#' starts a comment in the header.
Image decode_pnm(const ImageFile& file)
{
    std::size_t at = 2;
    const auto number = [&] {
        while (at < file.size && (is_space(file.bytes[at]) || file.bytes[at] == '#')) {
            if (file.bytes[at] == '#')
                while (at < file.size && file.bytes[at] != '\n') ++at;
            else
                ++at;
        }
        std::uint64_t value = 0;
        const std::size_t begin = at;
        for (; at < file.size && file.bytes[at] >= '0' && file.bytes[at] <= '9' && at - begin < 10; ++at)
            value = value * 10 + (file.bytes[at] - '0');
        if (at == begin || at == file.size) file.fail("corrupt or truncated PPM/PGM header");
        return value;
    };
    const std::uint64_t width = number(), height = number(), maximum = number();
    if (maximum < 1 || maximum > 65535)
        file.fail("PPM/PGM with maximum " + std::to_string(maximum) + ", expected 1 to 65535");
    if (!is_space(file.bytes[at++])) file.fail("corrupt PPM/PGM header");
    const std::uint64_t channels = file.bytes[1] == '6' ? 3 : 1;
    if (width > max_image_side || height > max_image_side) make_image(file, height, width);  // names the limit
    const std::size_t bytes = maximum > 255 ? 2 : 1;
    if (height * width * channels * bytes > file.size - at) file.fail("truncated PPM/PGM");
    Image image = make_image(file, height, width);
    const unsigned char* from = file.bytes + at;
    if (channels == 3 && maximum == 255) {
        std::memcpy(image.pixels.data(), from, image.pixels.size());
        return image;
    }
    const std::vector<std::uint8_t> levels = levels_of(maximum, channels == 1);
    for (std::size_t i = 0; i < image.pixels.size(); ++i) {
        const unsigned char* sample = from + (channels == 3 ? i : i / 3) * bytes;
        const std::uint64_t value = bytes == 2 ? std::uint64_t{sample[0]} << 8 | sample[1] : sample[0];
        image.pixels[i] = levels[std::min(value, maximum)];
    }
    return image;
}

}  // namespace

Image decode_image(const void* bytes, std::size_t size, const std::string& name)
{
    const ImageFile file{static_cast<const unsigned char*>(bytes), size, name};
    if (size == 0) file.fail("file is empty");
    const std::string kind = picture_kind(bytes, size);
    if (kind == "JPEG") return upright(decode_jpeg(file), orientation_of(bytes, size));
    if (kind == "PNG") return upright(decode_png(file), orientation_of(bytes, size));
    if (kind == "PPM/PGM") return decode_pnm(file);
    for (const char* other : {"WebP", "TIFF", "BMP", "GIF", "AVIF", "PNM"})
        if (kind == other)
            file.fail(kind + ", which vimcore reads in Python alone, with Pillow; convert it to PNG or JPEG");
    if (kind.empty()) file.fail("neither JPEG, PNG nor PPM/PGM, nor another format of pictures that is known");
    file.fail(kind + ", which is not read; give the picture as PNG or JPEG");
}

Image decode_image(const std::string& path)
{
    const ImageFile image{nullptr, 0, path};
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (error) image.fail("cannot open: " + error.message());
    if (!std::filesystem::is_regular_file(status)) image.fail("not a regular file");  // a pipe would block
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) image.fail(std::string("cannot open: ") + std::strerror(errno));
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    if (error) image.fail("cannot read: " + error.message());
    if (size > max_file) image.fail("file is larger than 2 GiB");
    std::vector<unsigned char> bytes(static_cast<std::size_t>(size));
    if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
        image.fail(std::ferror(file.get()) ? std::string("cannot read: ") + std::strerror(errno)
                                           : "file became shorter");
    return decode_image(bytes.data(), bytes.size(), path);
}

}  // namespace vimcore
