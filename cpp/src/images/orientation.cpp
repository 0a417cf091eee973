// SPDX-License-Identifier: Apache-2.0
#include "images/orientation.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

#include "images/png_chunks.h"

namespace vimcore {
namespace {

using Bytes = std::string_view;
using namespace std::string_view_literals;

constexpr int none = 0;

// An unsigned number of `width` bytes at `at`, which must be inside.
std::uint32_t number_at(Bytes bytes, std::size_t at, std::size_t width, bool big_endian)
{
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < width; ++i) {
        const std::size_t next = big_endian ? i : width - 1 - i;
        value = value << 8 | static_cast<unsigned char>(bytes[at + next]);
    }
    return value;
}

// The first value of a directory entry of 12 bytes: tag, type, count, and the values or where they are.
int entry_value(Bytes tiff, std::size_t entry, bool big_endian)
{
    const std::uint32_t type = number_at(tiff, entry + 2, 2, big_endian);
    const std::uint64_t count = number_at(tiff, entry + 4, 4, big_endian);
    const std::size_t width = type == 3 || type == 8 ? 2 : type == 4 || type == 9 ? 4 : 0;  // short, long
    const std::uint64_t size = count * width;
    const std::uint64_t at = size > 4 ? number_at(tiff, entry + 8, 4, big_endian) : entry + 8;
    if (size == 0 || at + size > tiff.size()) return none;
    const std::uint32_t value = number_at(tiff, static_cast<std::size_t>(at), width, big_endian);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;  // another number means as stored
}

// EXIF is a TIFF file: byte order, 42, the place of a directory, which has a count and entries.
int in_exif(Bytes tiff)
{
    while (tiff.starts_with("Exif\0\0"sv)) tiff.remove_prefix(6);
    const bool big_endian = tiff.starts_with("MM");
    if (tiff.size() < 8 || (!big_endian && !tiff.starts_with("II"))) return none;
    const std::uint32_t mark = number_at(tiff, 2, 2, true);
    if (mark != 42 && mark != 42 << 8) return none;  // some writers swap it
    const std::uint64_t directory = number_at(tiff, 4, 4, big_endian);
    if (directory + 2 > tiff.size()) return none;
    const std::uint64_t count = number_at(tiff, static_cast<std::size_t>(directory), 2, big_endian);
    for (std::uint64_t i = 0; i < count && directory + 2 + 12 * (i + 1) <= tiff.size(); ++i) {
        const auto entry = static_cast<std::size_t>(directory + 2 + 12 * i);
        if (number_at(tiff, entry, 2, big_endian) != 0x0112) continue;
        if (const int value = entry_value(tiff, entry, big_endian); value != none) return value;
    }
    return none;
}

// tiff:Orientation="6" or <tiff:Orientation>6<.
int in_xmp(Bytes text)
{
    constexpr Bytes name = "tiff:Orientation";
    for (std::size_t at = text.find(name); at != Bytes::npos; at = text.find(name, at + 1)) {
        Bytes rest = text.substr(at + name.size());
        if (!rest.starts_with("=\"") && !rest.starts_with('>')) continue;
        rest.remove_prefix(rest[0] == '=' ? 2 : 1);
        if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9')
            return rest[0] >= '1' && rest[0] <= '8' ? rest[0] - '0' : 1;
    }
    return none;
}

struct Notes {  // the parts of a file that may tell
    Bytes exif, xmp;
};

// The segments before the pixels: FF, a marker, and for most of them a length that counts itself.
Notes notes_of_jpeg(Bytes file)
{
    constexpr Bytes exif = "Exif\0\0"sv, xmp = "http://ns.adobe.com/xap/1.0/\0"sv;
    Notes found;
    for (std::size_t at = file.find('\xFF', 2); at != Bytes::npos && at + 4 <= file.size();
         at = file.find('\xFF', at)) {
        const auto marker = static_cast<unsigned char>(file[at + 1]);
        if (marker == 0xDA || marker == 0xD9) break;  // pixels, end
        const bool bare = marker < 0x02 || marker == 0xFF || (marker >= 0xD0 && marker <= 0xD8);
        if (bare) {
            at += marker == 0xFF ? 1 : 2;
            continue;
        }
        const std::size_t length = number_at(file, at + 2, 2, true);
        if (length < 2 || at + 2 + length > file.size()) break;
        const Bytes body = file.substr(at + 4, length - 2);
        if (marker == 0xE1 && body.starts_with(exif) && found.exif.empty()) found.exif = body;
        if (marker == 0xE1 && body.starts_with(xmp)) found.xmp = body;
        at += 2 + length;
    }
    return found;
}

Notes notes_of_png(Bytes file)
{
    constexpr Bytes xmp = "XML:com.adobe.xmp\0\0"sv;  // not compressed
    Notes found;
    png_chunks::for_each(file, [&](const png_chunks::Chunk& chunk) {
        if (chunk.kind == "eXIf" && chunk.sound()) found.exif = chunk.body;
        if (chunk.kind == "iTXt" && chunk.body.starts_with(xmp) && chunk.sound()) found.xmp = chunk.body;
    });
    return found;
}

}  // namespace

int orientation_of(const void* bytes, std::size_t size)
{
    const Bytes file(static_cast<const char*>(bytes), size);
    Notes notes;
    if (file.starts_with("\xFF\xD8\xFF")) notes = notes_of_jpeg(file);
    if (file.starts_with("\x89PNG\r\n\x1A\n")) notes = notes_of_png(file);
    const int exif = in_exif(notes.exif);
    const int value = exif == none ? in_xmp(notes.xmp) : exif;
    return value == none ? 1 : value;
}

Image upright(Image image, int orientation)
{
    if (orientation <= 1 || orientation > 8) return image;
    const auto height = static_cast<std::ptrdiff_t>(image.height), width = static_cast<std::ptrdiff_t>(image.width);
    // Pixel (y, x) of the result is the one at first + y * down + x * right of the image.
    const bool turned = orientation >= 5;  // rows become columns
    const bool last_row = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    const bool last_column = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    const std::ptrdiff_t by_row = last_row ? -width : width, by_column = last_column ? -1 : 1;
    const std::ptrdiff_t first = (last_row ? (height - 1) * width : 0) + (last_column ? width - 1 : 0);
    const std::ptrdiff_t down = turned ? by_column : by_row, right = turned ? by_row : by_column;

    Image out{turned ? image.width : image.height, turned ? image.height : image.width, {}};
    out.pixels.resize(image.pixels.size());
    constexpr std::ptrdiff_t tile = 64;  // columns of an image are far apart in memory
    const auto rows = static_cast<std::ptrdiff_t>(out.height), columns = static_cast<std::ptrdiff_t>(out.width);
    for (std::ptrdiff_t top = 0; top < rows; top += tile)
        for (std::ptrdiff_t left = 0; left < columns; left += tile)
            for (std::ptrdiff_t y = top; y < std::min(top + tile, rows); ++y)
                for (std::ptrdiff_t x = left; x < std::min(left + tile, columns); ++x)
                    std::memcpy(out.pixels.data() + 3 * (y * columns + x),
                                image.pixels.data() + 3 * (first + y * down + x * right), 3);
    return out;
}

Image upright(Image image, const void* file, std::size_t size)
{
    return upright(std::move(image), orientation_of(file, size));
}

}  // namespace vimcore
