// SPDX-License-Identifier: Apache-2.0
// Plans run forward and backward themselves, in a context that counts (core/counting.h).
#include "vimcore/plan.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <stdexcept>

#include "core/counting.h"
#include "core/device_scratch.h"
#include "core/weight_cache.h"
#include "network/count.h"
#include "network/pass.h"
#include "vimcore/error.h"
#include "vimcore/params.h"

namespace vimcore {
namespace {

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

// Sizes may be absurd: that is what this is for. A double holds their products without overflow.
std::int64_t saturated(double bytes)
{
    return bytes < static_cast<double>(largest) ? static_cast<std::int64_t>(bytes) : largest;
}

std::int64_t sum(std::int64_t a, std::int64_t b) { return a > largest - b ? largest : a + b; }

void check(const Config& c, std::int64_t batch, int threads)
{
    c.validate();
    if (batch < 1) throw std::invalid_argument("[plan] batch: expected at least 1, got " + std::to_string(batch));
    if (threads < 1) throw std::invalid_argument("[plan] threads: expected at least 1, got " + std::to_string(threads));
}

// Whether some size could leave 64 bits: more than any tensor has that a pass takes.
bool countless(const Config& c, std::int64_t batch)
{
    auto wide = [](std::int64_t size) { return static_cast<double>(size); };
    const double L = wide(c.tokens()) + 64, E = wide(c.inner()) + wide(c.embed_dim) + 64, N = wide(c.d_state) + 8;
    const double q = wide(c.rank()) + 2 * N, patch = wide(c.in_chans) * wide(c.patch_size) * wide(c.patch_size);
    const double pixels = wide(c.in_chans) * wide(c.clip_frames()) * wide(c.img_height) * wide(c.img_width);
    const double image = L * E * N * q + L * (wide(c.outputs()) + patch) + pixels;
    const Grid table = c.table_grid();
    const double resize = (wide(table.rows) + L) * wide(table.columns) * E;
    return 64 * (wide(batch) * image + resize) > 0x1p60;
}

// A network of placeholders, as deep as makes a difference: the first layer, one in the middle, the last.
class Counter {
public:
    Counter(const Config& config, std::int64_t batch, DType dtype, int threads, Device device,
            std::int64_t product_bytes)
        : config_(config),
          backend_(counting_backend(device, static_cast<std::size_t>(product_bytes))),
          ctx_(ContextInternals::make(*backend_, device, threads, Arena::Mode::counting)),
          images_(placeholder(config.images_shape(batch), dtype)),
          batch_(batch)
    {
        config_.depth = std::min<std::int64_t>(config.depth, config.directions == Directions::block ? 6 : 3);
        params_.cache = std::make_shared<WeightCache>();
        logits_.logits = placeholder(config.logits_shape(batch), dtype);
        for (Params* p : {&params_, &gradients_})
            for_each_param(config_, *p, [&](const std::string&, Tensor& tensor, const Shape& shape) {
                tensor = placeholder(shape, wide(dtype));
            });
    }

    void forward(Saved* saved = nullptr) { vimcore::forward(ctx_, config_, params_, images_, logits_, saved); }

    void step(Memory memory)
    {
        Saved saved;
        saved.memory = memory;
        lay_out(saved, config_, batch_, images_.dtype, images_.device, placeholder_memory(0));
        forward(&saved);
        backward(ctx_, config_, params_, images_, saved, logits_, gradients_, {});
    }

    // Of the context and its workers, the first of which stands for all but the last.
    ScratchBytes scratch()
    {
        ScratchBytes bytes;
        auto add = [&](Context& ctx, double count) {
            const Arena& arena = arena_of(ctx);
            bytes.held = sum(bytes.held, saturated(count * static_cast<double>(arena.bytes())));
            bytes.most = sum(bytes.most, saturated(count * static_cast<double>(arena.most_bytes())));
        };
        add(ctx_, 1);
        const ContextInternals& own = internals(ctx_);
        if (!own.workers.empty()) add(*own.workers[0], std::max(1, own.counted_workers - 1));
        if (own.workers.size() > 1) add(*own.workers[1], 1);
        return bytes;
    }

private:
    Tensor placeholder(const Shape& shape, DType dtype) const
    {
        Tensor tensor{nullptr, shape, dtype, ctx_.device()};
        tensor.data = placeholder_memory(tensor.bytes());
        return tensor;
    }

    Config config_;
    std::unique_ptr<Backend> backend_;
    Context ctx_;
    Params params_, gradients_;
    Tensor images_;
    Outputs logits_;  // or their gradient
    std::int64_t batch_;
};

}  // namespace

ScratchBytes count_forward(const Config& c, std::int64_t batch, DType dtype, int threads, Device device,
                           std::int64_t product_bytes)
{
    check(c, batch, threads);
    if (countless(c, batch)) return {largest, largest};
    Counter counter(c, batch, dtype, threads, device, product_bytes);
    counter.forward();
    return counter.scratch();
}

ScratchBytes count_training(const Config& c, Memory memory, std::int64_t batch, DType dtype, int threads, Device device,
                            std::int64_t product_bytes)
{
    check(c, batch, threads);
    if (countless(c, batch)) return {largest, largest};
    Counter counter(c, batch, dtype, threads, device, product_bytes);
    counter.step(memory);
    return counter.scratch();
}

ScratchBytes forward_scratch(const Config& config, std::int64_t batch, DType dtype, int threads, Device device)
{
    return count_forward(config, batch, dtype, threads, device, device_scratch::blas_workspace);
}

ScratchBytes training_scratch(const Config& config, Memory memory, std::int64_t batch, DType dtype, int threads,
                              Device device)
{
    return count_training(config, memory, batch, dtype, threads, device, device_scratch::blas_workspace);
}

std::int64_t forward_bytes(const Config& config, std::int64_t batch, DType dtype, int threads, Device device)
{
    const std::int64_t scratch = forward_scratch(config, batch, dtype, threads, device).most;
    if (scratch == largest) return largest;
    return sum(scratch, static_cast<std::int64_t>(Tensor{nullptr, config.logits_shape(batch), dtype, device}.bytes()));
}

std::int64_t training_bytes(const Config& config, Memory memory, std::int64_t batch, DType dtype, int threads,
                            Device device)
{
    return training_scratch(config, memory, batch, dtype, threads, device).most;
}

std::int64_t saved_bytes(const Config& c, Memory memory, std::int64_t batch, DType dtype, Device device)
{
    check(c, batch, 1);
    if (countless(c, batch)) return largest;
    Saved saved;
    saved.memory = memory;
    auto bytes = [&](std::int64_t depth) {
        Config shallow = c;
        shallow.depth = depth;
        return static_cast<double>(lay_out(saved, shallow, batch, dtype, device, placeholder_memory(0)));
    };
    const double one = bytes(1), two = bytes(2);  // every block takes as much
    return saturated(one + static_cast<double>(c.depth - 1) * (two - one));
}

std::int64_t machine_bytes()
{
    double bytes = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGE_SIZE));
    double limit = 0;
    if (std::ifstream file("/sys/fs/cgroup/memory.max"); file >> limit && limit > 0) bytes = std::min(bytes, limit);
    return saturated(bytes);
}

void require_memory(const std::string& who, const std::string& what, std::int64_t bytes)
{
    const std::int64_t have = machine_bytes();
    if (bytes > have)
        throw OutOfMemory("[" + who + "] " + what + ": needs " + std::to_string(bytes) +
                          " bytes of memory, this machine has " + std::to_string(have));
}

}  // namespace vimcore
