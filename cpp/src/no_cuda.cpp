// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA backend in builds without it.
#include "backend.h"
#include "vimcore/error.h"

namespace vimcore {

Backend& cuda_backend() { throw Error("[cuda] this build of vimcore has no CUDA backend; use Device::cpu()"); }

}  // namespace vimcore
