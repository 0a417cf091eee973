// SPDX-License-Identifier: Apache-2.0
// Decoding JPEG, PNG and PPM/PGM from memory. libjpeg and libpng report errors by longjmp: the functions that call
// setjmp hold only trivial locals, and whatever owns memory lives in their caller.
#include "vimcore/image.h"

#include <cerrno>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string_view>

#if VIMCORE_HAVE_JPEG
#include <jpeglib.h>  // after <cstdio>

#include <jerror.h>  // after jpeglib.h: its codes depend on jconfig.h
#endif
#if VIMCORE_HAVE_PNG
#include <png.h>
#endif

#include "json.h"
#include "vimcore/error.h"

namespace vimcore {
namespace {

constexpr std::uint64_t max_side = 65535;
constexpr std::uint64_t max_pixels = std::uint64_t{1} << 30;
constexpr std::uintmax_t max_file = std::uintmax_t{1} << 31;

struct Input {
    const unsigned char* bytes;
    std::size_t size;
    const std::string& name;

    [[noreturn]] void fail(const std::string& what) const
    {
        throw Error("[decode_image] " + json::printable(name, 1000) + ": " + what);
    }
};

Image make_image(const Input& input, std::uint64_t height, std::uint64_t width)
{
    const std::string size = std::to_string(height) + " x " + std::to_string(width);
    if (height < 1 || width < 1) input.fail("image of " + size + " pixels is empty");
    if (height > max_side || width > max_side || height * width > max_pixels)
        input.fail("image of " + size + " pixels is larger than 65535 a side or 2^30 in all");
    Image image{static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), {}};
    image.pixels.resize(height * width * 3);
    return image;
}

#if VIMCORE_HAVE_JPEG

struct JpegDecoder {
    jpeg_decompress_struct info{};
    jpeg_error_mgr errors{};
    jpeg_progress_mgr progress{};
    std::jmp_buf jump;
    char message[JMSG_LENGTH_MAX] = "";
    bool created = false;
    ~JpegDecoder()
    {
        if (created) jpeg_destroy_decompress(&info);
    }
};

JpegDecoder& decoder_of(j_common_ptr info) { return *static_cast<JpegDecoder*>(info->client_data); }

void jpeg_failed(j_common_ptr info)
{
    JpegDecoder& decoder = decoder_of(info);
    info->err->format_message(info, decoder.message);
    std::longjmp(decoder.jump, 1);
}

// Warnings that mean missing or damaged pixels are errors here; harmless oddities of real files pass.
void jpeg_warned(j_common_ptr info, int level)
{
    if (level >= 0) return;  // trace messages
    switch (info->err->msg_code) {
        case JWRN_JPEG_EOF:
        case JWRN_HIT_MARKER:
        case JWRN_HUFF_BAD_CODE:
#ifdef D_ARITH_CODING_SUPPORTED
        case JWRN_ARITH_BAD_CODE:
#endif
        case JWRN_BOGUS_PROGRESSION:
        case JWRN_MUST_RESYNC:
            jpeg_failed(info);
    }
}

// A small progressive file can hold thousands of scans, each of which costs a pass over the image.
void jpeg_advanced(j_common_ptr info)
{
    if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= 500) return;
    std::snprintf(decoder_of(info).message, JMSG_LENGTH_MAX, "more than 500 scans");
    std::longjmp(decoder_of(info).jump, 1);
}

bool jpeg_begin(JpegDecoder& decoder, const Input& input)
{
    jpeg_decompress_struct& info = decoder.info;
    info.err = jpeg_std_error(&decoder.errors);
    decoder.errors.error_exit = jpeg_failed;
    decoder.errors.emit_message = jpeg_warned;
    decoder.progress.progress_monitor = jpeg_advanced;
    info.client_data = &decoder;
    if (setjmp(decoder.jump)) return false;
    jpeg_create_decompress(&info);  // keeps err and client_data
    decoder.created = true;
    info.progress = &decoder.progress;
    jpeg_mem_src(&info, input.bytes, static_cast<unsigned long>(input.size));
    jpeg_read_header(&info, TRUE);
    return true;
}

bool jpeg_finish(JpegDecoder& decoder, std::uint8_t* pixels)
{
    jpeg_decompress_struct& info = decoder.info;
    if (setjmp(decoder.jump)) return false;
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    const std::size_t stride = std::size_t{info.output_width} * 3;
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = pixels + info.output_scanline * stride;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    return true;
}

Image decode_jpeg(const Input& input)
{
    const auto decoder = std::make_unique<JpegDecoder>();
    const auto fail = [&] { input.fail(std::string("corrupt or truncated JPEG: ") + decoder->message); };
    if (!jpeg_begin(*decoder, input)) fail();
    const jpeg_decompress_struct& info = decoder->info;
    if (info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK)
        input.fail("CMYK JPEG is not supported; convert it to RGB");
    if (info.jpeg_color_space != JCS_GRAYSCALE && info.jpeg_color_space != JCS_YCbCr &&
        info.jpeg_color_space != JCS_RGB)
        input.fail("JPEG of " + std::to_string(info.num_components) + " components is not supported");
    // No encoder reaches this ratio; a short file that claims a huge image is not worth the memory.
    const std::uint64_t pixels = std::uint64_t{info.image_height} * info.image_width;
    if (pixels > (std::uint64_t{1} << 26) && pixels / 1024 > input.size)
        input.fail("corrupt or truncated JPEG: too short for " + std::to_string(info.image_height) + " x " +
                   std::to_string(info.image_width) + " pixels");
    Image image = make_image(input, info.image_height, info.image_width);
    if (!jpeg_finish(*decoder, image.pixels.data())) fail();
    return image;
}

#else

Image decode_jpeg(const Input& input) { input.fail("vimcore was built without libjpeg and cannot read JPEG"); }

#endif
#if VIMCORE_HAVE_PNG

struct PngDecoder {
    png_structp png = nullptr;
    png_infop info = nullptr;
    const Input* input = nullptr;
    std::size_t at = 0;
    int passes = 1;
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
    if (size > decoder->input->size - decoder->at) png_error(png, "unexpected end of file");
    std::memcpy(out, decoder->input->bytes + decoder->at, size);
    decoder->at += size;
}

bool png_begin(PngDecoder& decoder)
{
    if (setjmp(decoder.jump)) return false;
    decoder.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &decoder, png_failed, png_warned);
    if (!decoder.png) return false;
    decoder.info = png_create_info_struct(decoder.png);
    if (!decoder.info) return false;
    png_set_user_limits(decoder.png, max_side, max_side);
    png_set_read_fn(decoder.png, &decoder, png_take);
    png_read_info(decoder.png, decoder.info);
    return true;
}

bool png_convert(PngDecoder& decoder)
{
    if (setjmp(decoder.jump)) return false;
    const int color = png_get_color_type(decoder.png, decoder.info);
    if (color == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(decoder.png);
    if (color == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(decoder.png);
    if (!(color & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(decoder.png);
    png_set_strip_alpha(decoder.png);
    decoder.passes = png_set_interlace_handling(decoder.png);
    png_read_update_info(decoder.png, decoder.info);
    return true;
}

bool png_finish(PngDecoder& decoder, std::uint8_t* pixels, std::size_t height, std::size_t stride)
{
    if (setjmp(decoder.jump)) return false;
    for (int pass = 0; pass < decoder.passes; ++pass)
        for (std::size_t y = 0; y < height; ++y) png_read_row(decoder.png, pixels + y * stride, nullptr);
    png_read_end(decoder.png, nullptr);
    return true;
}

Image decode_png(const Input& input)
{
    const auto decoder = std::make_unique<PngDecoder>();
    decoder->input = &input;
    const auto fail = [&] { input.fail(std::string("corrupt or truncated PNG: ") + decoder->message); };
    if (!png_begin(*decoder)) fail();
    const std::size_t height = png_get_image_height(decoder->png, decoder->info);
    const std::size_t width = png_get_image_width(decoder->png, decoder->info);
    if (png_get_bit_depth(decoder->png, decoder->info) > 8)
        input.fail("16-bit PNG is not supported; convert it to 8 bits");
    // Deflate expands at most 1032 times.
    if (png_get_rowbytes(decoder->png, decoder->info) * height / 1040 > input.size)
        input.fail("corrupt or truncated PNG: too short for " + std::to_string(height) + " x " + std::to_string(width) +
                   " pixels");
    if (!png_convert(*decoder)) fail();
    Image image = make_image(input, height, width);
    if (png_get_rowbytes(decoder->png, decoder->info) != width * 3) input.fail("PNG does not convert to 8-bit RGB");
    if (!png_finish(*decoder, image.pixels.data(), height, width * 3)) fail();
    return image;
}

#else

Image decode_png(const Input& input) { input.fail("vimcore was built without libpng and cannot read PNG"); }

#endif

bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// P5 or P6, width, height, 255, one white space, bytes; '#' starts a comment in the header.
Image decode_pnm(const Input& input)
{
    std::size_t at = 2;
    const auto number = [&] {
        while (at < input.size && (is_space(input.bytes[at]) || input.bytes[at] == '#')) {
            if (input.bytes[at] == '#')
                while (at < input.size && input.bytes[at] != '\n') ++at;
            else
                ++at;
        }
        std::uint64_t value = 0;
        const std::size_t begin = at;
        for (; at < input.size && input.bytes[at] >= '0' && input.bytes[at] <= '9' && at - begin < 10; ++at)
            value = value * 10 + (input.bytes[at] - '0');
        if (at == begin || at == input.size) input.fail("corrupt or truncated PPM/PGM header");
        return value;
    };
    const std::uint64_t width = number(), height = number(), depth = number();
    if (depth != 255) input.fail("PPM/PGM with maximum " + std::to_string(depth) + " is not supported, only 255");
    if (!is_space(input.bytes[at++])) input.fail("corrupt PPM/PGM header");
    const std::uint64_t channels = input.bytes[1] == '6' ? 3 : 1;
    if (width > max_side || height > max_side) make_image(input, height, width);  // names the limit
    if (height * width * channels > input.size - at) input.fail("truncated PPM/PGM");
    Image image = make_image(input, height, width);
    const unsigned char* from = input.bytes + at;
    if (channels == 3)
        std::memcpy(image.pixels.data(), from, image.pixels.size());
    else
        for (std::size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = from[i / 3];
    return image;
}

}  // namespace

Image decode_image(const void* bytes, std::size_t size, const std::string& name)
{
    const Input input{static_cast<const unsigned char*>(bytes), size, name};
    const std::string_view text(static_cast<const char*>(bytes), size);
    if (size == 0) input.fail("file is empty");
    if (text.starts_with("\xFF\xD8\xFF")) return decode_jpeg(input);
    if (text.starts_with("\x89PNG\r\n\x1A\n")) return decode_png(input);
    if (size > 2 && (text.starts_with("P5") || text.starts_with("P6")) && is_space(input.bytes[2]))
        return decode_pnm(input);
    input.fail("neither JPEG, PNG nor binary PPM/PGM");
}

Image decode_image(const std::string& path)
{
    const Input input{nullptr, 0, path};
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (error) input.fail("cannot open: " + error.message());
    if (!std::filesystem::is_regular_file(status)) input.fail("not a regular file");  // a pipe would block
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) input.fail(std::string("cannot open: ") + std::strerror(errno));
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    if (error) input.fail("cannot read: " + error.message());
    if (size > max_file) input.fail("file is larger than 2 GiB");
    std::vector<unsigned char> bytes(static_cast<std::size_t>(size));
    if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
        input.fail(std::ferror(file.get()) ? std::string("cannot read: ") + std::strerror(errno)
                                           : "file became shorter");
    return decode_image(bytes.data(), bytes.size(), path);
}

#if VIMCORE_HAVE_JPEG
bool has_jpeg() { return true; }
#else
bool has_jpeg() { return false; }
#endif
#if VIMCORE_HAVE_PNG
bool has_png() { return true; }
#else
bool has_png() { return false; }
#endif

}  // namespace vimcore
