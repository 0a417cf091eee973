// SPDX-License-Identifier: Apache-2.0
#include "vimcore/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <stdexcept>

#include "core/backend.h"
#include "core/device_sizes.h"
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

// What first calls take more, as pieces of an arena have 1 MiB at least: of each arena, and two of the main one.
constexpr double rounding = 1 << 20;

// Bytes of scratch memory of the products that a backend takes from a library.
double workspace(Device device)
{
    return device.type == Device::Type::cuda ? static_cast<double>(device_sizes::blas_workspace) : 0;
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

// Floats that the scan of one block takes on CUDA; see cuda/scan/forward_tuned.cu.
double cuda_forward_floats(const Config& c, double images, DType dtype)
{
    const PlanSizes s(c, 1);
    const bool sum = dtype != DType::f32 && s.directions == 2;  // of both directions, before it is rounded
    return images * s.E * ((sum ? s.L : 0) + (c.d_state > device_sizes::generic_states ? s.N : 0));
}

// Floats that the gradient of both scans takes on CUDA; see cuda/scan/backward_tuned.cu, backward.cu.
double cuda_scan_backward_floats(const Config& c, double images, std::int64_t chunk, DType dtype)
{
    using namespace device_sizes;
    const PlanSizes s(c, 1);
    const std::int64_t len = c.tokens(), N = c.d_state;
    const double rows = images * s.L;
    auto ceil_div = [](std::int64_t a, std::int64_t b) { return static_cast<double>((a + b - 1) / b); };
    const bool several = s.directions == 2 || (!back_is_tuned(N) && N > generic_states);
    const double sum = dtype != DType::f32 && several ? rows * s.E : 0;
    if (back_is_tuned(N)) {
        const double tiles = std::min(ceil_div(chunk, back_tile), ceil_div(len, back_tile));
        const double segments = ceil_div(len, back_segment(len, static_cast<std::int64_t>(tiles) * back_tile));
        const double units = images * segments, groups = ceil_div(c.inner(), back_channels(N));
        const double starts = units * groups * (tiles - 1) * static_cast<double>(back_threads * back_kept);
        const double part = rows * groups * std::ceil((s.R + 2 * s.N) / 4) * 4;
        const double parameters = units * (s.N + s.R + 2) * s.E, ahead = segments > 1 ? units * (s.N + 1) * s.E : 0;
        return sum + s.directions * (starts + part + parameters + ahead);
    }
    const double groups = ceil_div(c.inner(), generic_channels);
    const double starts =
        images * groups * ceil_div(chunk, generic_tile) * static_cast<double>(generic_states * generic_channels);
    const double lambda = N > generic_states ? 2 * rows * s.E : 0;
    return sum + rows * (s.E + groups * 2 * s.N) + images * (s.N + 2) * s.E +
           std::max(starts + lambda, static_cast<double>(dt_parts) * s.R * s.E);
}

// Floats that the gradients of one block take on CUDA: the scans', partial sums of conv1d and norm.
double cuda_backward_floats(const Config& c, double images, std::int64_t chunk, DType dtype)
{
    using namespace device_sizes;
    const PlanSizes s(c, 1);
    const double rows = images * s.L;
    const bool window = c.d_conv >= 2 && c.d_conv <= 4;
    const double units = window ? images * std::ceil(s.L / 16) : rows;
    return cuda_scan_backward_floats(c, images, chunk, dtype) + (window ? 0 : rows * s.E) +
           std::min(static_cast<double>(conv_parts), units) * s.E * static_cast<double>(c.d_conv + 1) * s.projections +
           std::min(static_cast<double>(norm_parts), std::ceil(rows / 4)) * 2 * s.D + 2 * rows;
}

// What block_backward takes for `images` images; see block.cpp, and the scans' backward of each backend.
Elements block_backward_elements(const Config& c, double images, Memory memory, bool cuda, DType dtype)
{
    const PlanSizes s(c, 1);
    const double rows = images * s.L;
    const bool shared_u = s.directions > s.projections;
    Elements e;
    e.narrow =
        rows * (4 * s.E + (2 * s.projections + (shared_u ? 1 : 0)) * s.E + s.directions * (s.R + 2 * s.N) + 2 * s.D);
    if (memory == Memory::least) e.narrow += rows * 2 * s.E;
    if (c.layer_scale) e.wide += 2 * s.D * s.E;
    if (cuda) {
        e.wide += cuda_backward_floats(c, images, Saved::chunk(memory), dtype);
        if (c.layer_scale && dtype != DType::f32) e.narrow += s.D * s.E;  // gamma W, cast
    } else {
        const double chunk = static_cast<double>(Saved::chunk(memory)), tiles = std::ceil(std::min(chunk, s.L) / 16);
        const double groups = std::ceil(s.E / 64), channels = std::min(s.E, 64.0);
        const double own = channels * (3 * s.N + 3 + tiles * (s.N + 64)) + 16 * 65 * s.N;
        e.narrow +=
            s.directions * images * (s.L * s.E + groups * 2 * s.L * s.N + s.E * (s.N + 2)) + images * groups * own;
        e.narrow += s.directions * images * s.E * static_cast<double>(c.d_conv + 1);
    }
    return e;
}

// Sums of float64 that positions_backward takes.
double resize_backward_bytes(const Config& c, bool cuda)
{
    const Grid from = c.table_grid(), to = c.grid();
    const double along = static_cast<double>(to.rows) * static_cast<double>(from.columns);
    const double sums = cuda ? 0 : static_cast<double>(from.rows) * static_cast<double>(from.columns);
    return (along + sums) * static_cast<double>(c.embed_dim) * 8;
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
    const auto outputs = static_cast<double>(c.outputs());
    const std::int64_t tile = tile_of(device), images = std::min(batch, std::max<std::int64_t>(1, tile / c.tokens()));
    const std::int64_t groups = (batch + images - 1) / images;
    const std::int64_t slots = threads > 1 && c.tokens() <= 8192 ? std::min<std::int64_t>(threads, groups) : 1;

    const double rows = s.B * s.L;
    const Elements group = block_backward_elements(c, static_cast<double>(images), memory, cuda, dtype);
    const double narrow = static_cast<double>(size_of(dtype)), wide_size = static_cast<double>(size_of(wide(dtype)));
    const double block = group.narrow * narrow + group.wide * wide_size;
    // Contexts that work side by side keep their memory; in the main one head, blocks and embedding follow one another.
    const double workers = slots > 1 ? static_cast<double>(slots) : 0;
    const double own_block = slots == 1 || groups % slots ? block : 0;
    const double stream = (pairs ? 2 : 1) * rows * s.D * (narrow + wide_size);  // dh, dresidual
    const double head = (2 * rows * s.D + 2 * s.B * (c.head_per_token() ? s.L : 1) * std::max(outputs, s.D)) * narrow;
    const double patches = std::min(s.B * s.J, static_cast<double>(std::min<std::int64_t>(tile, 1 << 17)));
    double embed = (s.B * s.J * s.D + 2 * patches * s.patch) * narrow;
    if (c.resizes_table()) embed += s.L * s.D * wide_size + resize_backward_bytes(c, cuda);
    double block_weights = 3 * s.D * s.E + s.directions * s.E * (2 * s.R + 3 * s.N + static_cast<double>(c.d_conv) + 3);
    if (groups == 1) block_weights = 0;  // groups sum their gradients apart
    const double weights = (static_cast<double>(slots) * block_weights + (c.rope ? 4 * s.J * s.D : 0)) * wide_size;
    return saturated(workers * block + stream + std::max({own_block, head, embed}) + weights +
                     rounding * (workers + 3) + workspace(device));
}

std::int64_t forward_bytes(const Config& c, std::int64_t batch, DType dtype, int threads, Device device)
{
    check(c, batch, threads);
    const std::int64_t tile = tile_of(device);
    const auto B = static_cast<double>(batch), L = static_cast<double>(c.tokens()),
               D = static_cast<double>(c.embed_dim);
    const auto J = static_cast<double>(c.patches()), E = static_cast<double>(c.inner());
    const auto outputs = static_cast<double>(c.outputs());
    const bool pairs = c.directions == Directions::block;

    // As Pass::for_each_group cuts a batch: groups side by side have scratch memory of their own.
    const std::int64_t full = std::max<std::int64_t>(1, tile / c.tokens());
    const std::int64_t images = std::clamp<std::int64_t>(batch / threads, 1, full);
    const std::int64_t apart = threads > 1 && c.tokens() <= 8192 ? batch / images / threads * threads * images : 0;
    const double workers = apart > 0 ? threads : 0;
    Elements group;
    group.narrow = group_elements(c, images, tile);
    group.wide = 2 * static_cast<double>(c.d_state) * E;
    if (c.layer_scale) group.wide += D * E * (device.type == Device::Type::cuda ? 2 : 1);  // and its cast
    if (device.type == Device::Type::cuda) group.wide += cuda_forward_floats(c, B, dtype);

    const auto patch = static_cast<double>(c.in_chans * c.patch_size * c.patch_size);
    const double embedding =
        B * J * D + std::min(B * J, static_cast<double>(std::min<std::int64_t>(tile, 1 << 17))) * patch;
    const double narrow_size = static_cast<double>(size_of(dtype)),
                 wide_size = static_cast<double>(size_of(wide(dtype)));
    const bool resizes = c.resizes_table() && device.type == Device::Type::cuda;  // the CPU keeps the table elsewhere
    const double table = resizes ? L * D * wide_size : 0;
    // Workers keep their memory, and so do tokens and residual stream; embedding, blocks and head follow one another.
    const double tokens = (pairs ? 3 : 1) * B * L * D * narrow_size, residual = (pairs ? 3 : 1) * B * L * D * wide_size;
    const double block = group.narrow * narrow_size + group.wide * wide_size, own_block = apart < batch ? block : 0;
    const double logits = B * (c.head_per_token() ? L : 1) * outputs * narrow_size;
    const double head = B * L * D * narrow_size + (c.head_per_token() ? logits : 0);
    const double rows = 3 * B * D * wide_size;  // what the head reads
    const double rope = c.rope ? 4 * J * D * wide_size : 0;
    return saturated(workers * block + tokens +
                     std::max(embedding * narrow_size + table, residual + std::max(own_block, head)) + rows + logits +
                     rope + rounding * (workers + 2) + workspace(device));
}

std::int64_t weight_bytes(const Config& config)
{
    double elements = 0;
    for_each_param(config, [&](const std::string&, const Shape& shape) {
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
