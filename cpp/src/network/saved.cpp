// SPDX-License-Identifier: Apache-2.0
// What forward keeps for backward, in one piece of memory.
#include <stdexcept>
#include <string>

#include "core/device_scratch.h"
#include "network/pass.h"

namespace vimcore {

const char* name_of(Memory memory)
{
    return memory == Memory::least ? "least" : memory == Memory::lean ? "lean" : "fast";
}

std::int64_t Saved::chunk(Memory memory) { return memory == Memory::fast ? 16 : 64; }

namespace {

// Points the tensors of `depth` blocks, or of one block without a network around it, whose caller keeps the residual,
// into memory from `base` on; how many bytes they take. shape: (B, L, D).
constexpr std::int64_t alone = 0;

std::size_t lay_out(Saved& saved, const BlockConfig& c, std::int64_t depth, const Shape& shape, DType dtype,
                    Device device, void* base)
{
    const std::int64_t n = c.two_directions() ? 2 : 1, projections = c.directions == Directions::ssm_conv ? 2 : 1;
    const std::int64_t batch = shape[0], len = shape[1];
    const std::int64_t chunk = Saved::chunk(saved.memory), chunks = (len + chunk - 1) / chunk;
    const std::int64_t q = device_scratch::padded_columns(c.rank() + 2 * c.d_state, dtype, device.type);
    std::size_t used = 0;
    auto place = [&](const Shape& size, DType type) {
        Tensor tensor{static_cast<char*>(base) + used, size, type, device};
        used += (tensor.bytes() + 63) / 64 * 64;
        return tensor;
    };
    saved.batch = batch;
    saved.blocks.resize(depth == alone ? 1 : static_cast<std::size_t>(depth));
    for (BlockSaved& block : saved.blocks) {
        block.chunk = chunk;
        if (depth != alone) block.residual = place(shape, wide(dtype));
        block.xz = saved.memory == Memory::least ? Tensor{} : place({batch, len, 2 * c.inner()}, dtype);
        block.q = place({projections, batch, len, q}, dtype);
        block.checkpoints = place({n, batch, chunks, c.d_state, c.inner()}, wide(dtype));
    }
    if (depth != alone) saved.residual = place(shape, wide(dtype));
    return used;
}

void prepare(Saved& saved, const BlockConfig& c, std::int64_t depth, const Shape& shape, DType dtype, Device device)
{
    if (saved.lent) {
        saved.used = lay_out(saved, c, depth, shape, dtype, device, saved.lent.data);
        if (saved.used > saved.lent.bytes() || saved.lent.device != device)
            throw std::invalid_argument("[Saved] memory: expected " + std::to_string(saved.used) + " bytes on " +
                                        to_string(device) + ", got " + describe(saved.lent));
        return;
    }
    saved.used = lay_out(saved, c, depth, shape, dtype, device, saved.storage.data());
    if (saved.used <= saved.storage.bytes() && saved.storage.device() == device) return;
    saved.storage = Buffer();  // before the larger one is asked for
    saved.storage = Buffer(saved.used, device);
    lay_out(saved, c, depth, shape, dtype, device, saved.storage.data());
}

void attach(Saved& saved, const BlockConfig& c, std::int64_t depth, const Shape& shape, DType dtype, Device device,
            void* data, std::size_t bytes)
{
    if (bytes > 0 && reinterpret_cast<std::uintptr_t>(data) % 64 != 0)
        throw std::invalid_argument("[Saved] memory: expected an address that 64 divides");
    saved.used = lay_out(saved, c, depth, shape, dtype, device, data);
    if (bytes != saved.used)
        throw std::invalid_argument("[Saved] memory: expected the " + std::to_string(saved.used) +
                                    " bytes that forward saved, got " + std::to_string(bytes));
}

std::size_t bytes_of(const BlockConfig& c, std::int64_t depth, const Shape& shape, DType dtype, Device device,
                     Memory memory)
{
    Saved nothing;
    nothing.memory = memory;
    return lay_out(nothing, c, depth, shape, dtype, device, nullptr);
}

}  // namespace

std::size_t lay_out(Saved& saved, const Config& config, std::int64_t batch, DType dtype, Device device, void* base)
{
    return lay_out(saved, config, config.depth, config.tokens_shape(batch), dtype, device, base);
}

std::size_t Saved::bytes(const Config& c, std::int64_t images, DType dtype, Device device, Memory memory)
{
    return bytes_of(c, c.depth, c.tokens_shape(images), dtype, device, memory);
}

std::size_t Saved::block_bytes(const BlockConfig& c, const Shape& shape, DType dtype, Device device, Memory memory)
{
    return bytes_of(c, alone, shape, dtype, device, memory);
}

void Saved::prepare(const Config& c, std::int64_t images, DType dtype, Device device)
{
    vimcore::prepare(*this, c, c.depth, c.tokens_shape(images), dtype, device);
}

void Saved::prepare_block(const BlockConfig& c, const Shape& shape, DType dtype, Device device)
{
    vimcore::prepare(*this, c, alone, shape, dtype, device);
}

void Saved::attach(const Config& c, std::int64_t images, DType dtype, Device device, void* data, std::size_t bytes)
{
    vimcore::attach(*this, c, c.depth, c.tokens_shape(images), dtype, device, data, bytes);
}

void Saved::attach_block(const BlockConfig& c, const Shape& shape, DType dtype, Device device, void* data,
                         std::size_t bytes)
{
    vimcore::attach(*this, c, alone, shape, dtype, device, data, bytes);
}

}  // namespace vimcore
