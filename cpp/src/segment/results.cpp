// SPDX-License-Identifier: Apache-2.0
// What is made of a class map: areas, a picture to look at, a file.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "images/encode.h"
#include "vimcore/atomic_file.h"
#include "vimcore/segment.h"

namespace vimcore {
namespace {

void check_map(const char* who, const ClassMap& map, const std::vector<Colour>& palette)
{
    const std::string name = std::string("[") + who + "] ";
    if (map.height < 1 || map.width < 1 || map.classes.size() != static_cast<std::size_t>(map.height * map.width))
        throw std::invalid_argument(name + "map: expected " + std::to_string(map.height) + " x " +
                                    std::to_string(map.width) + " classes, got " + std::to_string(map.classes.size()));
    const std::uint8_t most = *std::max_element(map.classes.begin(), map.classes.end());
    if (most >= palette.size())
        throw std::invalid_argument(name + "palette: " + std::to_string(palette.size()) +
                                    " colours, but the map holds class " + std::to_string(most));
}

}  // namespace

std::vector<Area> areas_of(const ClassMap& map)
{
    std::array<std::int64_t, 256> counts{};
    for (const std::uint8_t index : map.classes) counts[index]++;
    std::vector<Area> areas;
    for (std::size_t i = 0; i < counts.size(); i++)
        if (counts[i] > 0) areas.push_back({static_cast<std::int64_t>(i), counts[i]});
    std::stable_sort(areas.begin(), areas.end(), [](const Area& a, const Area& b) { return a.pixels > b.pixels; });
    return areas;
}

Image overlay(const Image& image, const ClassMap& map, const std::vector<Colour>& palette)
{
    check_map("overlay", map, palette);
    if (image.height != map.height || image.width != map.width || image.pixels.size() != 3 * map.classes.size())
        throw std::invalid_argument("[overlay] image: expected " + std::to_string(map.height) + " x " +
                                    std::to_string(map.width) + " pixels as the map, got " +
                                    std::to_string(image.height) + " x " + std::to_string(image.width));
    Image mixed = image;
    for (std::size_t i = 0; i < map.classes.size(); i++)
        for (std::size_t c = 0; c < 3; c++) {
            std::uint8_t& value = mixed.pixels[3 * i + c];
            value = static_cast<std::uint8_t>((value + palette[map.classes[i]][c]) / 2);
        }
    return mixed;
}

void save_class_png(const std::string& path, const ClassMap& map, const std::vector<Colour>& palette)
{
    check_map("save_class_png", map, palette);
    const std::vector<unsigned char> bytes =
        encode_png("save_class_png", map.height, map.width, map.classes.data(), palette);
    AtomicFile file("save_class_png", path);
    file.write(bytes.data(), bytes.size());
    file.commit();
}

}  // namespace vimcore
