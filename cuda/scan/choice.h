// SPDX-License-Identifier: Apache-2.0
// Which kernel the scan runs, for tests: every kernel that applies gives the same result, the tuned ones the same bits.
#pragma once

#include <cstdint>

namespace vimcore::cuda {

// narrow: a lane per state; middle: a lane per four states; wide: two channels of eight states in a lane; whole: two
// channels of sixteen.
// Backward has one tuned kernel, which any of them stands for.
enum class ScanKernel : std::uint8_t { automatic, generic, narrow, middle, wide, whole };

// Of the whole process, until the next call. A tuned kernel that does not apply then is an error.
void force_scan(ScanKernel kernel);
ScanKernel forced_scan();

}  // namespace vimcore::cuda
