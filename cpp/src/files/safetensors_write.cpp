// SPDX-License-Identifier: Apache-2.0
// Crash-safe writing: temporary file beside the target, fsync, rename over it, fsync of the folder.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <set>
#include <stdexcept>

#include "files/json.h"
#include "files/safetensors_format.h"
#include "vimcore/error.h"
#include "vimcore/safetensors.h"

namespace vimcore {
namespace {

using Named = std::pair<std::string, Tensor>;

using namespace safetensors;

void check_names(const std::vector<Named>& tensors)
{
    std::set<std::string_view> seen;
    for (const auto& [name, tensor] : tensors) {
        const std::string who = "[save_safetensors] tensor \"" + json::printable(name) + "\"";
        if (!json::is_utf8(name)) throw std::invalid_argument(who + ": name is not valid UTF-8");
        if (name == "__metadata__") throw std::invalid_argument(who + ": reserved name");
        if (name.size() > max_name) throw std::invalid_argument(who + ": name longer than 4096 bytes");
        if (!seen.insert(name).second) throw std::invalid_argument(who + ": given twice");
        if (tensor.device.type != Device::Type::cpu)
            throw std::invalid_argument(who + ": expected cpu memory, got " + describe(tensor));
        if (!tensor.data && tensor.numel() > 0) throw std::invalid_argument(who + ": has no data");
    }
}

std::string make_header(const std::vector<const Named*>& tensors, const std::map<std::string, std::string>& metadata)
{
    std::string header = "{";
    const auto key = [&](const std::string& name) {
        if (header.size() > 1) header += ',';
        header += json::quote(name) + ':';
    };
    if (!metadata.empty()) {
        key("__metadata__");
        char separator = '{';
        for (const auto& [name, text] : metadata) {
            header += separator + json::quote(name) + ':' + json::quote(text);
            separator = ',';
        }
        header += '}';
    }
    std::size_t at = 0;
    for (const Named* named : tensors) {
        const Tensor& tensor = named->second;
        key(named->first);
        header += "{\"dtype\":\"" + format_name(tensor.dtype) + "\",\"shape\":[";
        for (int axis = 0; axis < tensor.shape.rank(); ++axis) {
            if (axis > 0) header += ',';
            header += std::to_string(tensor.shape[axis]);
        }
        header += "],\"data_offsets\":[" + std::to_string(at) + ',' + std::to_string(at + tensor.bytes()) + "]}";
        at += tensor.bytes();
    }
    header += '}';
    // Data starts on a multiple of 64, so that a mapped file can be used in place by vector code.
    header.append((64 - (header.size() + 8) % 64) % 64, ' ');
    if (header.size() > max_header) throw std::invalid_argument("[save_safetensors] header is longer than 100 MB");
    return header;
}

// The temporary file: closed and removed by the destructor unless it has been renamed.
class Writer {
public:
    explicit Writer(const std::string& path) : path_(path)
    {
        static std::atomic<unsigned> counter{0};
        const std::size_t slash = path.rfind('/');
        folder_ = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
        struct stat old;
        const bool replaces = ::stat(path.c_str(), &old) == 0;
        if (replaces && !S_ISREG(old.st_mode) && !S_ISDIR(old.st_mode))  // root could replace /dev/null
            throw Error("[save_safetensors] " + json::printable(path, 1000) +
                        ": a device, pipe or socket, which no file may replace; name another");
        for (int attempt = 0; attempt < 100 && descriptor_ < 0; ++attempt) {
            temporary_ = folder_ + "/.vimcore-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
            descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
            if (descriptor_ < 0 && errno != EEXIST) break;
        }
        if (descriptor_ < 0) fail("cannot create a file in " + json::printable(folder_, 1000));
        if (replaces) (void)::fchmod(descriptor_, old.st_mode & 07777);  // only keeps the old mode; not essential
    }
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;
    ~Writer()
    {
        const int saved = errno;
        if (descriptor_ >= 0) ::close(descriptor_);
        if (!renamed_) ::unlink(temporary_.c_str());
        errno = saved;
    }

    void write(const void* bytes, std::size_t size)
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

    void commit()
    {
        if (::fsync(descriptor_) != 0) fail("cannot flush to disk");
        const int descriptor = descriptor_;
        descriptor_ = -1;
        if (::close(descriptor) != 0) fail("cannot close");
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
    }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        const std::string why = std::strerror(errno);
        throw Error("[save_safetensors] " + json::printable(path_, 1000) + ": " + what + ": " + why);
    }

    std::string path_, folder_, temporary_;
    int descriptor_ = -1;
    bool renamed_ = false;
};

}  // namespace

void save_safetensors(const std::string& path, const std::vector<Named>& tensors,
                      const std::map<std::string, std::string>& metadata)
{
    check_names(tensors);
    // Wider types first: every tensor is then aligned to its element.
    std::vector<const Named*> order;
    for (const Named& named : tensors) order.push_back(&named);
    std::stable_sort(order.begin(), order.end(), [](const Named* a, const Named* b) {
        return size_of(a->second.dtype) > size_of(b->second.dtype);
    });
    const std::string header = make_header(order, metadata);

    Writer writer(path);
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> 8 * i);
    writer.write(length, sizeof length);
    writer.write(header.data(), header.size());
    for (const Named* named : order) writer.write(named->second.data, named->second.bytes());
    writer.commit();
}

}  // namespace vimcore
