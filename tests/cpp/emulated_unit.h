// SPDX-License-Identifier: Apache-2.0
// Included by a file that names a unit: its matrix kernels, with the unit's instruction in plain arithmetic.
#include "gemm_blocks-inl.h"

namespace vimcore::cpu {

void VIM_FILL_TABLE(Kernels<bf16>& table)
{
    using namespace VIM_ISA;
    table.mr = BlockUnit::rows;
    table.nr = BlockUnit::columns;
    table.depth = BlockUnit::depth;
    table.pack = VIM_ISA::pack<bf16>;
    table.gemm = VIM_ISA::gemm<bf16>;
    table.gemm_tn = VIM_ISA::gemm_tn<bf16>;
    table.gemm_tn_scratch = VIM_ISA::gemm_tn_scratch<bf16>;
}

}  // namespace vimcore::cpu
