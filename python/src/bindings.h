// SPDX-License-Identifier: Apache-2.0
// The parts of the extension module, one source file each.
#pragma once

#include <nanobind/nanobind.h>

namespace vimcore::python {

void bind_config(nanobind::module_& m);
void bind_network(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_ops(nanobind::module_& m);
void bind_positions(nanobind::module_& m);
void bind_files(nanobind::module_& m);
void bind_images(nanobind::module_& m);
void bind_segment(nanobind::module_& m);

}  // namespace vimcore::python
