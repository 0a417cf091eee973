// SPDX-License-Identifier: Apache-2.0
// NumPy's .npy files: what their header says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "regular_file.h"

namespace vim_infer {

struct ArrayHeader {
    std::string type;                 // NumPy's name, as uint8; of what has none what the file says
    bool fortran_order = false;       // the first index is the one that moves fastest
    std::vector<std::int64_t> shape;  // numbers of at least 0
    std::int64_t data = 0;            // where the values begin
};
ArrayHeader read_array_header(const RegularFile& file);  // vimcore::Error where it is damaged, or no such file

std::string shape_text(const std::vector<std::int64_t>& shape);  // as Python writes it: (3, 5), (3,)

}  // namespace vim_infer
