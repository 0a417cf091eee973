// SPDX-License-Identifier: Apache-2.0
#include "numpy_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string_view>

#include "text.h"
#include "vimcore/atomic_file.h"

namespace vim_infer {
namespace {

static_assert(std::endian::native == std::endian::little,
              "NumPy's files and ZIP archives are written as memory has them");

// What stands before the data of an array, a multiple of 64 bytes.
std::string header(const std::string& type, const std::string& shape)
{
    std::string text = "{'descr': '" + type + "', 'fortran_order': False, 'shape': " + shape + ", }";
    text.resize((10 + text.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
    text += '\n';
    const auto length = static_cast<std::uint16_t>(text.size());
    return std::string("\x93NUMPY\x01\0", 8) + std::string(reinterpret_cast<const char*>(&length), 2) + text;
}

// Names as an array of text: UTF-32, all of the same length, zeros after the shorter ones.
std::string text_array(const std::vector<std::string>& names)
{
    std::vector<std::u32string> decoded;
    std::size_t longest = 1;
    for (const std::string& name : names) {
        decoded.push_back(code_points(name));
        longest = std::max(longest, decoded.back().size());
    }
    std::string data = header("<U" + std::to_string(longest), "(" + std::to_string(names.size()) + ",)");
    for (std::u32string& name : decoded) {
        name.resize(longest, U'\0');
        data.append(reinterpret_cast<const char*>(name.data()), 4 * longest);
    }
    return data;
}

std::uint32_t crc32(std::uint32_t crc, std::string_view data)
{
    static const auto table = [] {
        std::array<std::uint32_t, 256> values{};
        for (std::uint32_t i = 0; i < 256; i++) {
            std::uint32_t value = i;
            for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
            values[i] = value;
        }
        return values;
    }();
    crc = ~crc;
    for (const char c : data) crc = table[(crc ^ static_cast<unsigned char>(c)) & 0xFF] ^ crc >> 8;
    return ~crc;
}

class Archive {
public:
    explicit Archive(const std::string& path) : file_("features", path) {}

    void add(const std::string& name, std::string_view head, std::string_view data)
    {
        Entry entry{name, crc32(crc32(0, head), data), head.size() + data.size(), at_};
        if (at_ + entry.size > 0xFFFF0000u)
            throw std::runtime_error(
                "an archive .npz of 4 GiB or more is not written; name a .npy or .safetensors file");
        put("PK\3\4" + numbers({20, 0x800, 0, 0, 0x21}) + about(entry) + entry.name);
        put(head);
        put(data);
        entries_.push_back(entry);
    }

    void end()
    {
        const std::uint64_t begin = at_;
        for (const Entry& entry : entries_)
            put("PK\1\2" + numbers({20, 20, 0x800, 0, 0, 0x21}) + about(entry) + numbers({0, 0, 0, 0, 0}) +
                number32(entry.at) + entry.name);
        const auto count = static_cast<unsigned>(entries_.size());
        put("PK\5\6" + numbers({0, 0, count, count}) + number32(at_ - begin) + number32(begin) + numbers({0}));
        file_.commit();
    }

private:
    struct Entry {
        std::string name;
        std::uint32_t crc;
        std::uint64_t size, at;
    };

    static std::string numbers(std::initializer_list<unsigned> values)
    {
        std::string text;
        for (const unsigned value : values) text += {static_cast<char>(value), static_cast<char>(value >> 8)};
        return text;
    }
    static std::string number32(std::uint64_t value)
    {
        return numbers({static_cast<unsigned>(value & 0xFFFF), static_cast<unsigned>(value >> 16 & 0xFFFF)});
    }
    // What both headers of an entry have in common, to its extra field.
    static std::string about(const Entry& entry)
    {
        return number32(entry.crc) + number32(entry.size) + number32(entry.size) +
               numbers({static_cast<unsigned>(entry.name.size()), 0});
    }
    void put(std::string_view data)
    {
        file_.write(data.data(), data.size());
        at_ += data.size();
    }

    vimcore::AtomicFile file_;
    std::vector<Entry> entries_;
    std::uint64_t at_ = 0;
};

}  // namespace

void write_numpy(const std::string& path, bool archive, const std::vector<std::string>& images,
                 const std::vector<float>& values, const vimcore::Shape& shape)
{
    const std::string head = header("<f4", vimcore::to_string(shape));
    const std::string_view data(reinterpret_cast<const char*>(values.data()), 4 * values.size());
    if (archive) {
        Archive file(path);
        file.add("features.npy", head, data);
        file.add("images.npy", text_array(images), {});
        return file.end();
    }
    vimcore::AtomicFile file("features", path);
    file.write(head.data(), head.size());
    file.write(data.data(), data.size());
    file.commit();
}

}  // namespace vim_infer
