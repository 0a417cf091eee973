// SPDX-License-Identifier: Apache-2.0
// Command-line options of one subcommand: --name VALUE, --name=VALUE, flags, --, and what is left over.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vim_infer {

class UsageError : public std::runtime_error {  // exit status 2
public:
    using std::runtime_error::runtime_error;
};

class Arguments {
public:
    // `usage` is what follows the command's name in its usage line.
    Arguments(std::string command, std::string usage, std::string summary)
        : command_(std::move(command)), usage_(std::move(usage)), summary_(std::move(summary))
    {
    }

    void flag(const std::string& name, bool& target, const std::string& help);
    void text(const std::string& name, const std::string& value, std::string& target, const std::string& help);
    void positive(const std::string& name, const std::string& value, std::int64_t& target, const std::string& help);
    void seconds(const std::string& name, const std::string& value, double& target, const std::string& help);
    void list(const std::string& name, const std::string& value, std::vector<std::int64_t>& target,
              const std::string& help);  // positive numbers, comma-separated
    void custom(const std::string& name, const std::string& value, std::function<void(const std::string&)> take,
                const std::string& help);
    void note(const std::string& text) { notes_.push_back(text); }  // shown at the end of the help

    // Words that are no options, in order. False: --help was asked for and printed.
    bool parse(const std::vector<std::string>& words, std::vector<std::string>& rest);

private:
    struct Option {
        std::string name, value, help;  // value empty: a flag
        std::function<void(const std::string&)> take;
    };
    const Option& find(const std::string& name) const;
    void print_help() const;

    std::string command_, usage_, summary_;
    std::vector<Option> options_;
    std::vector<std::string> notes_;
};

}  // namespace vim_infer
