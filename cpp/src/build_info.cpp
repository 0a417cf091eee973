// SPDX-License-Identifier: Apache-2.0
#include "vimcore/build_info.h"

#include "isa.h"
#include "vimcore/image.h"
#include "vimcore/version.h"

namespace vimcore {

BuildInfo build_info()
{
    BuildInfo info;
    info.version = VIMCORE_VERSION;
#if defined(__clang__)
    info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    info.compiler = "gcc " __VERSION__;
#else
    info.compiler = "unknown";
#endif
    info.isa = cpu::isa_in_use();
    info.isas = cpu::isas_built();
#if defined(VIMCORE_CUDA)
    info.cuda = true;
#endif
    info.jpeg = has_jpeg();
    info.png = has_png();
#if defined(VIMCORE_OPENMP)
    info.openmp = true;
#endif
    return info;
}

}  // namespace vimcore
