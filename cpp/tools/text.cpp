// SPDX-License-Identifier: Apache-2.0
#include "text.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace vim_infer {
namespace {

// Bytes of the UTF-8 sequence at the start of `text`; 0 where it is not valid.
std::size_t sequence_length(std::string_view text)
{
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned lead = byte(0);
    if (lead < 0x80) return 1;
    const std::size_t length = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || text.size() < length) return 0;
    for (std::size_t i = 1; i < length; i++)
        if ((byte(i) & 0xC0) != 0x80) return 0;
    // Overlong forms, surrogates, beyond U+10FFFF.
    if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) > 0x9F)) return 0;
    if ((lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) > 0x8F)) return 0;
    return length;
}

// Characters that control a terminal or the direction of text, or that no text may hold: those of Unicode's
// categories Cc, Cf, Zl and Zp but soft hyphen and joiners, which belong to words.
bool is_coded(char32_t code)
{
    static constexpr char32_t ranges[][2] = {
        {0, 0x1F},          {0x7F, 0x9F},       {0x600, 0x605},     {0x61C, 0x61C},     {0x6DD, 0x6DD},
        {0x70F, 0x70F},     {0x890, 0x891},     {0x8E2, 0x8E2},     {0x180E, 0x180E},   {0x200B, 0x200B},
        {0x200E, 0x200F},   {0x2028, 0x202E},   {0x2060, 0x2064},   {0x2066, 0x206F},   {0xFEFF, 0xFEFF},
        {0xFFF9, 0xFFFB},   {0xFFFE, 0xFFFF},   {0x110BD, 0x110BD}, {0x110CD, 0x110CD}, {0x13430, 0x1343F},
        {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A}, {0xE0001, 0xE0001}, {0xE0020, 0xE007F},
    };
    return std::any_of(std::begin(ranges), std::end(ranges),
                       [&](const auto& range) { return range[0] <= code && code <= range[1]; });
}

std::string escaped(const char* format, unsigned code)
{
    char out[16];
    std::snprintf(out, sizeof out, format, code);
    return out;
}

[[noreturn]] void output_failed()
{
    if (errno == EPIPE) throw Closed{};
    throw std::runtime_error(std::string("cannot write the results: ") + std::strerror(errno));
}

}  // namespace

std::string json_text(std::string_view text)
{
    std::string out = "\"";
    while (!text.empty()) {
        const std::size_t length = sequence_length(text);
        const auto code = static_cast<unsigned char>(text[0]);
        if (length == 0)
            out += escaped("\\udc%02x", code);
        else if (code == '"' || code == '\\')
            out += {'\\', text[0]};
        else if (code >= 0x20)
            out += text.substr(0, length);
        else if (const char* known = std::strchr("\bb\ff\nn\rr\tt", text[0]); known && code != 0)
            out += {'\\', known[1]};
        else
            out += escaped("\\u%04x", code);
        text.remove_prefix(length ? length : 1);
    }
    return out += '"';
}

std::u32string code_points(std::string_view text)
{
    std::u32string out;
    while (!text.empty()) {
        const std::size_t length = sequence_length(text);
        const auto byte = [&](std::size_t i) { return static_cast<char32_t>(static_cast<unsigned char>(text[i])); };
        char32_t code = length == 0 ? 0xDC00 + byte(0) : length == 1 ? byte(0) : byte(0) & (0x7F >> length);
        for (std::size_t i = 1; i < length; i++) code = code << 6 | (byte(i) & 0x3F);
        out += code;
        text.remove_prefix(length ? length : 1);
    }
    return out;
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& names)
{
    std::string best;
    std::size_t least = std::max<std::size_t>(1, word.size() / 3) + 1;  // changes that are too many
    for (const std::string& name : names) {
        std::vector<std::size_t> row(name.size() + 1), before, older;  // changes from a part of word to each of name
        std::iota(row.begin(), row.end(), std::size_t{0});
        for (std::size_t i = 1; i <= word.size(); i++) {
            older = std::exchange(before, row);
            row[0] = i;
            for (std::size_t j = 1; j <= name.size(); j++) {
                const bool same = word[i - 1] == name[j - 1];
                row[j] = std::min({before[j] + 1, row[j - 1] + 1, before[j - 1] + !same});
                if (i > 1 && j > 1 && word[i - 1] == name[j - 2] && word[i - 2] == name[j - 1])
                    row[j] = std::min(row[j], older[j - 2] + 1);  // two letters exchanged
            }
        }
        if (row.back() < least) {
            least = row.back();
            best = name;
        }
    }
    return best.empty() ? best : " (did you mean " + best + "?)";
}

std::string number(double value, int digits)
{
    char out[40];
    std::snprintf(out, sizeof out, "%.*g", digits, value);
    return out;
}

std::string one_line(std::string_view text)
{
    std::string out;
    bool indented = false;  // the list items of a longer message follow a line break and blanks
    for (const char c : text) {
        if (c == '\n') {
            out += out.ends_with(':') ? " " : "; ";
            indented = true;
        } else if (c != ' ' || !indented) {
            indented = false;
            out += c;
        }
    }
    return literal(out);
}

std::string literal(std::string_view text)
{
    std::string out;
    while (!text.empty()) {
        const std::size_t length = sequence_length(text), bytes = length ? length : 1;
        const char32_t code = code_points(text.substr(0, bytes))[0];
        if (length == 0)
            out += escaped("\\x%02x", static_cast<unsigned char>(text[0]));
        else if (!is_coded(code))
            out += text.substr(0, bytes);
        else if (const char* known = std::strchr("\nn\rr\tt", static_cast<int>(code)); known && 0 < code && code < 0x20)
            out += {'\\', known[1]};
        else
            out += escaped(code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x", code);
        text.remove_prefix(bytes);
    }
    return out;
}

void print(std::string_view text)
{
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) output_failed();
}

void flush()
{
    if (std::fflush(stdout) != 0) output_failed();
}

void complain(std::string_view text)
{
    const std::string line = "vim-infer: " + one_line(text) + "\n";
    std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace vim_infer
