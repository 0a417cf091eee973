// SPDX-License-Identifier: Apache-2.0
// Pictures decoded ahead by threads of their own, handed out in the order of the list.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "vimcore/preprocess.h"

namespace vim_infer {

struct Loaded {
    std::string path, error;    // error empty: what was decoded is good
    std::vector<float> pixels;  // the network's input,
    vimcore::Image picture;     // or the picture as it is
};

// Fills in one of both from a file; exceptions say what is wrong with it.
using Decode = std::function<void(const std::string& path, Loaded& image)>;
Decode to_pixels(const vimcore::Preprocess& steps);
Decode to_picture();

class ImageStream {
public:
    // At most `ahead` pictures are in memory, being decoded or waiting.
    ImageStream(std::vector<std::string> paths, Decode decode, int threads, std::size_t ahead);
    ~ImageStream();
    ImageStream(const ImageStream&) = delete;
    ImageStream& operator=(const ImageStream&) = delete;

    bool next(Loaded& image);  // false: no more. What `image` held is used again.
    std::size_t total() const { return paths_.size(); }

private:
    struct Slot {
        Loaded image;
        bool ready = false;
    };
    void run();
    void stop();

    const std::vector<std::string> paths_;
    const Decode decode_;
    std::mutex mutex_;
    std::condition_variable ready_, free_;
    std::vector<Slot> slots_;  // picture i lives in slot i % ahead
    std::size_t begun_ = 0, taken_ = 0;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

// One file, or what is wrong with it in image.error.
void load(const std::string& path, const Decode& decode, Loaded& image);

}  // namespace vim_infer
