// SPDX-License-Identifier: Apache-2.0
// Options of Python, by name, and back.
#pragma once

#include "convert.h"

namespace vimcore::python {

// The value as null, boolean, integer, finite real, text or a list of these; numbers of numpy and torch are numbers.
// TypeError and ValueError name `what`.
Option to_option(nb::handle value, const std::string& what);

// The values as Python's own types; `what` of an error is "[group] name".
Options to_options(const nb::kwargs& values, const char* group);

nb::object from_option(const Option& option);
nb::dict from_options(const Options& options);

// "Name(key=value, ...)" of the options that differ from `defaults`.
std::string shown(const char* name, const Options& options, const Options& defaults);

}  // namespace vimcore::python
