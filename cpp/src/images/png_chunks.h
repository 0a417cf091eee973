// SPDX-License-Identifier: Apache-2.0
// The chunks of a PNG: length, kind, body, CRC of kind and body.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace vimcore::png_chunks {

constexpr std::size_t signature = 8;  // bytes before the first chunk

inline std::uint32_t big_endian(std::string_view bytes, std::size_t at)
{
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
    return value;
}

inline constexpr std::array<std::uint32_t, 256> crc_table = [] {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        table[i] = i;
        for (int bit = 0; bit < 8; ++bit) table[i] = (table[i] & 1 ? 0xEDB88320u : 0) ^ table[i] >> 1;
    }
    return table;
}();

inline std::uint32_t crc_of(std::string_view bytes)
{
    std::uint32_t crc = 0xFFFFFFFFu;
    for (const char c : bytes) crc = crc_table[(crc ^ static_cast<unsigned char>(c)) & 255] ^ crc >> 8;
    return ~crc;
}

struct Chunk {
    std::string_view kind, body;  // body: what the file holds of it
    bool whole;                   // with its CRC
    std::size_t at;               // where its length is
    std::uint32_t crc;            // as stored; 0 if not whole

    bool sound() const { return whole && crc_of({kind.data(), 4 + body.size()}) == crc; }
};

// Calls visit(chunk) up to IEND, or to the chunk in which the file ends.
template <class Visit>
void for_each(std::string_view file, const Visit& visit)
{
    for (std::size_t at = signature; at + 8 <= file.size();) {
        const std::uint64_t length = big_endian(file, at), left = file.size() - at - 8;
        const bool whole = length + 4 <= left;
        const auto size = static_cast<std::size_t>(length < left ? length : left);
        Chunk chunk{file.substr(at + 4, 4), file.substr(at + 8, size), whole, at, 0};
        if (whole) chunk.crc = big_endian(file, at + 8 + size);
        visit(chunk);
        if (!whole || chunk.kind == "IEND") return;
        at += 12 + size;
    }
}

}  // namespace vimcore::png_chunks
