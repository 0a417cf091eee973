// SPDX-License-Identifier: Apache-2.0
// Bytes as a picture: decoded, then resized, cropped and normalised to sizes that the last bytes choose.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "vimcore/error.h"
#include "vimcore/preprocess.h"

using namespace vimcore;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    if (size < 4) return 0;
    size -= 4;
    const std::uint8_t* choice = data + size;
    try {
        const Image image = decode_image(data, size, "fuzz");
        if (image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3)) std::abort();
        if (image.pixels.size() > (1 << 20)) return 0;  // what follows takes time, and its sizes are chosen below
        Preprocess steps{.resize = choice[0], .crop_height = 1 + choice[1], .crop_width = 1 + choice[2]};
        if (choice[3] % 2) steps.mean = steps.std = {0.5};
        const std::int64_t longer = std::max(image.height, image.width), shorter = std::min(image.height, image.width);
        if (steps.resize > 0 && longer / shorter > 200) steps.resize = 0;
        std::vector<float> out(steps.mean.size() * static_cast<std::size_t>(steps.crop_height * steps.crop_width), NAN);
        preprocess(image, steps, out.data());
        for (const float value : out)
            if (!std::isfinite(value)) std::abort();  // every number was written
        const Image small = resize_bicubic(image, 1 + choice[1], 1 + choice[2]);
        if (small.height != 1 + choice[1] || small.width != 1 + choice[2]) std::abort();
    } catch (const Error&) {
    }
    return 0;
}
