// SPDX-License-Identifier: Apache-2.0
// Just enough of NumPy's .npz to read arrays of bytes: a zip archive (stored or deflated) of .npy files.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace npz {

using Bytes = std::vector<std::uint8_t>;

inline void require(bool condition, const std::string& what)
{
    if (!condition) throw std::runtime_error("npz: " + what);
}

inline std::size_t number(const Bytes& from, std::size_t at, int bytes)  // little-endian
{
    require(at + static_cast<std::size_t>(bytes) <= from.size(), "the file is cut off");
    std::size_t value = 0;
    for (int i = bytes - 1; i >= 0; i--) value = value << 8 | from[at + static_cast<std::size_t>(i)];
    return value;
}

inline Bytes inflate_raw(const std::uint8_t* from, std::size_t size, std::size_t unpacked)
{
    Bytes out(unpacked);
    z_stream stream{};
    require(inflateInit2(&stream, -MAX_WBITS) == Z_OK, "zlib does not start");
    stream.next_in = const_cast<std::uint8_t*>(from);
    stream.avail_in = static_cast<uInt>(size);
    stream.next_out = out.data();
    stream.avail_out = static_cast<uInt>(unpacked);
    const int end = inflate(&stream, Z_FINISH);
    inflateEnd(&stream);
    require(end == Z_STREAM_END && stream.total_out == unpacked, "damaged data");
    return out;
}

// The bytes of array `name` (uint8, C order), `items` of `item` elements each.
inline Bytes read(const std::string& path, const std::string& name, std::size_t item, std::size_t& items)
{
    std::ifstream file(path, std::ios::binary);
    const Bytes zip{std::istreambuf_iterator<char>(file), {}};
    require(file.is_open() && zip.size() > 22, path + ": cannot be read");
    std::size_t end = zip.size() - 22;  // the end record lies behind the directory; a comment may follow
    while (number(zip, end, 4) != 0x06054b50) require(end-- > 0, path + ": no zip archive");
    std::size_t at = number(zip, end + 16, 4);
    for (std::size_t left = number(zip, end + 10, 2); left > 0; left--) {
        require(number(zip, at, 4) == 0x02014b50, "damaged directory");
        const std::size_t method = number(zip, at + 10, 2), packed = number(zip, at + 20, 4),
                          unpacked = number(zip, at + 24, 4), length = number(zip, at + 28, 2),
                          local = number(zip, at + 42, 4);
        require(at + 46 + length <= zip.size(), "damaged directory");
        if (std::string(zip.begin() + static_cast<std::ptrdiff_t>(at + 46),
                        zip.begin() + static_cast<std::ptrdiff_t>(at + 46 + length)) != name + ".npy") {
            at += 46 + length + number(zip, at + 30, 2) + number(zip, at + 32, 2);
            continue;
        }
        const std::size_t data = local + 30 + number(zip, local + 26, 2) + number(zip, local + 28, 2);
        require(data + packed <= zip.size() && (method == 0 || method == 8), "damaged entry");
        const std::uint8_t* from = zip.data() + data;
        const Bytes npy = method == 8 ? inflate_raw(from, packed, unpacked) : Bytes(from, from + packed);
        require(npy.size() > 10 && std::memcmp(npy.data(), "\x93NUMPY\x01", 7) == 0, name + ": no .npy version 1");
        const std::size_t begin = 10 + number(npy, 8, 2);
        require(begin <= npy.size() && (npy.size() - begin) % item == 0, name + ": another size than expected");
        const std::string header(npy.begin() + 10, npy.begin() + static_cast<std::ptrdiff_t>(begin));
        require(header.find("'|u1'") != std::string::npos && header.find("False") != std::string::npos,
                name + ": expected uint8 in C order, got " + header);
        items = (npy.size() - begin) / item;
        return {npy.begin() + static_cast<std::ptrdiff_t>(begin), npy.end()};
    }
    throw std::runtime_error("npz: " + path + " has no array " + name);
}

}  // namespace npz
