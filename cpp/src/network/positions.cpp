// SPDX-License-Identifier: Apache-2.0
#include "network/positions.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/weight_cache.h"
#include "network/pass.h"

namespace vimcore {

ClassPlaces class_places(ClassToken token, std::int64_t patches, std::int64_t registers)
{
    switch (token) {
        case ClassToken::none:
            return {};
        case ClassToken::middle:
            return ClassPlaces::one(patches / 2);
        case ClassToken::double_:
            return {0, patches + 1, 2};
        case ClassToken::registers:
            return {patches / (registers + 1), patches / (registers + 1) + 1, registers};
        default:
            return ClassPlaces::one(0);
    }
}

ClassPlaces table_places(ClassToken token, std::int64_t patches)
{
    return token == ClassToken::registers ? ClassPlaces{} : class_places(token, patches);
}

TableResize table_resize(ClassToken token, Grid from, Grid to, TableWay way)
{
    TableResize resize{.from = from,
                       .to = to,
                       .from_class = table_places(token, from.count()),
                       .to_class = table_places(token, to.count())};
    if (way == TableWay::authors) resize.from_class = resize.to_class = {0, 1, resize.to_class.count};
    return resize;
}

TableResize table_resize(const Config& config)
{
    const Grid from = config.table_grid();
    return {.from = from,
            .to = config.grid(),
            .from_class = table_places(config.class_token, from.count()),
            .to_class = config.class_places(),
            .frames = config.clip_frames()};
}

PositionTable::PositionTable(const Pass& pass) : tensor_(pass.params.pos_embed)
{
    if (!tensor_ || !pass.config.composes_positions()) return;
    Context& ctx = pass.ctx;
    const Tensor own = tensor_;
    const Params& params = pass.params;
    const TableResize resize = table_resize(pass.config);
    tensor_ = {nullptr, {1, pass.len, pass.dim}, own.dtype, own.device};
    auto fill = [&](void* memory) {
        tensor_.data = memory;
        positions_forward(ctx, {.table = own,
                                .class_rows = params.class_positions,
                                .frame_rows = params.frame_positions,
                                .out = tensor_,
                                .resize = resize});
    };
    if (!internals(ctx).cache || ctx.device().type != Device::Type::cpu) {
        fill(arena_of(ctx).take(tensor_.shape, tensor_.dtype).data);
        return;
    }
    const TableCache::Key key{0,
                              static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(own.data)),
                              static_cast<std::int64_t>(pass.config.class_token),
                              resize.from.rows,
                              resize.from.columns,
                              resize.to.rows,
                              resize.to.columns,
                              resize.frames};
    held_ = internals(ctx).cache->tables.get(ctx, key, true, tensor_.bytes(), fill);
    tensor_.data = const_cast<void*>(held_.get());
}

// ---- rotations -----------------------------------------------------------------------------------------------------

namespace {

template <class T>
void fill_rope(Grid grid, std::int64_t rope_grid, std::int64_t dim, T* cos, T* sin)
{
    const std::int64_t half = dim / 2;
    std::vector<double> frequency(static_cast<std::size_t>(half));
    for (std::int64_t d = 0; d < half; d++)
        frequency[static_cast<std::size_t>(d)] =
            std::pow(10000.0, -2.0 * static_cast<double>(d / 2) / static_cast<double>(half));
    // Angles of one axis: what both tables hold for its i-th place, `count` patches apart, `step` patches to the next.
    auto axis = [&](std::int64_t places, std::int64_t step, std::int64_t count, std::int64_t apart, std::int64_t at) {
        for (std::int64_t i = 0; i < places; i++)
            for (std::int64_t d = 0; d < half; d++) {
                const double place = static_cast<double>(i) / static_cast<double>(places);
                const double angle = place * static_cast<double>(rope_grid) * frequency[static_cast<std::size_t>(d)];
                const T cosine = static_cast<T>(std::cos(angle)), sine = static_cast<T>(std::sin(angle));
                for (std::int64_t j = 0; j < count; j++) {
                    const std::int64_t to = (i * step + j * apart) * dim + at + d;
                    cos[to] = cosine;
                    sin[to] = sine;
                }
            }
    };
    axis(grid.rows, grid.columns, grid.columns, 1, 0);
    axis(grid.columns, 1, grid.rows, grid.columns, half);
}

}  // namespace

void rope_tables(Grid grid, std::int64_t rope_grid, const Tensor& cos, const Tensor& sin)
{
    const std::int64_t dim = cos.shape.rank() == 2 ? cos.size(1) : 0;
    const Shape shape{grid.count(), dim};
    for (const Tensor& t : {cos, sin})
        if (t.shape != shape || dim % 4 != 0 || t.dtype != cos.dtype || wide(t.dtype) != t.dtype ||
            !(t.device == Device::cpu()))
            throw std::invalid_argument("[rope_tables] tables: expected (" + std::to_string(grid.count()) +
                                        ", D) f32 or f64 cpu, D divisible by 4, got " + describe(t));
    if (cos.dtype == DType::f32)
        fill_rope(grid, rope_grid, dim, cos.as<float>(), sin.as<float>());
    else
        fill_rope(grid, rope_grid, dim, cos.as<double>(), sin.as<double>());
}

Rotation::Rotation(const Pass& pass) : pass_(pass)
{
    const Config& c = pass.config;
    if (!c.rope) return;
    Context& ctx = pass.ctx;
    both_ = {nullptr, {2, c.patches(), pass.dim}, wide(pass.dtype), ctx.device()};
    auto fill = [&](void* memory) {
        both_.data = memory;
        const Buffer host(both_.bytes());
        const Tensor tables{host.data(), both_.shape, both_.dtype, {}};
        rope_tables(c.grid(), c.rope_grid, tables[0], tables[1]);
        backend_of(ctx).upload(ctx, host.data(), both_);
    };
    if (!internals(ctx).cache) {
        fill(arena_of(ctx).take(both_.shape, both_.dtype).data);
        return;
    }
    const TableCache::Key key{1, static_cast<std::int64_t>(both_.dtype), c.rope_grid, c.grid_height(), c.grid_width()};
    held_ = internals(ctx).cache->tables.get(ctx, key, false, both_.bytes(), fill);
    both_.data = const_cast<void*>(held_.get());
}

void Rotation::apply(const Tensor& x, bool inverse) const
{
    if (!both_) return;
    rope(pass_.ctx,
         {.x = x, .cos = both_[0], .sin = both_[1], .skip = pass_.len - pass_.config.patches(), .inverse = inverse});
}

}  // namespace vimcore
