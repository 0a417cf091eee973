// SPDX-License-Identifier: Apache-2.0
// File: 8 bytes header length (little-endian), header (JSON), data. The header gives each tensor's type, shape and
// range of data bytes; the ranges must tile the data without holes or overlaps, so that no byte is shared or hidden.
#include "vimcore/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <istream>
#include <optional>
#include <tuple>

#include "files/json.h"
#include "files/safetensors_format.h"
#include "vimcore/error.h"

namespace vimcore {
namespace {

using namespace safetensors;

constexpr int max_depth = 16;
constexpr std::size_t look = 512;  // bytes that tell a file that is none

struct Entry {
    std::string name;
    std::optional<DType> dtype;
    std::optional<Shape> shape;
    std::optional<std::uint64_t> begin, end;
};

std::int64_t read_size(json::Reader& reader)
{
    reader.peek();
    const std::size_t at = reader.offset();
    const std::int64_t value = reader.integer();
    if (value < 0) reader.fail("expected an unsigned integer", at);
    return value;
}

Shape read_shape(json::Reader& reader)
{
    std::int64_t sizes[Shape::max_rank];
    int rank = 0;
    reader.begin_array();
    while (reader.next_element()) {
        if (rank == Shape::max_rank) reader.fail("more than " + std::to_string(Shape::max_rank) + " dimensions");
        sizes[rank++] = read_size(reader);
    }
    return Shape(sizes, rank);
}

void read_field(json::Reader& reader, const std::string& field, Entry& entry)
{
    const auto once = [&](bool seen) {
        if (seen) reader.fail("duplicate field \"" + field + "\" of tensor \"" + json::printable(entry.name) + "\"");
    };
    if (field == "dtype") {
        once(entry.dtype.has_value());
        const std::string name = reader.string();
        entry.dtype = dtype_from(name);
        if (!entry.dtype)
            reader.fail("tensor \"" + json::printable(entry.name) + "\" has unsupported dtype \"" +
                        json::printable(name, 20) + "\"");
    } else if (field == "shape") {
        once(entry.shape.has_value());
        entry.shape = read_shape(reader);
    } else if (field == "data_offsets") {
        once(entry.begin.has_value());
        std::uint64_t offsets[2];
        int count = 0;
        reader.begin_array();
        while (reader.next_element()) {
            if (count == 2) reader.fail("more than two data_offsets");
            offsets[count++] = static_cast<std::uint64_t>(read_size(reader));
        }
        if (count != 2) reader.fail("expected two data_offsets");
        entry.begin = offsets[0], entry.end = offsets[1];
    } else {
        reader.skip();  // fields of later versions of the format
    }
}

Entry read_entry(json::Reader& reader, const std::string& name)
{
    Entry entry{.name = name, .dtype = {}, .shape = {}, .begin = {}, .end = {}};
    std::string field;
    reader.begin_object();
    while (reader.next_key(field)) read_field(reader, field, entry);
    if (!entry.dtype || !entry.shape || !entry.begin) {
        const char* missing = !entry.dtype ? "dtype" : !entry.shape ? "shape" : "data_offsets";
        reader.fail("tensor \"" + json::printable(name) + "\" has no " + missing);
    }
    return entry;
}

void read_metadata(json::Reader& reader, std::map<std::string, std::string>& metadata)
{
    std::string key;
    reader.begin_object();
    while (reader.next_key(key))
        if (!metadata.emplace(key, reader.string()).second)
            reader.fail("duplicate metadata key \"" + json::printable(key) + "\"");
}

// Bytes of the tensor, or nothing where a product overflows (zero sizes do not hide an overflow).
std::optional<std::uint64_t> bytes_of(const Entry& entry)
{
    std::int64_t product = static_cast<std::int64_t>(size_of(*entry.dtype));
    bool empty = false;
    for (const std::int64_t size : *entry.shape) {
        if (size == 0)
            empty = true;
        else if (__builtin_mul_overflow(product, size, &product))
            return std::nullopt;
    }
    return empty ? 0 : static_cast<std::uint64_t>(product);
}

void check_ranges(const std::vector<Entry>& entries, std::uint64_t data_size)
{
    std::vector<const Entry*> order;
    order.reserve(entries.size());
    for (const Entry& entry : entries) {
        const std::string who = "tensor \"" + json::printable(entry.name) + "\"";
        const std::string range =
            "data_offsets [" + std::to_string(*entry.begin) + ", " + std::to_string(*entry.end) + "]";
        const auto bytes = bytes_of(entry);
        if (!bytes) throw Error(who + ": size of shape " + to_string(*entry.shape) + " overflows");
        if (*entry.begin > *entry.end) throw Error(who + ": " + range + " are reversed");
        if (*entry.end > data_size)
            throw Error(who + ": " + range + " lie beyond the " + std::to_string(data_size) + " bytes of data");
        if (*entry.end - *entry.begin != *bytes)
            throw Error(who + ": " + range + " do not hold the " + std::to_string(*bytes) + " bytes of shape " +
                        to_string(*entry.shape) + " " + name_of(*entry.dtype));
        order.push_back(&entry);
    }
    std::stable_sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
        return std::tie(*a->begin, *a->end) < std::tie(*b->begin, *b->end);
    });
    std::uint64_t at = 0;
    for (const Entry* entry : order) {
        if (*entry->begin != at)
            throw Error("tensor \"" + json::printable(entry->name) + "\": data " +
                        (*entry->begin < at ? "overlaps another tensor" : "leaves a hole") + " at byte " +
                        std::to_string(std::min(*entry->begin, at)));
        at = *entry->end;
    }
    if (at != data_size)
        throw Error(std::to_string(data_size - at) + " bytes of data after the last tensor belong to none");
}

std::uint64_t claimed_length(const unsigned char* bytes)
{
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | bytes[i];
    return length;
}

// Of a file of `size` bytes, of which `head` are known.
std::uint64_t header_length(std::string_view head, std::uint64_t size)
{
    const auto fail = [&](const std::string& what) {
        const std::string kind = foreign_kind(head, size);
        throw Error(kind.empty() ? what : kind);
    };
    if (size < 8) fail("file of " + std::to_string(size) + " bytes has no header");
    const std::uint64_t length = claimed_length(reinterpret_cast<const unsigned char*>(head.data()));
    const std::string what = "header of " + std::to_string(length) + " bytes is longer than ";
    if (length > max_header) fail(what + "100 MB");
    if (length > size - 8) fail(what + "the file (truncated?)");
    return length;
}

std::string reason() { return std::strerror(errno); }

[[noreturn]] void fault(const std::string& name, const std::string& what)
{
    throw Error("[safetensors] " + json::printable(name, 1000) + ": " + what);
}

}  // namespace

struct SafetensorsFile::Mapping {
    std::string path;
    int descriptor = -1;
    struct stat status{};  // when it was opened
    void* address = nullptr;
    std::size_t size = 0;
    Buffer memory;  // instead, of a stream
    ~Mapping()
    {
        if (address) ::munmap(address, size);
        if (descriptor >= 0) ::close(descriptor);
    }

    void read(void* out, std::size_t bytes, std::size_t at) const
    {
        for (std::size_t done = 0; done < bytes;) {
            const ::ssize_t got =
                ::pread(descriptor, static_cast<char*>(out) + done,
                        std::min<std::size_t>(bytes - done, std::size_t{1} << 30), static_cast<::off_t>(at + done));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fault(path, "cannot read: " + reason());
            if (got == 0) fault(path, "became shorter while it was read");
            done += static_cast<std::size_t>(got);
        }
    }

    void check_unchanged() const
    {
        struct stat now;
        if (::fstat(descriptor, &now) != 0) fault(path, "cannot stat: " + reason());
        bool same = now.st_size == status.st_size && now.st_mtime == status.st_mtime;
#ifndef _WIN32
        same = same && now.st_mtim.tv_nsec == status.st_mtim.tv_nsec;
#endif
        if (!same) fault(path, "was overwritten while it was read");
    }
};

SafetensorsFile SafetensorsFile::parse(const void* bytes, std::size_t size, const std::string& name)
{
    return parse(static_cast<const unsigned char*>(bytes), bytes, size, name);
}

SafetensorsFile SafetensorsFile::parse(const unsigned char* head, const void* base, std::size_t size,
                                       const std::string& name)
{
    SafetensorsFile file;
    try {
        const std::size_t known = head == base ? size : std::min<std::size_t>(size, 8);
        const std::uint64_t length = header_length({reinterpret_cast<const char*>(head), known}, size);

        std::vector<Entry> entries;
        bool has_metadata = false;
        std::string key;
        json::Reader reader({reinterpret_cast<const char*>(head) + 8, static_cast<std::size_t>(length)}, max_depth);
        reader.begin_object();
        while (reader.next_key(key, max_name)) {
            if (key == "__metadata__") {
                if (has_metadata) reader.fail("duplicate __metadata__");
                has_metadata = true;
                if (reader.peek() == json::Kind::null)
                    reader.null();
                else
                    read_metadata(reader, file.metadata_);
                continue;
            }
            if (entries.size() == max_tensors) reader.fail("more than " + std::to_string(max_tensors) + " tensors");
            if (!file.index_.emplace(key, entries.size()).second)
                reader.fail("duplicate tensor name \"" + json::printable(key) + "\"");
            entries.push_back(read_entry(reader, key));
        }
        reader.finish();
        check_ranges(entries, size - 8 - length);

        // A Tensor has no read-only form; users must not write.
        auto* data = static_cast<unsigned char*>(const_cast<void*>(base)) + 8 + length;
        file.tensors_.reserve(entries.size());
        for (Entry& entry : entries)
            file.tensors_.emplace_back(std::move(entry.name),
                                       Tensor{data + *entry.begin, *entry.shape, *entry.dtype, Device::cpu()});
    } catch (const Error& error) {
        fault(name, error.what());
    } catch (const json::ParseError& error) {
        fault(name, std::string("header: ") + error.what());
    }
    return file;
}

SafetensorsFile SafetensorsFile::open(const std::string& path)
{
    auto mapping = std::make_shared<Mapping>();
    mapping->path = path;
    // O_NONBLOCK: opening a named pipe must not hang.
    mapping->descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (mapping->descriptor < 0) fault(path, "cannot open: " + reason());
    if (::fstat(mapping->descriptor, &mapping->status) != 0) fault(path, "cannot stat: " + reason());
    if (S_ISDIR(mapping->status.st_mode))
        fault(path, "not a regular file but a folder; name the file of weights in it, as RUN/best.safetensors");
    if (!S_ISREG(mapping->status.st_mode)) fault(path, "not a regular file");
    const auto size = static_cast<std::size_t>(mapping->status.st_size);
    if (size > 0) {
        void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, mapping->descriptor, 0);
        if (address == MAP_FAILED) fault(path, "cannot map: " + reason());
        mapping->address = address;
        mapping->size = size;
    }
    // The header is read, not mapped: a file that is cut meanwhile would be a bus error.
    char first[look];
    const std::size_t known = std::min(size, look);
    mapping->read(first, known, 0);
    std::uint64_t length = 0;
    try {
        length = header_length({first, known}, size);
    } catch (const Error& error) {
        fault(path, error.what());
    }
    const Buffer head(8 + static_cast<std::size_t>(length));
    auto* bytes = static_cast<unsigned char*>(head.data());
    mapping->read(bytes, head.bytes(), 0);
    mapping->check_unchanged();
    SafetensorsFile file = parse(bytes, mapping->address, size, path);
    file.mapping_ = std::move(mapping);
    return file;
}

void SafetensorsFile::copy(const Tensor& tensor, void* out) const
{
    if (tensor.numel() == 0) return;
    if (!mapping_ || mapping_->descriptor < 0) {
        std::memcpy(out, tensor.data, tensor.bytes());
        return;
    }
    const auto at = tensor.as<unsigned char>() - static_cast<unsigned char*>(mapping_->address);
    mapping_->read(out, tensor.bytes(), static_cast<std::size_t>(at));
    mapping_->check_unchanged();
}

SafetensorsFile SafetensorsFile::read(std::istream& stream, const std::string& name)
{
    Buffer memory(std::size_t{1} << 16);
    std::size_t size = 0;
    const auto take = [&](std::size_t most) {
        stream.read(static_cast<char*>(memory.data()) + size, static_cast<std::streamsize>(most));
        size += static_cast<std::size_t>(stream.gcount());
    };
    take(look);
    try {
        const std::uint64_t most = stream ? UINT64_MAX : size;
        header_length({static_cast<const char*>(memory.data()), size}, most);
    } catch (const Error& error) {
        fault(name, error.what());
    }
    while (stream) {  // memory grows with what arrives: a short stream that claims much costs little
        if (size == memory.bytes()) {
            Buffer larger(2 * size);
            std::memcpy(larger.data(), memory.data(), size);
            memory = std::move(larger);
        }
        take(memory.bytes() - size);
    }
    if (stream.bad()) fault(name, "cannot read the stream");
    SafetensorsFile file = parse(memory.data(), size, name);
    file.mapping_ = std::make_shared<Mapping>();
    file.mapping_->memory = std::move(memory);
    return file;
}

const Tensor* SafetensorsFile::find(const std::string& name) const
{
    const auto found = index_.find(name);
    return found == index_.end() ? nullptr : &tensors_[found->second].second;
}

}  // namespace vimcore
