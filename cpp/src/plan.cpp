// SPDX-License-Identifier: Apache-2.0
#include "vimcore/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
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

// Tokens per operator call, without asking for the device.
std::int64_t tile_of(Device device)
{
    return device.type == Device::Type::cpu ? cpu_backend().tile() : std::int64_t{1} << 40;
}

void check(const Config& c, std::int64_t batch, int threads)
{
    c.validate();
    if (batch < 1) throw std::invalid_argument("[plan] batch: expected at least 1, got " + std::to_string(batch));
    if (threads < 1) throw std::invalid_argument("[plan] threads: expected at least 1, got " + std::to_string(threads));
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

// Sizes as numbers that do not overflow.
struct PlanSizes {
    explicit PlanSizes(const Config& c, std::int64_t batch)
        : B(static_cast<double>(batch)),
          L(static_cast<double>(c.tokens())),
          D(static_cast<double>(c.embed_dim)),
          E(static_cast<double>(c.inner())),
          N(static_cast<double>(c.d_state)),
          R(static_cast<double>(c.rank())),
          J(static_cast<double>(c.patches())),
          patch(static_cast<double>(c.in_chans * c.patch_size * c.patch_size)),
          directions(c.two_directions() ? 2 : 1),
          projections(c.directions == Directions::ssm_conv ? 2 : 1)
    {
    }
    double B, L, D, E, N, R, J, patch, directions, projections;
};

// Elements in the activations' type, and in the wide one.
struct Elements {
    double narrow = 0, wide = 0;
};

// What block_backward takes for `images` images; see block.cpp, and the scans' backward of each backend.
Elements block_backward_elements(const Config& c, double images, Memory memory, bool cuda)
{
    const auto chunk = static_cast<double>(Saved::chunk(memory));
    const PlanSizes s(c, 1);
    const double rows = images * s.L, groups = std::ceil(s.E / 64), tiles = std::ceil(std::min(chunk, s.L) / 16);
    const bool shared_u = s.directions > s.projections;
    Elements e;
    e.narrow =
        rows * (4 * s.E + (2 * s.projections + (shared_u ? 1 : 0)) * s.E + s.directions * (s.R + 2 * s.N) + 2 * s.D);
    if (memory == Memory::least) e.narrow += rows * 2 * s.E;
    if (c.layer_scale) e.wide += 2 * s.D * s.E;
    if (cuda) {
        // the tuned kernels, or the generic one
        const bool tuned = c.d_state == 8 || c.d_state == 16 || c.d_state == 32;
        const double sums = rows * groups * (2 * s.N + s.R), starts = images * s.E * s.N * tiles;
        e.wide +=
            tuned ? s.directions * (sums + starts) + rows * s.E : sums + starts + rows * s.E * (c.d_state > 16 ? 4 : 2);
        e.wide += s.directions * images * s.E * (s.N + s.R + 2);
        // partial sums of conv1d and norm, see their kernels
        e.wide +=
            std::min(512.0, images * std::ceil(s.L / 16)) * s.E * static_cast<double>(c.d_conv + 1) * s.directions +
            std::min(1024.0, std::ceil(rows / 4)) * 2 * s.D;
    } else {
        const double channels = std::min(s.E, 64.0);
        const double own = channels * (3 * s.N + 2 + tiles * (s.N + 64)) + 16 * 65 * s.N;
        e.narrow +=
            s.directions * images * (s.L * s.E + groups * 2 * s.L * s.N + s.E * (s.N + 2)) + images * groups * own;
        e.narrow += s.directions * images * s.E * static_cast<double>(c.d_conv + 1);
    }
    return e;
}

}  // namespace

std::int64_t saved_bytes(const Config& c, Memory memory, std::int64_t batch, DType dtype)
{
    check(c, batch, 1);
    const PlanSizes s(c, batch);
    const double narrow = static_cast<double>(size_of(dtype)), wide_size = static_cast<double>(size_of(wide(dtype)));
    auto aligned = [](double bytes) { return std::ceil(bytes / 64) * 64; };
    const double chunks = std::ceil(s.L / static_cast<double>(Saved::chunk(memory)));
    const double residual = aligned(s.B * s.L * s.D * wide_size);
    const double xz = memory == Memory::least ? 0 : aligned(s.B * s.L * 2 * s.E * narrow);
    const double block = residual + xz + aligned(s.projections * s.B * s.L * (s.R + 2 * s.N) * narrow) +
                         aligned(s.directions * s.B * chunks * s.N * s.E * wide_size);
    return saturated(static_cast<double>(c.depth) * block + residual);
}

std::int64_t training_bytes(const Config& c, Memory memory, std::int64_t batch, DType dtype, int threads, Device device)
{
    check(c, batch, threads);
    const PlanSizes s(c, batch);
    const bool cuda = device.type == Device::Type::cuda, pairs = c.directions == Directions::block;
    const bool per_token = c.class_token == ClassToken::none && (c.pool == Pool::max || c.pool == Pool::all);
    const auto outputs = static_cast<double>(c.num_classes > 0 ? c.num_classes : c.embed_dim);
    const std::int64_t tile = tile_of(device), images = std::min(batch, std::max<std::int64_t>(1, tile / c.tokens()));
    const std::int64_t groups = (batch + images - 1) / images;
    const std::int64_t slots = threads > 1 && c.tokens() <= 8192 ? std::min<std::int64_t>(threads, groups) : 1;

    const double rows = s.B * s.L, stream = (pairs ? 2 : 1) * rows * s.D;  // dh, dresidual
    const Elements group = block_backward_elements(c, static_cast<double>(images), memory, cuda);
    // Contexts that work side by side, and what their arenas lose where pieces do not fit.
    const double sides = slots > 1 ? 1.25 * static_cast<double>(slots + (groups % slots ? 1 : 0)) : 1.1;
    const double head = 2 * rows * s.D + 2 * s.B * (per_token ? s.L : 1) * std::max(outputs, s.D);
    const double patches = std::min(s.B * s.J, static_cast<double>(std::min<std::int64_t>(tile, 1 << 17)));
    const double embed = s.B * s.J * s.D + 2 * patches * s.patch;
    double block_weights = 3 * s.D * s.E + s.directions * s.E * (2 * s.R + 3 * s.N + static_cast<double>(c.d_conv) + 3);
    if (groups == 1) block_weights = 0;  // groups sum their gradients apart
    const double narrow = stream + std::max({sides * group.narrow, head, embed});
    const double wide_elements =
        stream + sides * group.wide + static_cast<double>(slots) * block_weights + (c.rope ? 4 * s.J * s.D : 0);
    const double backward = narrow * static_cast<double>(size_of(dtype)) +
                            wide_elements * static_cast<double>(size_of(wide(dtype))) + (cuda ? 32.0 * (1 << 20) : 0);
    const double rounding = (sides + 1) * 1.25 * (1 << 20);
    return saturated(backward + rounding);
}

std::int64_t forward_bytes(const Config& c, std::int64_t batch, DType dtype, int threads, Device device)
{
    check(c, batch, threads);
    const std::int64_t tile = tile_of(device);
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
