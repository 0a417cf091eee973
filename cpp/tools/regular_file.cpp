// SPDX-License-Identifier: Apache-2.0
#include "regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
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
        if (static_cast<std::int64_t>(bytes.size()) > max_file)
            throw vimcore::Error("standard input holds more than 2 GiB");
    }
}

}  // namespace

RegularFile::RegularFile(const std::string& path)
{
    struct stat status;
    if (::stat(path.c_str(), &status) != 0) fail();
    if (!S_ISREG(status.st_mode)) throw vimcore::Error("not a regular file");  // opening alone may have effects
    // O_NONBLOCK: a named pipe, put there in between, must not hang.
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) fail();
    const bool known = ::fstat(descriptor_, &status) == 0;
    const int error = errno;
    if (!known || !S_ISREG(status.st_mode)) ::close(descriptor_);
    if (!known) throw std::system_error(error, std::generic_category());
    if (!S_ISREG(status.st_mode)) throw vimcore::Error("not a regular file");
    size_ = status.st_size;
}

RegularFile::~RegularFile() { ::close(descriptor_); }

std::size_t RegularFile::read(void* to, std::size_t count, std::int64_t at) const
{
    std::size_t done = 0;
    while (done < count) {
        const auto from = static_cast<::off_t>(at + static_cast<std::int64_t>(done));
        const ::ssize_t got = ::pread(descriptor_, static_cast<char*>(to) + done, count - done, from);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail();
        if (got == 0) break;
        done += static_cast<std::size_t>(got);
    }
    return done;
}

std::vector<unsigned char> read_file(const std::string& path)
{
    if (path == standard_input) return read_standard_input();
    const RegularFile file(path);
    if (file.size() > max_file) throw vimcore::Error("file is larger than 2 GiB");
    std::vector<unsigned char> bytes(static_cast<std::size_t>(file.size()));
    bytes.resize(file.read(bytes.data(), bytes.size(), 0));  // it became shorter: the decoder says what is missing
    return bytes;
}

std::string what_is_wrong()
{
    try {
        throw;
    } catch (const std::system_error& error) {
        return std::strerror(error.code().value());
    } catch (const std::bad_alloc&) {
        return "out of memory";
    } catch (const std::exception& error) {
        const std::string prefix = "[decode_image] : ", what = error.what();
        return what.starts_with(prefix) ? what.substr(prefix.size()) : what;
    }
}

}  // namespace vim_infer
