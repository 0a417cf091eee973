// SPDX-License-Identifier: Apache-2.0
#include "files/json.h"

#include <charconv>
#include <cmath>

namespace vimcore::json {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, unsigned code)
{
    if (code < 0x80) {
        out += static_cast<char>(code);
        return;
    }
    const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const unsigned lead = extra == 1 ? 0xC0 : extra == 2 ? 0xE0 : 0xF0;
    out += static_cast<char>(lead | code >> 6 * extra);
    for (int i = extra - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
}

}  // namespace

const char* name_of(Kind kind)
{
    switch (kind) {
        case Kind::null:
            return "null";
        case Kind::boolean:
            return "a boolean";
        case Kind::integer:
            return "an integer";
        case Kind::real:
            return "a number";
        case Kind::string:
            return "a string";
        case Kind::array:
            return "an array";
        case Kind::object:
            return "an object";
    }
    return "?";
}

std::size_t utf8_length(std::string_view text)
{
    if (text.empty()) return 0;
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned lead = byte(0);
    if (lead < 0x80) return 1;
    const std::size_t length = lead >= 0xC2 && lead <= 0xDF   ? 2
                               : (lead & 0xF0) == 0xE0        ? 3
                               : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                              : 0;
    if (length == 0 || text.size() < length) return 0;
    for (std::size_t i = 1; i < length; ++i)
        if ((byte(i) & 0xC0) != 0x80) return 0;
    // Overlong forms, surrogates, beyond U+10FFFF: all show in the second byte.
    if (lead == 0xE0 && byte(1) < 0xA0) return 0;
    if (lead == 0xED && byte(1) > 0x9F) return 0;
    if (lead == 0xF0 && byte(1) < 0x90) return 0;
    if (lead == 0xF4 && byte(1) > 0x8F) return 0;
    return length;
}

bool is_utf8(std::string_view text)
{
    while (!text.empty()) {
        const std::size_t length = utf8_length(text);
        if (length == 0) return false;
        text.remove_prefix(length);
    }
    return true;
}

std::string quote(std::string_view text)
{
    static constexpr char hex[] = "0123456789abcdef";
    if (!is_utf8(text)) throw std::invalid_argument("[json] text is not valid UTF-8: " + printable(text));
    std::string out = "\"";
    for (const char c : text) {
        const auto code = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\t') {
            out += "\\t";
        } else if (code < 0x20 || code == 0x7F) {
            out += "\\u00";
            out += hex[code >> 4];
            out += hex[code & 15];
        } else {
            out += c;
        }
    }
    return out += '"';
}

std::string number(double value)
{
    if (!std::isfinite(value)) throw std::invalid_argument("[json] a number must be finite");
    char text[40];
    const auto end = std::to_chars(text, text + sizeof text, value).ptr;
    std::string out(text, end);
    if (out.find_first_of(".e") == std::string::npos) out += ".0";
    return out;
}

std::string printable(std::string_view text, std::size_t max_bytes)
{
    static constexpr char hex[] = "0123456789abcdef";
    std::string out;
    std::size_t at = 0;
    while (at < text.size()) {
        const std::size_t length = utf8_length(text.substr(at));
        if (at + length > max_bytes || at >= max_bytes) return out + "...";
        const auto code = static_cast<unsigned char>(text[at]);
        if (length == 0 || code < 0x20 || code == 0x7F) {
            out += "\\x";
            out += hex[code >> 4];
            out += hex[code & 15];
            ++at;
        } else {
            out += text.substr(at, length);
            at += length;
        }
    }
    return out;
}

void Reader::fail(const std::string& what, std::size_t offset) const
{
    std::size_t line = 1, begin = 0;
    for (std::size_t i = 0; i < offset && i < text_.size(); ++i)
        if (text_[i] == '\n') ++line, begin = i + 1;
    throw ParseError("[json] " + what + " at line " + std::to_string(line) + ", column " +
                         std::to_string(offset - begin + 1) + " (byte " + std::to_string(offset) + ")",
                     offset);
}

void Reader::space()
{
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
        ++at_;
}

void Reader::literal(std::string_view word)
{
    space();
    if (text_.substr(at_, word.size()) != word) fail("expected " + std::string(word));
    at_ += word.size();
}

Kind Reader::peek()
{
    space();
    if (at_ >= text_.size()) fail("unexpected end of text");
    const char c = text_[at_];
    if (c == '{') return Kind::object;
    if (c == '[') return Kind::array;
    if (c == '"') return Kind::string;
    if (c == 't' || c == 'f') return Kind::boolean;
    if (c == 'n') return Kind::null;
    if (c == '-' || is_digit(c)) return Kind::real;
    fail("unexpected character '" + printable(text_.substr(at_, 1)) + "'");
}

void Reader::null() { literal("null"); }

bool Reader::boolean()
{
    space();
    const bool value = at_ < text_.size() && text_[at_] == 't';
    literal(value ? "true" : "false");
    return value;
}

Number Reader::number()
{
    space();
    const std::size_t begin = at_;
    const auto digits = [&] {
        if (at_ >= text_.size() || !is_digit(text_[at_])) fail("expected a digit");
        while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    };
    const auto take = [&](char c) { return at_ < text_.size() && text_[at_] == c && ++at_; };
    take('-');
    if (take('0')) {
        if (at_ < text_.size() && is_digit(text_[at_])) fail("a number must not start with 0");
    } else {
        digits();
    }
    Number value;
    value.is_integer = true;
    if (take('.')) value.is_integer = false, digits();
    if (take('e') || take('E')) {
        value.is_integer = false;
        if (!take('+')) take('-');
        digits();
    }
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    if (value.is_integer && std::from_chars(first, last, value.integer).ec != std::errc())
        fail("integer out of range", begin);
    if (std::from_chars(first, last, value.real).ec != std::errc()) fail("number out of range", begin);
    return value;
}

std::int64_t Reader::integer()
{
    if (const Kind kind = peek(); kind != Kind::real) fail(std::string("expected an integer, got ") + name_of(kind));
    const std::size_t begin = at_;
    const Number value = number();
    if (!value.is_integer) fail("expected an integer, got a number with fraction or exponent", begin);
    return value.integer;
}

unsigned Reader::hex4()
{
    unsigned code = 0;
    const char* first = text_.data() + at_;
    if (text_.size() - at_ < 4) fail("unexpected end of text in a string");
    const auto result = std::from_chars(first, first + 4, code, 16);
    if (result.ec != std::errc() || result.ptr != first + 4) fail("expected four hexadecimal digits");
    at_ += 4;
    return code;
}

void Reader::escape(std::string& out)
{
    const std::size_t begin = at_++;  // the backslash
    if (at_ >= text_.size()) fail("unexpected end of text in a string");
    switch (text_[at_++]) {
        case '"':
            out += '"';
            return;
        case '\\':
            out += '\\';
            return;
        case '/':
            out += '/';
            return;
        case 'b':
            out += '\b';
            return;
        case 'f':
            out += '\f';
            return;
        case 'n':
            out += '\n';
            return;
        case 'r':
            out += '\r';
            return;
        case 't':
            out += '\t';
            return;
        case 'u':
            break;
        default:
            fail("unknown escape in a string", begin);
    }
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xE000) {
        if (code >= 0xDC00 || text_.substr(at_, 2) != "\\u") fail("unpaired surrogate in a string", begin);
        at_ += 2;
        const unsigned low = hex4();
        if (low < 0xDC00 || low >= 0xE000) fail("unpaired surrogate in a string", begin);
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
}

std::string Reader::string(std::size_t max_bytes)
{
    if (const Kind kind = peek(); kind != Kind::string) fail(std::string("expected a string, got ") + name_of(kind));
    const std::size_t begin = at_++;
    std::string out;
    for (;;) {
        if (at_ >= text_.size()) fail("unexpected end of text in a string");
        const char c = text_[at_];
        if (c == '"') break;
        if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
        if (c == '\\') {
            escape(out);
        } else {
            const std::size_t length = utf8_length(text_.substr(at_, 4));
            if (length == 0) fail("invalid UTF-8 in a string");
            out.append(text_, at_, length);
            at_ += length;
        }
        if (out.size() > max_bytes) fail("string longer than " + std::to_string(max_bytes) + " bytes", begin);
    }
    ++at_;
    return out;
}

void Reader::open(char bracket)
{
    const Kind want = bracket == '{' ? Kind::object : Kind::array;
    if (const Kind kind = peek(); kind != want)
        fail(std::string("expected ") + name_of(want) + ", got " + name_of(kind));
    if (first_.size() >= static_cast<std::size_t>(max_depth_)) fail("nested deeper than " + std::to_string(max_depth_));
    ++at_;
    first_.push_back(true);
}

bool Reader::next(char close)
{
    space();
    if (at_ >= text_.size()) fail("unexpected end of text");
    if (text_[at_] == close) {
        ++at_;
        first_.pop_back();
        return false;
    }
    if (!first_.back()) {
        if (text_[at_] != ',') fail(std::string("expected ',' or '") + close + "'");
        ++at_;
        space();
    }
    first_.back() = false;
    return true;
}

void Reader::begin_object() { open('{'); }
void Reader::begin_array() { open('['); }
bool Reader::next_element() { return next(']'); }

bool Reader::next_key(std::string& key, std::size_t max_bytes)
{
    if (!next('}')) return false;
    key = string(max_bytes);
    space();
    if (at_ >= text_.size() || text_[at_] != ':') fail("expected ':'");
    ++at_;
    return true;
}

void Reader::skip()
{
    switch (peek()) {
        case Kind::null:
            null();
            return;
        case Kind::boolean:
            boolean();
            return;
        case Kind::integer:
        case Kind::real:
            number();
            return;
        case Kind::string:
            string();
            return;
        case Kind::array:
            begin_array();
            while (next_element()) skip();
            return;
        case Kind::object: {
            std::string key;
            begin_object();
            while (next_key(key)) skip();
            return;
        }
    }
}

void Reader::finish()
{
    space();
    if (at_ != text_.size()) fail("unexpected text after the value");
}

}  // namespace vimcore::json
