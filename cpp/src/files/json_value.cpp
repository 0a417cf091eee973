// SPDX-License-Identifier: Apache-2.0
// JSON as a value in memory, for the small documents of configuration.
#include <unordered_set>
#include <utility>

#include "files/json.h"

namespace vimcore::json {
namespace {

Value read_value(Reader& reader, std::size_t& budget)
{
    Value value;
    value.kind = reader.peek();
    if (budget-- == 0) reader.fail("too many values");
    switch (value.kind) {
        case Kind::null:
            reader.null();
            break;
        case Kind::boolean:
            value.boolean = reader.boolean();
            break;
        case Kind::integer:
        case Kind::real:
            value.number = reader.number();
            value.kind = value.number.is_integer ? Kind::integer : Kind::real;
            break;
        case Kind::string:
            value.string = reader.string();
            break;
        case Kind::array:
            reader.begin_array();
            while (reader.next_element()) value.items.push_back(read_value(reader, budget));
            break;
        case Kind::object: {
            std::unordered_set<std::string> seen;
            std::string key;
            reader.begin_object();
            while (reader.next_key(key)) {
                if (!seen.insert(key).second) reader.fail("duplicate key \"" + printable(key) + "\"");
                value.keys.push_back(key);
                value.items.push_back(read_value(reader, budget));
            }
            break;
        }
    }
    return value;
}

[[noreturn]] void wrong_kind(const std::string& what, Kind want, Kind got)
{
    throw std::invalid_argument(what + ": expected " + name_of(want) + ", got " + name_of(got));
}

std::string json_of(const Option& option)
{
    if (const auto* boolean = std::get_if<bool>(&option)) return *boolean ? "true" : "false";
    if (const auto* integer = std::get_if<std::int64_t>(&option)) return std::to_string(*integer);
    if (const auto* real = std::get_if<double>(&option)) return number(*real);
    if (const auto* text = std::get_if<std::string>(&option)) return quote(*text);
    const auto* list = std::get_if<std::vector<Option>>(&option);
    if (!list) return "null";
    std::string out;
    for (const Option& item : *list) out += (out.empty() ? "[" : ", ") + json_of(item);
    return out + ']';
}

}  // namespace

const Value* Value::find(std::string_view key) const
{
    for (std::size_t i = 0; i < keys.size(); ++i)
        if (keys[i] == key) return &items[i];
    return nullptr;
}

bool Value::as_boolean(const std::string& what) const
{
    if (kind != Kind::boolean) wrong_kind(what, Kind::boolean, kind);
    return boolean;
}

std::int64_t Value::as_integer(const std::string& what) const
{
    if (kind != Kind::integer) wrong_kind(what, Kind::integer, kind);
    return number.integer;
}

double Value::as_real(const std::string& what) const
{
    if (kind != Kind::integer && kind != Kind::real) wrong_kind(what, Kind::real, kind);
    return number.real;
}

const std::string& Value::as_string(const std::string& what) const
{
    if (kind != Kind::string) wrong_kind(what, Kind::string, kind);
    return string;
}

const std::vector<Value>& Value::as_array(const std::string& what) const
{
    if (kind != Kind::array) wrong_kind(what, Kind::array, kind);
    return items;
}

void Value::require_object(const std::string& what) const
{
    if (kind != Kind::object) wrong_kind(what, Kind::object, kind);
}

Value parse(std::string_view text, int max_depth, std::size_t max_values)
{
    Reader reader(text, max_depth);
    Value value = read_value(reader, max_values);
    reader.finish();
    return value;
}

Value value_of(const Option& option)
{
    Value value;
    if (const auto* boolean = std::get_if<bool>(&option)) {
        value.kind = Kind::boolean;
        value.boolean = *boolean;
    } else if (const auto* integer = std::get_if<std::int64_t>(&option)) {
        value.kind = Kind::integer;
        value.number = {true, *integer, static_cast<double>(*integer)};
    } else if (const auto* real = std::get_if<double>(&option)) {
        value.kind = Kind::real;
        value.number.real = *real;
    } else if (const auto* text = std::get_if<std::string>(&option)) {
        value.kind = Kind::string;
        value.string = *text;
    } else if (const auto* list = std::get_if<std::vector<Option>>(&option)) {
        value.kind = Kind::array;
        for (const Option& item : *list) value.items.push_back(value_of(item));
    }
    return value;
}

std::string object(const Options& options)
{
    std::string out;
    for (const auto& [key, option] : options) out += (out.empty() ? "{" : ", ") + quote(key) + ": " + json_of(option);
    return out + '}';
}

}  // namespace vimcore::json
