// SPDX-License-Identifier: Apache-2.0
// Decoding, resizing and preprocessing of pictures without reference libraries.
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "files.h"
#include "images/orientation.h"
#include "vimcore/error.h"
#include "vimcore/image.h"

using namespace vimcore;

namespace {

void test_images()
{
    const std::string text = "P6\n# two pixels\n2 1\n255\nabcdef";
    const Image image = decode_image(text.data(), text.size(), "a.ppm");
    CHECK(image.height == 1 && image.width == 2 && std::memcmp(image.pixels.data(), "abcdef", 6) == 0);
    const std::string grey = "P5 2 1 255 ab";
    CHECK(std::memcmp(decode_image(grey.data(), grey.size(), "a.pgm").pixels.data(), "aaabbb", 6) == 0);
    for (const std::string bad : {"", "P6", "P6 2 1 255 abcde", "P6 2 1 65535 abcdefabcde", "P6 2 1 65536 abcdefabcdef",
                                  "P6 2 1 0 abcdef", "P6 0 1 255 ", "GIF89a", "P6 99999999 99999999 255 a",
                                  "\xFF\xD8\xFF", "\x89PNG\r\n\x1A\n", "\x89PNG\r\n\x1A\n1234567"})
        CHECK(contains(message_of<Error>([&] { decode_image(bad.data(), bad.size(), "bad.file"); }), "bad.file: "));

    const std::string deep("P5 4 1 65535 \0\0\x12\x34\xFF\x7E\xFF\xFF", 21);  // value / 257, rounded
    CHECK(decode_image(deep.data(), deep.size(), "a.pgm").pixels ==
          (std::vector<std::uint8_t>{0, 0, 0, 18, 18, 18, 254, 254, 254, 255, 255, 255}));
    const std::string few("P6 1 1 3 \0\1\2", 12);
    CHECK(decode_image(few.data(), few.size(), "a.ppm").pixels == (std::vector<std::uint8_t>{0, 85, 170}));

    const Folder folder;
    const std::string path = (folder.path / "a.ppm").string();
    std::ofstream(path, std::ios::binary) << text;
    CHECK(decode_image(path).pixels == image.pixels);
    CHECK(contains(message_of<Error>([&] { decode_image(path + "x"); }), "a.ppmx"));
    CHECK(contains(message_of<Error>([&] { decode_image(folder.path.string()); }), "not a regular file"));

    Image flat{5, 7, std::vector<std::uint8_t>(105, 200)};
    for (const std::uint8_t value : resize_bicubic(flat, 11, 3).pixels) CHECK(value == 200);
    CHECK(resize_bicubic(image, 1, 2).pixels == image.pixels);
    CHECK_THROWS(resize_bicubic(flat, 0, 3), std::invalid_argument);
    flat.pixels.pop_back();
    CHECK_THROWS(resize_bicubic(flat, 3, 3), std::invalid_argument);
}

void test_kinds()
{
    const std::pair<std::string, std::string> files[] = {
        {"\xFF\xD8\xFF\xE0", "JPEG"},
        {"P5 1 1 255 a", "PPM/PGM"},
        {"P2 1 1 255 9", "PNM"},
        {"RIFF\x10\x10\x10\x10WEBPVP8 ", "WebP"},
        {"RIFF\x10\x10\x10\x10WAVEfmt ", ""},
        {"\x10\x10\x10\x18"
         "ftypheic",
         "HEIC"},
        {"\x10\x10\x10\x18"
         "ftypavif",
         "AVIF"},
        {std::string("MM\0*", 4), "TIFF"},
        {"GIF89a", "GIF"},
        {"BM" + std::string(12, 'x') + std::string("\x28\0\0\0", 4), "BMP"},
        {"BMW is a car, no picture", ""},
        {"%PDF-1.7", "a PDF"},
        {" \n<!DocType html>", "a page of the web or a drawing (HTML, XML, SVG)"},
        {"P", ""},
        {"", ""},
    };
    for (const auto& [bytes, kind] : files) {
        CHECK(picture_kind(bytes.data(), bytes.size()) == kind);
        for (std::size_t size = 0; size < bytes.size(); ++size) picture_kind(bytes.data(), size);
        if (kind == "JPEG" || kind == "PPM/PGM" || bytes.empty()) continue;
        const std::string said = message_of<Error>([&] { decode_image(bytes.data(), bytes.size(), "bad.file"); });
        CHECK(contains(said, "bad.file: " + (kind.empty() ? "neither JPEG, PNG" : kind + ", which")));
    }
}

// EXIF in a JPEG's APP1 segment: one directory entry of tag 0x0112, big-endian, and where it may be cut.
void test_orientation()
{
    const auto jpeg = [](int value, const std::string& exif) {
        std::string text = "\xFF\xD8\xFF\xE1";
        text += {0, static_cast<char>(exif.size() + 8), 'E', 'x', 'i', 'f', 0, 0};
        text += exif;
        if (value) text[text.size() - 3] = static_cast<char>(value);
        return text + "\xFF\xDA";
    };
    const std::string exif("MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", 22);
    for (int value = 1; value <= 8; ++value) {
        const std::string file = jpeg(value, exif);
        CHECK(orientation_of(file.data(), file.size()) == value);
    }
    const std::string nine = jpeg(9, exif);
    CHECK(orientation_of(nine.data(), nine.size()) == 1);
    for (std::size_t size = 0; size < exif.size(); ++size) {  // the segment is whole, what it holds is not
        const std::string file = jpeg(0, exif.substr(0, size));
        const std::vector<char> exact(file.begin(), file.end());
        CHECK(orientation_of(exact.data(), exact.size()) == 1);
    }
    const std::string whole = jpeg(6, exif);
    for (std::size_t size = 0; size < whole.size() - 2; ++size) {
        const std::vector<char> exact(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
        CHECK(orientation_of(exact.data(), exact.size()) == 1);
    }
    for (std::size_t at = 0; at < whole.size(); ++at)
        for (const int byte : {0, 1, 127, 255}) {
            std::vector<char> other(whole.begin(), whole.end());
            other[at] = static_cast<char>(byte);
            const int value = orientation_of(other.data(), other.size());
            CHECK(value >= 1 && value <= 8);
        }

    const Image image{2, 3, {0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5}};  // 012 345
    const char* meant[] = {"012345", "210543", "543210", "345012", "031425", "304152", "524130", "251403"};
    for (int value = 1; value <= 8; ++value) {
        const Image turned = upright(image, value);
        CHECK(turned.height == (value < 5 ? 2 : 3) && turned.width == (value < 5 ? 3 : 2));
        for (std::size_t i = 0; i < 18; ++i) CHECK(turned.pixels[i] == meant[value - 1][i / 3] - '0');
    }
}

void test_preprocess()
{
    Preprocess options;
    CHECK(Preprocess::from_json(options.to_json()).to_json() == options.to_json());
    CHECK(Preprocess::from_json("{\"resize\": 8, \"crop\": [4, 6], \"mean\": [0.5], \"std\": [0.25]}").to_json() ==
          "{\"resize\": 8, \"crop\": [4, 6], \"mean\": [0.5], \"std\": [0.25], \"interpolation\": \"bicubic\"}");
    CHECK_THROWS(Preprocess::from_json("{\"interpolation\": \"nearest\"}"), std::invalid_argument);
    CHECK_THROWS(Preprocess::from_json("{\"crops\": 3}"), std::invalid_argument);
    CHECK_THROWS(Preprocess::from_json("{\"mean\": [0.5]}"), std::invalid_argument);

    // Without resizing: crop, padding, order of planes, and the arithmetic of one pixel.
    Image image{2, 3, {}};
    for (int i = 0; i < 18; ++i) image.pixels.push_back(static_cast<std::uint8_t>(10 * i));
    options = {.resize = 0, .crop_height = 4, .crop_width = 1, .mean = {0, 0.5, 0}, .std = {1, 0.25, 1}};
    std::vector<float> out(12, -1);
    preprocess(image, options, out.data());
    const float zero[3] = {0.0f, -2.0f, 0.0f};
    for (int c = 0; c < 3; ++c) {
        const auto pixel = [&](int y) {
            const float value = static_cast<float>(10 * (9 * y + 3 + c)) / 255.0f;
            return c == 1 ? (value - 0.5f) / 0.25f : value;
        };
        CHECK(out[4 * c] == zero[c] && out[4 * c + 3] == zero[c]);
        CHECK(out[4 * c + 1] == pixel(0) && out[4 * c + 2] == pixel(1));
    }
    options = {.resize = 0, .crop_height = 1, .crop_width = 1, .mean = {0}, .std = {1}};
    image = {1, 1, {255, 0, 0}};
    preprocess(image, options, out.data());
    CHECK(out[0] == 76.0f / 255.0f);
    options.std[0] = 0;
    CHECK_THROWS(preprocess(image, options, out.data()), std::invalid_argument);
}

}  // namespace

int main()
{
    test_images();
    test_kinds();
    test_orientation();
    test_preprocess();
    return check_failures();
}
