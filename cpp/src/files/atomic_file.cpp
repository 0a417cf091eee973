// SPDX-License-Identifier: Apache-2.0
#include "vimcore/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "files/json.h"
#include "vimcore/error.h"

namespace vimcore {

AtomicFile::AtomicFile(std::string who, const std::string& path) : who_(std::move(who)), path_(path)
{
    static std::atomic<unsigned> counter{0};
    const std::size_t slash = path.rfind('/');
    folder_ = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
    struct stat old;
    const bool replaces = ::stat(path.c_str(), &old) == 0;
    if (replaces && !S_ISREG(old.st_mode) && !S_ISDIR(old.st_mode))  // root could replace /dev/null
        throw Error("[" + who_ + "] " + json::printable(path, 1000) +
                    ": a device, pipe or socket, which no file may replace; name another");
    for (int attempt = 0; attempt < 100 && descriptor_ < 0; ++attempt) {
        temporary_ = folder_ + "/.vimcore-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
        descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor_ < 0 && errno != EEXIST) break;
    }
    if (descriptor_ < 0) fail("cannot create a file in " + json::printable(folder_, 1000));
    if (replaces) (void)::fchmod(descriptor_, old.st_mode & 07777);  // only keeps the old mode; not essential
}

AtomicFile::~AtomicFile()
{
    const int saved = errno;
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!renamed_) ::unlink(temporary_.c_str());
    errno = saved;
}

void AtomicFile::write(const void* bytes, std::size_t size)
{
    const auto* at = static_cast<const char*>(bytes);
    while (size > 0) {
        const ::ssize_t done = ::write(descriptor_, at, std::min<std::size_t>(size, std::size_t{1} << 30));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) fail("cannot write");
        at += done;
        size -= static_cast<std::size_t>(done);
    }
}

void AtomicFile::commit()
{
    if (::fsync(descriptor_) != 0) fail("cannot flush to disk");
    const int descriptor = descriptor_;
    descriptor_ = -1;
    if (::close(descriptor) != 0) fail("cannot close");
#ifdef _WIN32  // which flushes no folders, and whose rename replaces nothing
    if (::replace_file(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename the temporary file");
    renamed_ = true;
#else
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename the temporary file");
    renamed_ = true;
    const int folder = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) fail("cannot open the folder to flush it");
    // EINVAL: a file system that cannot flush folders.
    const bool flushed = ::fsync(folder) == 0 || errno == EINVAL;
    const int error = errno;
    ::close(folder);
    errno = error;
    if (!flushed) fail("cannot flush the folder to disk");
#endif
}

void AtomicFile::fail(const std::string& what) const
{
    const std::string why = std::strerror(errno);
    throw Error("[" + who_ + "] " + json::printable(path_, 1000) + ": " + what + ": " + why);
}

}  // namespace vimcore
