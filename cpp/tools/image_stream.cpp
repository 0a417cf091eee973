// SPDX-License-Identifier: Apache-2.0
#include "image_stream.h"

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "regular_file.h"

namespace vim_infer {

Decode to_pixels(const vimcore::Preprocess& steps)
{
    return [steps](const std::string& path, Loaded& image) {
        const std::vector<unsigned char> bytes = read_file(path);
        image.pixels.resize(steps.mean.size() * static_cast<std::size_t>(steps.crop_height * steps.crop_width));
        vimcore::load_image(bytes.data(), bytes.size(), "", steps, image.pixels.data());
    };
}

Decode to_picture()
{
    return [](const std::string& path, Loaded& image) {
        const std::vector<unsigned char> bytes = read_file(path);
        image.picture = vimcore::decode_image(bytes.data(), bytes.size(), "");
    };
}

void load(const std::string& path, const Decode& decode, Loaded& image)
{
    image.path = path;
    image.error.clear();
    try {
        decode(path, image);
    } catch (const std::bad_alloc&) {
        image.error = "out of memory";  // which takes none
    } catch (...) {
        image.error = what_is_wrong();
    }
}

ImageStream::ImageStream(std::vector<std::string> paths, Decode decode, int threads, std::size_t ahead)
    : paths_(std::move(paths)), decode_(std::move(decode)), slots_(std::max<std::size_t>(ahead, 1))
{
    const auto count = std::min({static_cast<std::size_t>(std::max(threads, 1)), paths_.size(), slots_.size()});
    try {
        for (std::size_t i = 0; i < count; i++) threads_.emplace_back([this] { run(); });
    } catch (const std::exception& error) {
        stop();
        throw std::runtime_error("cannot start " + std::to_string(count) +
                                 " threads that read pictures: " + error.what() + "; ask for fewer by --threads");
    }
}

ImageStream::~ImageStream() { stop(); }

void ImageStream::stop()
{
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    free_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void ImageStream::run()
{
    std::unique_lock lock(mutex_);
    for (;;) {
        free_.wait(lock, [this] { return stop_ || begun_ == paths_.size() || begun_ < taken_ + slots_.size(); });
        if (stop_ || begun_ == paths_.size()) return;
        const std::size_t index = begun_++;
        Slot& slot = slots_[index % slots_.size()];
        lock.unlock();
        load(paths_[index], decode_, slot.image);
        lock.lock();
        slot.ready = true;
        if (index == taken_) ready_.notify_one();
    }
}

bool ImageStream::next(Loaded& image)
{
    std::unique_lock lock(mutex_);
    if (taken_ == paths_.size()) return false;
    Slot& slot = slots_[taken_ % slots_.size()];
    ready_.wait(lock, [&] { return slot.ready; });
    std::swap(image, slot.image);
    slot.ready = false;
    taken_++;
    lock.unlock();
    free_.notify_one();
    return true;
}

}  // namespace vim_infer
