// SPDX-License-Identifier: Apache-2.0
// Which way up a picture is: cameras store the sensor's rows and note how the camera was held.
#pragma once

#include <cstddef>

#include "vimcore/image.h"

namespace vimcore {

// EXIF's number, 1 (as stored) to 8, of a JPEG (APP1) or PNG (eXIf); else what XMP tells there. 1 too where there is
// none, where it is no such number or where it lies in damaged data. Reads nothing outside the bytes.
int orientation_of(const void* bytes, std::size_t size);

// The picture as it is meant to be seen.
Image upright(Image image, int orientation);

}  // namespace vimcore
