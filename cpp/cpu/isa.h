// SPDX-License-Identifier: Apache-2.0
// Which kernels to run: the widest instruction set that was built and that the machine has, or what VIMCORE_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace vimcore::cpu {

// Chosen once, at first use. Throws vimcore::Error when VIMCORE_ISA names a set that is unknown or not available, and
// for bf16 without a unit for it, unless VIMCORE_ISA names a set: then it is emulated.
template <class T>
const Kernels<T>& kernels();
// A given one of isas_available().
template <class T>
const Kernels<T>& kernels(const std::string& isa);

std::string isa_in_use();
std::string bf16_in_use();                  // see bf16_unit() in build_info.h
std::string bf16_missing();                 // why bf16 is refused here, and what to do; "" where it is not
std::vector<std::string> isas_built();      // compiled into this library
std::vector<std::string> isas_available();  // of those, the ones this machine can run
std::vector<std::string> isas_of_float();   // of those, the ones that differ in more than bf16

}  // namespace vimcore::cpu
