// SPDX-License-Identifier: Apache-2.0
// JPEG. libjpeg reports errors by longjmp: the functions that call setjmp hold only trivial locals, and whatever owns
// memory lives in their caller.
#include <csetjmp>
#include <cstdio>
#include <memory>
#include <vector>

#if VIMCORE_HAVE_JPEG
#include <jpeglib.h>  // after <cstdio>

#include <jerror.h>  // after jpeglib.h: its codes depend on jconfig.h
#endif

#include "images/image_formats.h"

namespace vimcore {
#if VIMCORE_HAVE_JPEG
namespace {

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

bool jpeg_begin(JpegDecoder& decoder, const ImageFile& file)
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
    jpeg_mem_src(&info, file.bytes, static_cast<unsigned long>(file.size));
    jpeg_read_header(&info, TRUE);
    return true;
}

// Adobe's CMYK, stored inverted, in the arithmetic of Pillow: (255 - ink) x (255 - black) / 255, rounded.
void rgb_of_inverted_cmyk(const std::uint8_t* cmyk, std::size_t pixels, std::uint8_t* rgb)
{
    for (std::size_t i = 0; i < pixels; ++i, cmyk += 4, rgb += 3)
        for (int c = 0; c < 3; ++c) {
            const int product = (255 - cmyk[c]) * cmyk[3] + 128;
            rgb[c] = static_cast<std::uint8_t>(cmyk[3] - (((product >> 8) + product) >> 8));
        }
}

// `inks`: room for a row of CMYK, null where the picture has no inks.
bool jpeg_finish(JpegDecoder& decoder, std::uint8_t* pixels, std::uint8_t* inks)
{
    jpeg_decompress_struct& info = decoder.info;
    if (setjmp(decoder.jump)) return false;
    info.out_color_space = inks ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&info);
    const std::size_t stride = std::size_t{info.output_width} * 3;
    while (info.output_scanline < info.output_height) {
        std::uint8_t* out = pixels + info.output_scanline * stride;
        JSAMPROW row = inks ? inks : out;
        jpeg_read_scanlines(&info, &row, 1);
        if (inks) rgb_of_inverted_cmyk(inks, info.output_width, out);
    }
    jpeg_finish_decompress(&info);
    return true;
}

}  // namespace

Image decode_jpeg(const ImageFile& file)
{
    const auto decoder = std::make_unique<JpegDecoder>();
    const auto fail = [&] { file.fail(std::string("corrupt or truncated JPEG: ") + decoder->message); };
    if (!jpeg_begin(*decoder, file)) fail();
    const jpeg_decompress_struct& info = decoder->info;
    const bool inks = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
    if (!inks && info.jpeg_color_space != JCS_GRAYSCALE && info.jpeg_color_space != JCS_YCbCr &&
        info.jpeg_color_space != JCS_RGB)
        file.fail("JPEG of " + std::to_string(info.num_components) + " components is not supported");
    // No encoder reaches this ratio; a short file that claims a huge image is not worth the memory.
    const std::uint64_t pixels = std::uint64_t{info.image_height} * info.image_width;
    if (pixels > (std::uint64_t{1} << 26) && pixels / 1024 > file.size)
        file.fail("corrupt or truncated JPEG: too short for " + std::to_string(info.image_height) + " x " +
                  std::to_string(info.image_width) + " pixels");
    Image image = make_image(file, info.image_height, info.image_width);
    std::vector<std::uint8_t> row(inks ? std::size_t{info.image_width} * 4 : 0);
    if (!jpeg_finish(*decoder, image.pixels.data(), inks ? row.data() : nullptr)) fail();
    return image;
}

bool has_jpeg() { return true; }

#else

Image decode_jpeg(const ImageFile& file) { file.fail("vimcore was built without libjpeg and cannot read JPEG"); }

bool has_jpeg() { return false; }

#endif

}  // namespace vimcore
