// SPDX-License-Identifier: Apache-2.0
// Formats of pictures, and of what people give for pictures, told by their first bytes.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <string_view>

#include "vimcore/image.h"

namespace vimcore {
namespace {

using namespace std::string_view_literals;

struct Signature {
    std::size_t at;
    std::string_view bytes;
    const char* kind;
};

constexpr std::array signatures{
    Signature{0, "\xFF\xD8\xFF"sv, "JPEG"},
    Signature{0, "\x89PNG\r\n\x1A\n"sv, "PNG"},
    Signature{0, "GIF87a"sv, "GIF"},
    Signature{0, "GIF89a"sv, "GIF"},
    Signature{0, "II*\0"sv, "TIFF"},
    Signature{0, "MM\0*"sv, "TIFF"},
    Signature{0, "II+\0"sv, "TIFF"},  // BigTIFF
    Signature{0, "MM\0+"sv, "TIFF"},
    Signature{8, "WEBP"sv, "WebP"},
    Signature{4, "ftypavi"sv, "AVIF"},
    Signature{4, "ftyphei"sv, "HEIC"},
    Signature{4, "ftyphev"sv, "HEIC"},
    Signature{4, "ftypmif1"sv, "HEIC"},
    Signature{4, "ftypmsf1"sv, "HEIC"},
    Signature{4, "ftyp"sv, "a video (MP4)"},
    Signature{0, "\0\0\0\x0CjP  "sv, "JPEG 2000"},
    Signature{0, "\xFF\x4F\xFF\x51"sv, "JPEG 2000"},
    Signature{0, "\0\0\0\x0CJXL "sv, "JPEG XL"},
    Signature{0, "\xFF\x0A"sv, "JPEG XL"},
    Signature{0, "8BPS"sv, "a Photoshop file (PSD)"},
    Signature{0, "\0\0\1\0"sv, "an icon (ICO)"},
    Signature{0, "v/1\1"sv, "OpenEXR"},
    Signature{0, "#?RADIANCE"sv, "Radiance HDR"},
    Signature{0, "%PDF"sv, "a PDF"},
    Signature{0, "%!PS"sv, "PostScript"},
    Signature{0, "\x93NUMPY"sv, "an array of numpy (.npy)"},
    Signature{0, "PK\3\4"sv, "a zip archive"},
    Signature{0, "\x1F\x8B"sv, "a file compressed by gzip"},
    Signature{0, "version https://git-lfs"sv, "a Git LFS pointer"},
};

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// "BM", then the file's size, 4 bytes of zeros or so, where pixels begin, and the length of one of BMP's headers.
bool is_bmp(std::string_view head)
{
    if (!head.starts_with("BM") || head.size() < 18) return false;
    const auto length = static_cast<unsigned char>(head[14]);
    return head[15] == 0 && head[16] == 0 && head[17] == 0 &&
           std::string_view("\x0C\x10\x28\x34\x38\x40\x6C\x7C").find(static_cast<char>(length)) !=
               std::string_view::npos;
}

bool is_page(std::string_view text)
{
    if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
    while (!text.empty() && is_space(text[0])) text.remove_prefix(1);
    for (const std::string_view begin : {"<!doctype"sv, "<html"sv, "<head"sv, "<?xml"sv, "<!--"sv, "<svg"sv})
        if (text.size() >= begin.size() && std::equal(begin.begin(), begin.end(), text.begin(), [](char small, char c) {
                return std::tolower(static_cast<unsigned char>(c)) == small;
            }))
            return true;
    return false;
}

}  // namespace

std::string picture_kind(const void* bytes, std::size_t size)
{
    const std::string_view head(static_cast<const char*>(bytes), std::min<std::size_t>(size, 256));
    for (const Signature& signature : signatures)
        if (head.substr(std::min(signature.at, head.size())).starts_with(signature.bytes) &&
            (signature.kind != "WebP"sv || head.starts_with("RIFF")))
            return signature.kind;
    if (is_bmp(head)) return "BMP";
    if (head.size() > 2 && head[0] == 'P' && is_space(head[2])) {
        if (head[1] == '5' || head[1] == '6') return "PPM/PGM";
        if (head[1] >= '1' && head[1] <= '4') return "PNM";
    }
    return is_page(head) ? "a page of the web or a drawing (HTML, XML, SVG)" : "";
}

}  // namespace vimcore
