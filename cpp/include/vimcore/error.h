// SPDX-License-Identifier: Apache-2.0
// Errors of the library. A caller's mistake (shape, type, option) is std::invalid_argument;
// what the machine or a file did is vimcore::Error. The library never prints, aborts or exits.
#pragma once

#include <stdexcept>
#include <string>

namespace [[gnu::visibility("default")]] vimcore {

class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Memory that the machine does not have, or not any more.
class OutOfMemory : public Error {
public:
    using Error::Error;
};

}  // namespace vimcore
