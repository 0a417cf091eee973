// SPDX-License-Identifier: Apache-2.0
// Clips on the disk: folders of pictures, one a frame in the order of the numbers in their names, or .npy files
// (T, H, W, 1 or 3) uint8. The same as vimcore/data/clip_files.py.
#pragma once

#include <cstdint>

#include "image_stream.h"
#include "vimcore/preprocess.h"

namespace vim_infer {

// The network's input (C, frames, h, w) of a clip: all of its frames, or the middle of `frames` equal parts.
Decode to_clip(const vimcore::Preprocess& steps, std::int64_t frames);

}  // namespace vim_infer
