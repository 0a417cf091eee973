// SPDX-License-Identifier: Apache-2.0
// A small strict JSON reader (RFC 8259) for file headers and metadata that may be hostile: depth and counts are
// limited, UTF-8 is validated, duplicate keys are errors, integers and reals are told apart. And a string writer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "vimcore/option.h"

namespace vimcore::json {

// what() ends in "at line L, column C (byte N)", counted from 1 / 1 / 0.
class ParseError : public std::invalid_argument {
public:
    ParseError(const std::string& what, std::size_t offset) : std::invalid_argument(what), offset(offset) {}
    std::size_t offset;
};

enum class Kind : std::uint8_t { null, boolean, integer, real, string, array, object };
const char* name_of(Kind kind);

struct Number {
    bool is_integer = false;  // written without fraction and exponent
    std::int64_t integer = 0;
    double real = 0;  // set in both cases
};

// Pulls values one after the other without storing them. Kind::real is peek()'s answer for any number.
//   reader.begin_object();
//   while (reader.next_key(key)) ... read one value ...
class Reader {
public:
    explicit Reader(std::string_view text, int max_depth = 16) : text_(text), max_depth_(max_depth) {}

    Kind peek();
    void null();
    bool boolean();
    Number number();
    std::int64_t integer();
    std::string string(std::size_t max_bytes = SIZE_MAX);
    void begin_object();
    bool next_key(std::string& key, std::size_t max_bytes = SIZE_MAX);  // false: the object has ended
    void begin_array();
    bool next_element();  // false: the array has ended
    void skip();          // one value of any kind
    void finish();        // nothing but white space may follow

    std::size_t offset() const { return at_; }
    [[noreturn]] void fail(const std::string& what) const { fail(what, at_); }
    [[noreturn]] void fail(const std::string& what, std::size_t offset) const;

private:
    void space();
    void literal(std::string_view word);
    void open(char bracket);
    bool next(char close);
    unsigned hex4();
    void escape(std::string& out);

    std::string_view text_;
    std::size_t at_ = 0;
    int max_depth_;
    std::vector<bool> first_;  // per open bracket: no element read yet
};

// A whole document in memory. The as_* functions throw std::invalid_argument "<what>: expected ..., got ...".
struct Value {
    Kind kind = Kind::null;
    bool boolean = false;
    Number number;
    std::string string;
    std::vector<std::string> keys;  // object: key of each item
    std::vector<Value> items;       // object and array

    const Value* find(std::string_view key) const;  // nullptr: absent
    bool as_boolean(const std::string& what) const;
    std::int64_t as_integer(const std::string& what) const;
    double as_real(const std::string& what) const;  // integers too
    const std::string& as_string(const std::string& what) const;
    const std::vector<Value>& as_array(const std::string& what) const;
    void require_object(const std::string& what) const;
};

Value value_of(const Option& option);
std::string object(const Options& options);  // as JSON, at least one

Value parse(std::string_view text, int max_depth = 16, std::size_t max_values = 1000000);

// Bytes of the UTF-8 sequence at the start of `text`; 0 where it is not valid.
std::size_t utf8_length(std::string_view text);
bool is_utf8(std::string_view text);

std::string quote(std::string_view text);  // JSON string with quotes; std::invalid_argument where not UTF-8
std::string number(double value);          // shortest form that reads back as the same double; finite only

// For error messages: control characters and broken UTF-8 escaped, at most max_bytes of text, then "...".
std::string printable(std::string_view text, std::size_t max_bytes = 100);

}  // namespace vimcore::json
