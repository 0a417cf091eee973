// SPDX-License-Identifier: Apache-2.0
#include "npy.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string_view>

#include "vimcore/error.h"

namespace vim_infer {
namespace {

constexpr std::size_t magic_size = 8;        // with two bytes of the version
constexpr std::size_t max_header = 1 << 16;  // bytes; NumPy's are a hundred
constexpr std::size_t max_dimensions = 64;   // NumPy's own limit

[[noreturn]] void damaged() { throw vimcore::Error("not a NumPy array, or a damaged one"); }

// The dictionary of a header, {'descr': '|u1', 'fortran_order': False, 'shape': (3, 5), }.
class Dictionary {
public:
    explicit Dictionary(std::string_view text) : text_(text) {}

    ArrayHeader read()
    {
        ArrayHeader header;
        bool descr = false, order = false, shape = false;
        expect('{');
        while (!taken('}')) {
            const std::string key = quoted();
            expect(':');
            if (key == "descr" && !descr)
                descr = (header.type = type(), true);
            else if (key == "fortran_order" && !order)
                order = (header.fortran_order = truth(), true);
            else if (key == "shape" && !shape)
                shape = (header.shape = numbers(), true);
            else
                damaged();
            if (!taken(',')) {
                expect('}');
                break;
            }
        }
        if (!descr || !order || !shape) damaged();
        return header;
    }

private:
    bool taken(char wanted)
    {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) at_++;
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        at_++;
        return true;
    }
    void expect(char wanted)
    {
        if (!taken(wanted)) damaged();
    }
    std::string quoted()
    {
        const char quote = taken('\'') ? '\'' : '"';
        if (quote == '"') expect('"');
        const std::size_t end = text_.find(quote, at_);
        if (end == std::string_view::npos) damaged();
        const std::string found(text_.substr(at_, end - at_));
        if (!std::all_of(found.begin(), found.end(), [](char c) { return c >= ' ' && c <= '~'; })) damaged();
        at_ = end + 1;
        return found;
    }
    std::string type()
    {
        if (taken('[')) throw vimcore::Error("expected uint8, got an array of records");
        const std::string found = quoted();
        if (found.size() < 3 || !std::strchr("|<>=", found[0])) return found;
        const std::string_view bytes = std::string_view(found).substr(2);
        int size = 0;
        const auto [end, error] = std::from_chars(bytes.data(), bytes.data() + bytes.size(), size);
        if (error != std::errc() || end != bytes.data() + bytes.size() || size < 1 || size > 64) return found;
        switch (found[1]) {
            case 'b':
                return "bool";
            case 'u':
                return "uint" + std::to_string(8 * size);
            case 'i':
                return "int" + std::to_string(8 * size);
            case 'f':
                return "float" + std::to_string(8 * size);
            case 'c':
                return "complex" + std::to_string(8 * size);
            default:
                return found;
        }
    }
    bool truth()
    {
        taken(' ');
        for (const std::string_view word : {std::string_view("True"), std::string_view("False")}) {
            if (!text_.substr(at_).starts_with(word)) continue;
            at_ += word.size();
            return word == "True";
        }
        damaged();
    }
    std::vector<std::int64_t> numbers()
    {
        std::vector<std::int64_t> found;
        expect('(');
        while (!taken(')')) {
            std::int64_t value = 0;
            const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
            if (error != std::errc() || value < 0 || found.size() == max_dimensions) damaged();
            at_ = static_cast<std::size_t>(end - text_.data());
            found.push_back(value);
            if (!taken(',')) {
                expect(')');
                break;
            }
        }
        return found;
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

}  // namespace

ArrayHeader read_array_header(const RegularFile& file)
{
    unsigned char start[magic_size + 4] = {};
    const std::size_t got = file.read(start, sizeof start, 0);
    if (got < sizeof start || std::memcmp(start, "\x93NUMPY", 6) != 0 || start[6] < 1 || start[6] > 3) damaged();
    const std::size_t length_bytes = start[6] == 1 ? 2 : 4;
    std::size_t length = 0;
    for (std::size_t i = length_bytes; i-- > 0;) length = length << 8 | start[magic_size + i];
    if (length > max_header) damaged();
    std::string text(length, '\0');
    const auto begin = static_cast<std::int64_t>(magic_size + length_bytes);
    if (file.read(text.data(), length, begin) < length) damaged();
    ArrayHeader header = Dictionary(text).read();
    header.data = begin + static_cast<std::int64_t>(length);
    return header;
}

std::string shape_text(const std::vector<std::int64_t>& shape)
{
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace vim_infer
