// SPDX-License-Identifier: Apache-2.0
#include "vimcore/plan.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <stdexcept>

#include "backend.h"
#include "vimcore/error.h"
#include "vimcore/params.h"

namespace vimcore {
namespace {

// Sizes may be absurd: that is what this is for. A double holds their products without overflow.
std::int64_t saturated(double bytes)
{
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    return bytes < static_cast<double>(most) ? static_cast<std::int64_t>(bytes) : most;
}

// Elements that the blocks of one group of images take at once, in the activations' type; see block.cpp.
double group_elements(const Config& c, std::int64_t images, std::int64_t tile)
{
    const auto len = static_cast<double>(c.tokens()), inner = static_cast<double>(c.inner());
    const bool whole = c.directions == Directions::ssm || c.tokens() <= (tile + 63) / 64 * 64;
    const double n = static_cast<double>(images), rows = whole ? n * len : static_cast<double>(tile + 63);
    const double projections = c.directions == Directions::ssm_conv ? 2 : 1;
    const auto q = static_cast<double>(c.rank() + 2 * c.d_state);
    return 3 * n * len * inner + rows * (projections * (inner + q) + static_cast<double>(c.embed_dim));
}

}  // namespace

std::int64_t forward_bytes(const Config& c, std::int64_t batch, DType dtype, int threads, Device device)
{
    c.validate();
    if (batch < 1) throw std::invalid_argument("[plan] batch: expected at least 1, got " + std::to_string(batch));
    if (threads < 1) throw std::invalid_argument("[plan] threads: expected at least 1, got " + std::to_string(threads));
    const std::int64_t tile = backend_of(device).tile();
    const auto B = static_cast<double>(batch), L = static_cast<double>(c.tokens()),
               D = static_cast<double>(c.embed_dim);
    const auto J = static_cast<double>(c.patches()), E = static_cast<double>(c.inner());
    const auto outputs = static_cast<double>(c.num_classes > 0 ? c.num_classes : c.embed_dim);
    const bool pairs = c.directions == Directions::block;
    const bool per_token = c.class_token == ClassToken::none && (c.pool == Pool::max || c.pool == Pool::all);

    // Arenas grow piece by piece, so that what follows one another in time is added up nevertheless.
    // As Network::for_each_group cuts a batch: groups side by side have scratch memory of their own.
    const std::int64_t full = std::max<std::int64_t>(1, tile / c.tokens());
    const std::int64_t images = std::clamp<std::int64_t>(batch / threads, 1, full);
    const std::int64_t apart = threads > 1 && c.tokens() <= 8192 ? batch / images / threads * threads * images : 0;
    const double group = group_elements(c, images, tile);
    const double groups = (apart > 0 ? threads : 0) + (apart < batch ? 1 : 0);

    const auto patch = static_cast<double>(c.in_chans * c.patch_size * c.patch_size);
    const double embedding =
        B * J * D + std::min(B * J, static_cast<double>(std::min<std::int64_t>(tile, 1 << 17))) * patch;
    const double narrow = (pairs ? 3 : 1) * B * L * D                       // the stream of tokens
                          + embedding + groups * group + B * L * D + B * D  // normalised tokens, what the head reads
                          + 2 * B * (per_token ? L : 1) * outputs;
    double wide_elements = (pairs ? 3 : 1) * B * L * D + B * D  // the residual stream
                           + groups * 2 * static_cast<double>(c.d_state) * E;
    if (c.layer_scale) wide_elements += groups * D * E;
    if (c.rope) wide_elements += 4 * J * D;
    const double rounding = (groups + 1) * 1.25 * (1 << 20);  // pieces of an arena have 1 MiB at least
    return saturated(narrow * static_cast<double>(size_of(dtype)) +
                     wide_elements * static_cast<double>(size_of(wide(dtype))) + rounding);
}

std::int64_t weight_bytes(const Config& config)
{
    config.validate();
    double elements = 0;
    Params params;
    for_each_param(config, params, [&](const std::string&, Tensor&, const Shape& shape) {
        double size = 1;
        for (const std::int64_t side : shape) size *= static_cast<double>(side);
        elements += size;
    });
    return saturated(elements * sizeof(float));
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
