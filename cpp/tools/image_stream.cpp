// SPDX-License-Identifier: Apache-2.0
#include "image_stream.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>

#include "find_images.h"
#include "vimcore/error.h"

namespace vim_infer {
namespace {

constexpr std::int64_t max_file = std::int64_t{1} << 31;

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category()); }

std::vector<unsigned char> read_standard_input()
{
    std::vector<unsigned char> bytes;
    for (;;) {
        const std::size_t at = bytes.size();
        bytes.resize(std::max<std::size_t>(2 * at, 1 << 16));
        const ::ssize_t done = ::read(STDIN_FILENO, bytes.data() + at, bytes.size() - at);
        const int error = errno;
        bytes.resize(at + static_cast<std::size_t>(std::max<::ssize_t>(done, 0)));
        if (done == 0) return bytes;
        errno = error;
        if (done < 0 && errno != EINTR) fail();
        if (bytes.size() > max_file) throw vimcore::Error("standard input holds more than 2 GiB");
    }
}

std::vector<unsigned char> read_file(const std::string& path)
{
    if (path == standard_input) return read_standard_input();
    struct stat status;
    if (::stat(path.c_str(), &status) != 0) fail();
    if (!S_ISREG(status.st_mode)) throw vimcore::Error("not a regular file");  // opening alone may have effects
    // O_NONBLOCK: a named pipe, put there in between, must not hang.
    struct Descriptor {
        int number;
        ~Descriptor()
        {
            if (number >= 0) ::close(number);
        }
    } const file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.number < 0) fail();
    if (::fstat(file.number, &status) != 0) fail();
    if (!S_ISREG(status.st_mode)) throw vimcore::Error("not a regular file");
    if (status.st_size > max_file) throw vimcore::Error("file is larger than 2 GiB");
    std::vector<unsigned char> bytes(static_cast<std::size_t>(status.st_size));
    std::size_t at = 0;
    while (at < bytes.size()) {
        const ::ssize_t done = ::read(file.number, bytes.data() + at, bytes.size() - at);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) fail();
        if (done == 0) break;  // it became shorter: the decoder says what is missing
        at += static_cast<std::size_t>(done);
    }
    bytes.resize(at);
    return bytes;
}

}  // namespace

Decode to_pixels(const vimcore::Preprocess& steps)
{
    return [steps](const std::vector<unsigned char>& bytes, Loaded& image) {
        image.pixels.resize(steps.mean.size() * static_cast<std::size_t>(steps.crop_height * steps.crop_width));
        vimcore::load_image(bytes.data(), bytes.size(), "", steps, image.pixels.data());
    };
}

Decode to_picture()
{
    return [](const std::vector<unsigned char>& bytes, Loaded& image) {
        image.picture = vimcore::decode_image(bytes.data(), bytes.size(), "");
    };
}

void load(const std::string& path, const Decode& decode, Loaded& image)
{
    image.path = path;
    image.error.clear();
    try {
        decode(read_file(path), image);
    } catch (const std::system_error& error) {
        image.error = std::strerror(error.code().value());
    } catch (const std::bad_alloc&) {
        image.error = "out of memory";
    } catch (const std::exception& error) {
        image.error = error.what();
        const std::string prefix = "[decode_image] : ";  // the path is said by whoever prints this
        if (image.error.starts_with(prefix)) image.error.erase(0, prefix.size());
    }
}

ImageStream::ImageStream(std::vector<std::string> paths, Decode decode, int threads, std::size_t ahead)
    : paths_(std::move(paths)), decode_(std::move(decode)), slots_(std::max<std::size_t>(ahead, 1))
{
    const auto count = std::min({static_cast<std::size_t>(std::max(threads, 1)), paths_.size(), slots_.size()});
    for (std::size_t i = 0; i < count; i++) threads_.emplace_back([this] { run(); });
}

ImageStream::~ImageStream()
{
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    free_.notify_all();
    for (std::thread& thread : threads_) thread.join();
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
