// SPDX-License-Identifier: Apache-2.0
// Reading and writing safetensors files. A file is hostile until its header has been checked in full.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

class SafetensorsFile {
public:
    // Maps the file. Throws vimcore::Error naming the file and the fault. Limits: header 100 MB (the format's own),
    // a million tensors, names of 4096 bytes, Shape::max_rank dimensions, JSON nested 16 deep; the data must be tiled
    // by the tensors without holes, overlaps or bytes that belong to none. A file that is renamed over while it is
    // open stays as it was; one that is overwritten in place changes under the reader, as with any mapped file: where
    // that may happen, copy().
    static SafetensorsFile open(const std::string& path);
    // The same checks on a stream, read to its end into memory: pipes, archives, network.
    static SafetensorsFile read(std::istream& stream, const std::string& name = "<stream>");
    // The same checks on bytes in memory, which must outlive the result.
    static SafetensorsFile parse(const void* bytes, std::size_t size, const std::string& name = "<memory>");

    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    // In the file's order; may be misaligned.
    const std::vector<std::pair<std::string, Tensor>>& tensors() const { return tensors_; }
    const Tensor* find(const std::string& name) const;

    // The bytes of one of the tensors to `out`, read from the file and not by way of the mapping. vimcore::Error where
    // the file has been cut or overwritten since it was opened.
    void copy(const Tensor& tensor, void* out) const;

private:
    // `head`: the first bytes, header included; `base`: where all `size` bytes lie, not looked at.
    static SafetensorsFile parse(const unsigned char* head, const void* base, std::size_t size,
                                 const std::string& name);
    struct Mapping;
    std::shared_ptr<Mapping> mapping_;
    std::map<std::string, std::string> metadata_;
    std::vector<std::pair<std::string, Tensor>> tensors_;
    std::map<std::string, std::size_t> index_;
};

// All elements of one of the tensors, of a float type, as float32, by copy(); exact but for f64, which is rounded.
void read_floats(const SafetensorsFile& file, const Tensor& tensor, float* out);

// What a file of `size` bytes that begins with `head` is instead of weights, and what to do about it; or nothing.
std::string foreign_kind(std::string_view head, std::uint64_t size);

// Writes to a temporary name in the same folder, flushes to disk, renames: the old file or the new one is whole.
void save_safetensors(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& tensors,
                      const std::map<std::string, std::string>& metadata);

}  // namespace vimcore
