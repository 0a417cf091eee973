// SPDX-License-Identifier: Apache-2.0
// Which kernels to run: the widest instruction set that was built and that the machine has, or what VIMCORE_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace vimcore::cpu {

// Chosen once, at first use. Throws vimcore::Error when VIMCORE_ISA names a set that is unknown or not available.
template <class T>
const Kernels<T>& kernels();
// A given one of isas_available().
template <class T>
const Kernels<T>& kernels(const std::string& isa);

std::string isa_in_use();
std::vector<std::string> isas_built();      // compiled into this library
std::vector<std::string> isas_available();  // of those, the ones this machine can run

}  // namespace vimcore::cpu
