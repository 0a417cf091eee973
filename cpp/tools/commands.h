// SPDX-License-Identifier: Apache-2.0
// The subcommands. Each takes the words after its name and returns the exit status; errors are exceptions.
#pragma once

#include <string>
#include <vector>

namespace vim_infer {

int predict(const std::vector<std::string>& words);
int segment(const std::vector<std::string>& words);
int features(const std::vector<std::string>& words);
int info(const std::vector<std::string>& words);
int bench(const std::vector<std::string>& words);

}  // namespace vim_infer
