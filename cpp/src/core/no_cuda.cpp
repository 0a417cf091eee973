// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA backend in builds without it.
#include "core/backend.h"
#include "vimcore/build_info.h"
#include "vimcore/error.h"

namespace vimcore {

Backend& cuda_backend()
{
    throw Error(
        "[cuda] this build of vimcore has no CUDA backend: build with VIMCORE_CUDA=ON (pip install -C "
        "cmake.define.VIMCORE_CUDA=ON), or use the CPU");
}

int cuda_device_count() { return 0; }

CudaProducts cuda_products() { return {}; }

std::string cuda_description(int) { return cuda_backend(), std::string(); }

}  // namespace vimcore
