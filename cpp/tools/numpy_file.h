// SPDX-License-Identifier: Apache-2.0
// NumPy's files: an array as .npy, several as .npz, which is a ZIP archive without compression.
#pragma once

#include <string>
#include <vector>

#include "vimcore/tensor.h"

namespace vim_infer {

// .npy: the values alone; .npz: the arrays `features` and `images`, the names as text.
void write_numpy(const std::string& path, bool archive, const std::vector<std::string>& images,
                 const std::vector<float>& values, const vimcore::Shape& shape);

}  // namespace vim_infer
