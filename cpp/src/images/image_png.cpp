// SPDX-License-Identifier: Apache-2.0
// PNG. libpng reports errors by longjmp: the functions that call setjmp hold only trivial locals, and whatever owns
// memory lives in their caller.
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#if VIMCORE_HAVE_PNG
#include <png.h>
#endif

#include "images/image_formats.h"
#include "images/png_chunks.h"

namespace vimcore {
#if VIMCORE_HAVE_PNG
namespace {

struct PngDecoder {
    png_structp png = nullptr;
    png_infop info = nullptr;
    const ImageFile* file = nullptr;
    std::size_t at = 0;
    int passes = 1;
    std::uint64_t rows = 0;  // decompressed, of all passes
    bool ended = false;      // more was asked for than the file holds
    std::jmp_buf jump;
    char message[256] = "out of memory";
    ~PngDecoder() { png_destroy_read_struct(&png, &info, nullptr); }
};

[[noreturn]] void png_failed(png_structp png, png_const_charp message)
{
    auto* decoder = static_cast<PngDecoder*>(png_get_error_ptr(png));
    std::snprintf(decoder->message, sizeof decoder->message, "%s", message);
    std::longjmp(decoder->jump, 1);
}

void png_warned(png_structp, png_const_charp) {}  // ancillary chunks only; what harms pixels is an error

void png_take(png_structp png, png_bytep out, std::size_t size)
{
    auto* decoder = static_cast<PngDecoder*>(png_get_io_ptr(png));
    decoder->ended = size > decoder->file->size - decoder->at;
    if (decoder->ended) png_error(png, "unexpected end of file");
    std::memcpy(out, decoder->file->bytes + decoder->at, size);
    decoder->at += size;
}

bool png_begin(PngDecoder& decoder)
{
    if (setjmp(decoder.jump)) return false;
    decoder.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &decoder, png_failed, png_warned);
    if (!decoder.png) return false;
    decoder.info = png_create_info_struct(decoder.png);
    if (!decoder.info) return false;
    png_set_user_limits(decoder.png, max_image_side, max_image_side);
    png_set_read_fn(decoder.png, &decoder, png_take);
    png_read_info(decoder.png, decoder.info);
    return true;
}

void png_count_row(png_structp png, png_row_infop, png_bytep)
{
    ++static_cast<PngDecoder*>(png_get_user_transform_ptr(png))->rows;
}

bool png_convert(PngDecoder& decoder)
{
    if (setjmp(decoder.jump)) return false;
    const int color = png_get_color_type(decoder.png, decoder.info);
    if (color == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(decoder.png);
    if (color == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(decoder.png);
    if (!(color & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(decoder.png);
    png_set_scale_16(decoder.png);  // value / 257, rounded
    png_set_strip_alpha(decoder.png);
    png_set_read_user_transform_fn(decoder.png, png_count_row);
    png_set_user_transform_info(decoder.png, &decoder, 0, 0);
    decoder.passes = png_set_interlace_handling(decoder.png);
    png_read_update_info(decoder.png, decoder.info);
    return true;
}

bool png_finish(PngDecoder& decoder, std::uint8_t* pixels, std::size_t height, std::size_t stride)
{
    if (setjmp(decoder.jump)) return false;
    for (int pass = 0; pass < decoder.passes; ++pass)
        for (std::size_t y = 0; y < height; ++y) png_read_row(decoder.png, pixels + y * stride, nullptr);
    return true;
}

// Whether the file ended, but behind the last pixel: what is missing is a check sum or chunks without pixels.
bool png_has_all_rows(const PngDecoder& decoder, std::size_t height, std::size_t width)
{
    std::uint64_t rows = decoder.passes == 1 ? height : 0;
    for (int pass = 0; decoder.passes > 1 && pass < decoder.passes; ++pass)
        if (PNG_PASS_COLS(width, pass) > 0) rows += PNG_PASS_ROWS(height, pass);
    return decoder.ended && decoder.rows == rows;
}

// Of a file that ends within its compressed pixels, those made a whole chunk: libpng takes no part of one, and what is
// missing may be no more than their check sum. Empty for other files.
std::vector<unsigned char> png_with_whole_chunk(const ImageFile& file)
{
    std::vector<unsigned char> bytes;
    const std::string_view text(reinterpret_cast<const char*>(file.bytes), file.size);
    png_chunks::for_each(text, [&](const png_chunks::Chunk& chunk) {
        if (chunk.whole || chunk.kind != "IDAT") return;
        const std::size_t end = chunk.at + 8 + chunk.body.size();
        bytes.assign(file.bytes, file.bytes + end);
        const auto put = [&](std::size_t at, std::size_t value) {
            for (int i = 0; i < 4; ++i) bytes[at + i] = static_cast<unsigned char>(value >> (24 - 8 * i));
        };
        put(chunk.at, chunk.body.size());
        bytes.resize(end + 4);
        put(end, png_chunks::crc_of(text.substr(chunk.at + 4, 4 + chunk.body.size())));
    });
    return bytes;
}

Image decode_whole_png(const ImageFile& file)
{
    const auto decoder = std::make_unique<PngDecoder>();
    decoder->file = &file;
    const auto fail = [&] { file.fail(std::string("corrupt or truncated PNG: ") + decoder->message); };
    if (!png_begin(*decoder)) fail();
    const std::size_t height = png_get_image_height(decoder->png, decoder->info);
    const std::size_t width = png_get_image_width(decoder->png, decoder->info);
    // Deflate expands at most 1032 times.
    if (png_get_rowbytes(decoder->png, decoder->info) * height / 1040 > file.size)
        file.fail("corrupt or truncated PNG: too short for " + std::to_string(height) + " x " + std::to_string(width) +
                  " pixels");
    if (!png_convert(*decoder)) fail();
    Image image = make_image(file, height, width);
    if (png_get_rowbytes(decoder->png, decoder->info) != width * 3) file.fail("PNG does not convert to 8-bit RGB");
    if (!png_finish(*decoder, image.pixels.data(), height, width * 3) && !png_has_all_rows(*decoder, height, width))
        fail();
    return image;
}

}  // namespace

Image decode_png(const ImageFile& file)
{
    const std::vector<unsigned char> mended = png_with_whole_chunk(file);
    return decode_whole_png(mended.empty() ? file : ImageFile{mended.data(), mended.size(), file.name});
}

bool has_png() { return true; }

#else

Image decode_png(const ImageFile& file) { file.fail("vimcore was built without libpng and cannot read PNG"); }

bool has_png() { return false; }

#endif

}  // namespace vimcore
