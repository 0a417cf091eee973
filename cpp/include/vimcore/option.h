// SPDX-License-Identifier: Apache-2.0
// Options by name, as Python and JSON have them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace [[gnu::visibility("default")]] vimcore {

// Null, boolean, integer, real, text or a list.
struct Option : std::variant<std::monostate, bool, std::int64_t, double, std::string, std::vector<Option>> {
    using variant::variant;
};
using Options = std::vector<std::pair<std::string, Option>>;

}  // namespace vimcore
