// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "text.h"

namespace vim_infer {
namespace {

std::int64_t positive_number(const std::string& option, std::string_view text)
{
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > 1000000000)
        throw UsageError("argument " + option + ": expected a number of at least 1, got '" + std::string(text) + "'");
    return value;
}

}  // namespace

void Arguments::custom(const std::string& name, const std::string& value, std::function<void(const std::string&)> take,
                       const std::string& help)
{
    options_.push_back({name, value, help, std::move(take)});
}

void Arguments::flag(const std::string& name, bool& target, const std::string& help)
{
    custom(name, "", [&target](const std::string&) { target = true; }, help);
}

void Arguments::text(const std::string& name, const std::string& value, std::string& target, const std::string& help)
{
    custom(name, value, [&target](const std::string& text) { target = text; }, help);
}

void Arguments::positive(const std::string& name, const std::string& value, std::int64_t& target,
                         const std::string& help)
{
    custom(name, value, [&target, name](const std::string& text) { target = positive_number(name, text); }, help);
}

void Arguments::seconds(const std::string& name, const std::string& value, double& target, const std::string& help)
{
    const auto take = [&target, name](const std::string& text) {
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), target);
        if (error != std::errc() || end != text.data() + text.size() || !(target >= 0) || !(target <= 1e6))
            throw UsageError("argument " + name + ": expected a number of seconds, got '" + text + "'");
    };
    custom(name, value, take, help);
}

void Arguments::list(const std::string& name, const std::string& value, std::vector<std::int64_t>& target,
                     const std::string& help)
{
    const auto take = [&target, name](const std::string& text) {
        target.clear();
        for (std::size_t at = 0; at <= text.size();) {
            const std::size_t comma = std::min(text.find(',', at), text.size());
            target.push_back(positive_number(name, std::string_view(text).substr(at, comma - at)));
            at = comma + 1;
        }
    };
    custom(name, value, take, help);
}

const Arguments::Option& Arguments::find(const std::string& name) const
{
    for (const Option& option : options_)
        if (option.name == name) return option;
    std::vector<std::string> names{"--help"};
    for (const Option& option : options_) names.push_back(option.name);
    throw UsageError("unrecognized option '" + name + "'" + did_you_mean(name, names));
}

bool Arguments::parse(const std::vector<std::string>& words, std::vector<std::string>& rest)
{
    bool options_ended = false;
    for (std::size_t i = 0; i < words.size(); i++) {
        const std::string& word = words[i];
        if (options_ended || word.size() < 2 || word[0] != '-') {
            rest.push_back(word);
        } else if (word == "--") {
            options_ended = true;
        } else if (word == "-h" || word == "--help") {
            print_help();
            return false;
        } else {
            const std::size_t equals = word.find('=');
            const Option& option = find(word.substr(0, equals));
            if (option.value.empty()) {
                if (equals != std::string::npos) throw UsageError("argument " + option.name + ": takes no value");
                option.take("");
            } else if (equals != std::string::npos) {
                option.take(word.substr(equals + 1));
            } else {
                if (++i == words.size()) throw UsageError("argument " + option.name + ": expected " + option.value);
                option.take(words[i]);
            }
        }
    }
    return true;
}

void Arguments::print_help() const
{
    std::printf("usage: vim-infer %s %s\n\n%s\n\noptions:\n", command_.c_str(), usage_.c_str(), summary_.c_str());
    for (const Option& option : options_) {
        const std::string left = option.name + (option.value.empty() ? "" : " " + option.value);
        std::printf("  %-20s  %s\n", left.c_str(), option.help.c_str());
    }
    std::printf("  %-20s  show this help\n", "-h, --help");
    for (const std::string& note : notes_) std::printf("\n%s\n", note.c_str());
}

}  // namespace vim_infer
