// SPDX-License-Identifier: Apache-2.0
// JPEG and PNG written. Both libraries report errors by longjmp: the functions that call setjmp hold only trivial
// locals, and whatever owns memory lives in their caller. Output grows outside the libraries, and an exception there
// is turned into their own error.
#include "images/encode.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>

#if VIMCORE_HAVE_JPEG
#include <jpeglib.h>  // after <cstdio>
#endif
#if VIMCORE_HAVE_PNG
#include <png.h>
#endif

#include "images/image_formats.h"
#include "vimcore/atomic_file.h"
#include "vimcore/error.h"

namespace vimcore {
namespace {

void check_size(const std::string& who, std::int64_t height, std::int64_t width)
{
    const auto side = static_cast<std::int64_t>(max_image_side);
    if (height < 1 || width < 1 || height > side || width > side)
        throw std::invalid_argument("[" + who + "] image: expected 1 to 65535 pixels a side, got " +
                                    std::to_string(height) + " x " + std::to_string(width));
}

}  // namespace

#if VIMCORE_HAVE_JPEG
namespace {

struct JpegEncoder {
    jpeg_compress_struct info{};
    jpeg_error_mgr errors{};
    std::jmp_buf jump;
    char message[JMSG_LENGTH_MAX] = "";
    bool created = false;
    unsigned char* bytes = nullptr;  // by malloc
    unsigned long size = 0;
    ~JpegEncoder()
    {
        if (created) jpeg_destroy_compress(&info);
        std::free(bytes);
    }
};

void jpeg_encode_failed(j_common_ptr info)
{
    auto& encoder = *static_cast<JpegEncoder*>(info->client_data);
    info->err->format_message(info, encoder.message);
    std::longjmp(encoder.jump, 1);
}

bool jpeg_encode(JpegEncoder& encoder, const std::uint8_t* pixels, unsigned height, unsigned width, int quality)
{
    jpeg_compress_struct& info = encoder.info;
    info.err = jpeg_std_error(&encoder.errors);
    encoder.errors.error_exit = jpeg_encode_failed;
    info.client_data = &encoder;
    if (setjmp(encoder.jump)) return false;
    jpeg_create_compress(&info);  // keeps err and client_data
    encoder.created = true;
    jpeg_mem_dest(&info, &encoder.bytes, &encoder.size);
    info.image_height = height;
    info.image_width = width;
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, quality, TRUE);
    jpeg_start_compress(&info, TRUE);
    while (info.next_scanline < height) {
        JSAMPROW row = const_cast<std::uint8_t*>(pixels) + std::size_t{info.next_scanline} * width * 3;
        jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
    return true;
}

}  // namespace

std::vector<unsigned char> encode_jpeg(const std::string& who, const Image& image, int quality)
{
    check_size(who, image.height, image.width);
    const auto encoder = std::make_unique<JpegEncoder>();
    if (!jpeg_encode(*encoder, image.pixels.data(), static_cast<unsigned>(image.height),
                     static_cast<unsigned>(image.width), quality))
        throw Error("[" + who + "] cannot make a JPEG: " + encoder->message);
    return {encoder->bytes, encoder->bytes + encoder->size};
}

#else

std::vector<unsigned char> encode_jpeg(const std::string& who, const Image&, int)
{
    throw Error("[" + who + "] vimcore was built without libjpeg and cannot write JPEG");
}

#endif

#if VIMCORE_HAVE_PNG
namespace {

struct PngEncoder {
    png_structp png = nullptr;
    png_infop info = nullptr;
    std::vector<unsigned char> bytes;
    std::jmp_buf jump;
    char message[256] = "out of memory";
    ~PngEncoder() { png_destroy_write_struct(&png, &info); }
};

[[noreturn]] void png_encode_failed(png_structp png, png_const_charp message)
{
    auto* encoder = static_cast<PngEncoder*>(png_get_error_ptr(png));
    std::snprintf(encoder->message, sizeof encoder->message, "%s", message);
    std::longjmp(encoder->jump, 1);
}

void png_encode_warned(png_structp, png_const_charp) {}

void png_put(png_structp png, png_bytep data, std::size_t size)
{
    bool grown = true;
    try {
        auto& bytes = static_cast<PngEncoder*>(png_get_io_ptr(png))->bytes;
        bytes.insert(bytes.end(), data, data + size);
    } catch (const std::exception&) {
        grown = false;
    }
    if (!grown) png_error(png, "out of memory");
}

void png_flush_nothing(png_structp) {}

bool png_encode(PngEncoder& encoder, const std::uint8_t* indices, unsigned height, unsigned width,
                const std::array<std::uint8_t, 3>* colours, int count)
{
    png_color palette[256];
    for (int i = 0; i < count; ++i) palette[i] = {colours[i][0], colours[i][1], colours[i][2]};
    if (setjmp(encoder.jump)) return false;
    encoder.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &encoder, png_encode_failed, png_encode_warned);
    if (!encoder.png) return false;
    encoder.info = png_create_info_struct(encoder.png);
    if (!encoder.info) return false;
    png_set_write_fn(encoder.png, &encoder, png_put, png_flush_nothing);
    png_set_IHDR(encoder.png, encoder.info, width, height, 8, PNG_COLOR_TYPE_PALETTE, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_set_PLTE(encoder.png, encoder.info, palette, count);
    png_write_info(encoder.png, encoder.info);
    for (std::size_t y = 0; y < height; ++y) png_write_row(encoder.png, indices + y * width);
    png_write_end(encoder.png, nullptr);
    return true;
}

}  // namespace

std::vector<unsigned char> encode_png(const std::string& who, std::int64_t height, std::int64_t width,
                                      const std::uint8_t* indices,
                                      const std::vector<std::array<std::uint8_t, 3>>& palette)
{
    check_size(who, height, width);
    if (palette.empty() || palette.size() > 256)
        throw std::invalid_argument("[" + who + "] palette: expected 1 to 256 colours, got " +
                                    std::to_string(palette.size()));
    const auto encoder = std::make_unique<PngEncoder>();
    if (!png_encode(*encoder, indices, static_cast<unsigned>(height), static_cast<unsigned>(width), palette.data(),
                    static_cast<int>(palette.size())))
        throw Error("[" + who + "] cannot make a PNG: " + encoder->message);
    return std::move(encoder->bytes);
}

#else

std::vector<unsigned char> encode_png(const std::string& who, std::int64_t, std::int64_t, const std::uint8_t*,
                                      const std::vector<std::array<std::uint8_t, 3>>&)
{
    throw Error("[" + who + "] vimcore was built without libpng and cannot write PNG");
}

#endif

void save_jpeg(const std::string& path, const Image& image, int quality)
{
    if (quality < 1 || quality > 100)
        throw std::invalid_argument("[save_jpeg] quality: expected 1 to 100, got " + std::to_string(quality));
    const std::uint64_t bytes = static_cast<std::uint64_t>(image.height) * static_cast<std::uint64_t>(image.width) * 3;
    if (image.height > 0 && image.width > 0 && image.pixels.size() != bytes)
        throw std::invalid_argument("[save_jpeg] image: expected " + std::to_string(bytes) + " bytes of pixels, got " +
                                    std::to_string(image.pixels.size()));
    const std::vector<unsigned char> file_bytes = encode_jpeg("save_jpeg", image, quality);
    AtomicFile file("save_jpeg", path);
    file.write(file_bytes.data(), file_bytes.size());
    file.commit();
}

}  // namespace vimcore
