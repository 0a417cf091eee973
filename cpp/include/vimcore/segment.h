// SPDX-License-Identifier: Apache-2.0
// Segmentation: the class of every pixel, by a network whose file has a head for it (FCN, linear, UperNet). On the CPU.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/image.h"
#include "vimcore/safetensors.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

using Colour = std::array<std::uint8_t, 3>;  // red, green, blue

// The metadata key vimcore.task: what a file is for and how its head is made.
struct SegmentationFile {
    enum class Head : std::uint8_t { linear, fcn, uper };
    enum class Taps : std::uint8_t { stream, mixer };

    Config config;  // of the backbone, num_classes 0
    Head head = Head::linear;
    std::int64_t channels = 0;                         // of the head
    std::int64_t convs = 0;                            // fcn: how many 3 x 3 convolutions
    bool group_norm = false;                           // instead of batch norm, which is made part of the convolutions
    std::vector<std::int64_t> indices;                 // uper: the layers whose outputs the four levels are made of
    Taps taps = Taps::stream;                          // uper: the stream behind a layer, or what its mixer added to it
    std::vector<std::string> classes;                  // one name each, at most 255: 255 in a mask says "ignore"
    std::vector<Colour> palette;                       // one colour each
    std::int64_t window_height = 0, window_width = 0;  // of the network's input
    std::int64_t stride_height = 0, stride_width = 0;  // from one window to the next
    struct Resize {
        std::int64_t short_side = 0, long_side = 0;  // a picture is made as large as fits both
    };
    std::optional<Resize> resize;
    std::vector<double> mean, std;  // of pixel values in [0, 1]; 3 values, or 1: luminance only

    // Multiply-adds of one image of the backbone's size, and learnt numbers of the head alone: the auxiliary head,
    // which only training has, is in neither.
    std::int64_t flops() const;
    std::int64_t head_parameters() const;
    // That the tensors are those of this network; Error names what does not fit.
    void check_tensors(const SafetensorsFile& file, const std::string& path) const;

    // Of a file's metadata. Error: "[load] PATH: ..." where a part is missing or damaged, or the task is another.
    static SegmentationFile describe(const std::map<std::string, std::string>& metadata, const std::string& path);
};
const char* name_of(SegmentationFile::Head head);  // as in files

struct ClassMap {
    std::int64_t height = 0, width = 0;
    std::vector<std::uint8_t> classes;  // (height, width)
};

struct SegmentationNetwork;  // the library's part

// A loaded network: immutable, shared between threads.
class SegmentationModel {
public:
    // Error names what is wrong with the file; std::invalid_argument where the device is not the CPU.
    static std::shared_ptr<const SegmentationModel> load(const std::string& path, Device device = Device::cpu());

    const SegmentationFile& about() const { return about_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

private:
    friend class SegmentationSession;
    SegmentationFile about_;
    std::map<std::string, std::string> metadata_;
    std::shared_ptr<const SegmentationNetwork> network_;
};

// One per thread: scratch memory and threads. logits() and classes() do not allocate after the first runs of a batch
// size. Results depend neither on the number of threads nor on how many images are given at a time.
class SegmentationSession {
public:
    // threads 0: as many as the machine has cores. dtype: of the backbone's activations, f32 or bf16; the head computes
    // in float32.
    explicit SegmentationSession(std::shared_ptr<const SegmentationModel> model, int threads = 0,
                                 DType dtype = DType::f32);
    ~SegmentationSession();
    SegmentationSession(const SegmentationSession&) = delete;
    SegmentationSession& operator=(const SegmentationSession&) = delete;

    // images: (batch, channels, window_height, window_width) normalised float32. logits: (batch, classes,
    // window_height, window_width); classes: (batch, window_height, window_width), of equal logits the first.
    void logits(const float* images, std::int64_t batch, float* logits);
    void classes(const float* images, std::int64_t batch, std::uint8_t* classes);

    // A whole picture: resized as the file says, normalised, cut into windows whose logits are averaged, and these
    // resized to the picture. Error where values are not finite, std::invalid_argument where the picture needs more
    // than max_windows windows.
    static constexpr std::int64_t max_windows = 65536;
    ClassMap segment(const Image& image);
    void segment(const Image& image, ClassMap& result);  // whose memory is used again

private:
    class Runner;
    std::unique_ptr<Runner> runner_;
};

// How many pixels each class has, most first, of equal numbers the lower index; classes without pixels are left out.
struct Area {
    std::int64_t index = 0, pixels = 0;
};
std::vector<Area> areas_of(const ClassMap& map);

// Half the picture, half the colours of its classes.
Image overlay(const Image& image, const ClassMap& map, const std::vector<Colour>& palette);

// An 8-bit PNG of class indices with a palette. Written under a temporary name, then renamed. Error also when built
// without libpng.
void save_class_png(const std::string& path, const ClassMap& map, const std::vector<Colour>& palette);

}  // namespace vimcore
