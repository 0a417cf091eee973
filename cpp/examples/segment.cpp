// SPDX-License-Identifier: Apache-2.0
// What is where in a picture?  example_segment seg.safetensors street.jpg street.png
// Prints the share of each class and writes the class of every pixel, as an index PNG.
#include <vimcore/vimcore.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv)
try {
    if (argc != 4) return std::fprintf(stderr, "usage: example_segment WEIGHTS PICTURE RESULT.png\n"), 2;
    const auto model = vimcore::SegmentationModel::load(argv[1]);  // immutable: share it between threads
    const vimcore::SegmentationFile& about = model->about();       // classes, palette, windows

    vimcore::SegmentationSession session(model);  // one per thread
    const vimcore::ClassMap map = session.segment(vimcore::decode_image(argv[2]));
    for (const auto& [index, pixels] : vimcore::areas_of(map))
        std::printf("%5.1f %%  %s\n", 100.0 * static_cast<double>(pixels) / static_cast<double>(map.classes.size()),
                    about.classes[static_cast<std::size_t>(index)].c_str());
    vimcore::save_class_png(argv[3], map, about.palette);
} catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
