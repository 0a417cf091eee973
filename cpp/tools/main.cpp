// SPDX-License-Identifier: Apache-2.0
// vim-infer: Vision Mamba from a terminal. Results on standard output, progress and errors on standard error; exit
// status 0, 1 (failed, also where only some of the images did) or 2 (bad usage).
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "arguments.h"
#include "commands.h"
#include "text.h"
#include "vimcore/version.h"

namespace {

struct Command {
    const char *name, *help;
    int (*run)(const std::vector<std::string>& words);
};

constexpr Command commands[] = {
    {"predict", "classify picture files", vim_infer::predict},
    {"segment", "give every pixel of picture files a class", vim_infer::segment},
    {"features", "write a vector for each picture: .npz, .npy, .csv or .safetensors", vim_infer::features},
    {"info", "show what a vimcore file holds and what this program can do", vim_infer::info},
    {"bench", "measure speed on this machine", vim_infer::bench},
};

void print_help()
{
    std::string text =
        "usage: vim-infer COMMAND [options]\n\nVision Mamba: classify pictures and their pixels.\n\ncommands:\n";
    for (const Command& command : commands) {
        std::string name = command.name;
        name.resize(10, ' ');
        text += "  " + name + command.help + "\n";
    }
    vim_infer::print(text + "\n`vim-infer COMMAND --help` shows a command's options; --version the version.\n");
}

int run(const std::vector<std::string>& words)
{
    if (words.empty()) throw vim_infer::UsageError("no command given; see vim-infer --help");
    const std::string& name = words[0];
    if (name == "--version") {
        vim_infer::print("vim-infer " VIMCORE_VERSION "\n");
        return 0;
    }
    if (name == "-h" || name == "--help") {
        print_help();
        return 0;
    }
    for (const Command& command : commands) {
        if (name != command.name) continue;
        try {
            return command.run({words.begin() + 1, words.end()});
        } catch (const vim_infer::UsageError& error) {
            throw vim_infer::UsageError(error.what() + ("; see vim-infer " + name + " --help"));
        }
    }
    std::vector<std::string> names;
    for (const Command& command : commands) names.push_back(command.name);
    throw vim_infer::UsageError("no command '" + name + "'" + vim_infer::did_you_mean(name, names) +
                                "; see vim-infer --help");
}

}  // namespace

int main(int count, char** words)
{
#ifndef _WIN32
    std::signal(SIGPIPE, SIG_IGN);  // writing says so too
    std::signal(SIGXFSZ, SIG_IGN);
#endif
    try {
        const int status = run({words + (count > 0), words + count});
        vim_infer::flush();
        return status;
    } catch (const vim_infer::Closed&) {
        return 1;
    } catch (const vim_infer::UsageError& error) {
        vim_infer::complain(error.what());
        return 2;
    } catch (const std::bad_alloc&) {
        vim_infer::complain("out of memory");
    } catch (const std::exception& error) {
        vim_infer::complain(error.what());
    }
    return 1;
}
