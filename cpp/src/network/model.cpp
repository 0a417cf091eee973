// SPDX-License-Identifier: Apache-2.0
// Model: a network loaded from a vimcore file.
#include <algorithm>
#include <cmath>
#include <set>

#include "core/backend.h"
#include "files/float_types.h"
#include "vimcore/model.h"
#include "vimcore/model_file.h"
#include "vimcore/plan.h"
#include "vimcore/safetensors.h"

namespace vimcore {

namespace {

// Weights of the four taps around a sample, cubic convolution with a = -0.75 (as torch's bicubic interpolation).
void cubic_taps(double fraction, double (&weight)[4])
{
    constexpr double a = -0.75;
    for (int i = 0; i < 4; i++) {
        const double x = std::fabs(fraction + 1 - i);
        weight[i] = x <= 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
    }
}

// A (rows, columns) grid of width-D vectors to another grid; positions outside repeat the border.
std::vector<float> resize_grid(const std::vector<float>& in, std::int64_t rows, std::int64_t columns,
                               std::int64_t new_rows, std::int64_t new_columns, std::int64_t D)
{
    std::vector<float> out(static_cast<std::size_t>(new_rows * new_columns * D));
    for (std::int64_t y = 0; y < new_rows; y++)
        for (std::int64_t x = 0; x < new_columns; x++) {
            const double sy =
                (static_cast<double>(y) + 0.5) * static_cast<double>(rows) / static_cast<double>(new_rows) - 0.5;
            const double sx =
                (static_cast<double>(x) + 0.5) * static_cast<double>(columns) / static_cast<double>(new_columns) - 0.5;
            const double y0 = std::floor(sy), x0 = std::floor(sx);
            double wy[4], wx[4];
            cubic_taps(sy - y0, wy);
            cubic_taps(sx - x0, wx);
            float* to = out.data() + (y * new_columns + x) * D;
            for (std::int64_t d = 0; d < D; d++) {
                double sum = 0;
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) {
                        const std::int64_t r =
                            std::clamp<std::int64_t>(static_cast<std::int64_t>(y0) - 1 + i, 0, rows - 1);
                        const std::int64_t c =
                            std::clamp<std::int64_t>(static_cast<std::int64_t>(x0) - 1 + j, 0, columns - 1);
                        sum += wy[i] * wx[j] * in[static_cast<std::size_t>((r * columns + c) * D + d)];
                    }
                to[d] = static_cast<float>(sum);
            }
        }
    return out;
}

// Rows of class tokens stay as they are; the patches' rows are resized as a grid. table: (1, L, D) of `from`.
std::vector<float> resize_positions(const std::vector<float>& table, const Config& from, const Config& to)
{
    const std::int64_t D = from.embed_dim;
    auto class_rows = [](const Config& c) {
        std::set<std::int64_t> rows;
        if (c.class_tokens() > 0) rows.insert(c.class_position());
        if (c.class_tokens() == 2) rows.insert(c.tokens() - 1);
        return rows;
    };
    auto row = [&](std::vector<float>& t, std::int64_t i) { return t.begin() + i * D; };
    const std::set<std::int64_t> old_class = class_rows(from), new_class = class_rows(to);
    std::vector<float> grid, tokens, source = table;
    for (std::int64_t i = 0; i < from.tokens(); i++) {
        auto& part = old_class.count(i) ? tokens : grid;
        part.insert(part.end(), row(source, i), row(source, i) + D);
    }
    grid = resize_grid(grid, from.grid_height(), from.grid_width(), to.grid_height(), to.grid_width(), D);
    std::vector<float> result(static_cast<std::size_t>(to.tokens() * D));
    std::int64_t patch = 0, token = 0;
    for (std::int64_t i = 0; i < to.tokens(); i++) {
        const bool is_class = new_class.count(i) > 0;
        auto from_row = is_class ? row(tokens, token++) : row(grid, patch++);
        std::copy(from_row, from_row + D, row(result, i));
    }
    return result;
}

}  // namespace

std::shared_ptr<const Model> Model::load(const std::string& path, Device device) { return load(path, device, 0, 0); }

std::shared_ptr<const Model> Model::load(const std::string& path, Device device, std::int64_t img_height,
                                         std::int64_t img_width)
{
    Context ctx(device);
    const SafetensorsFile file = SafetensorsFile::open(path);
    const Config stored = ModelFile::describe(file.metadata(), path).config;

    auto model = std::make_shared<Model>();
    model->device_ = device;
    model->metadata_ = file.metadata();
    model->config_ = stored;
    if (img_height > 0) model->config_.img_height = img_height;
    if (img_width > 0) model->config_.img_width = img_width;
    model->config_.validate();

    check_tensors(file, stored, path);

    // All weights in one block of memory, each on a multiple of 64 bytes; for another device, by way of a copy here.
    const auto room = [](const Shape& shape) { return (shape.numel() + 15) / 16 * 16; };
    std::int64_t size = 0;
    for_each_param(model->config_, model->params_, [&](const std::string&, Tensor& tensor, const Shape& shape) {
        tensor = {nullptr, shape, DType::f32, device};
        size += room(shape);
    });
    if (device == Device::cpu()) require_memory("load", path, weight_bytes(model->config_));
    model->storage_.emplace_back(static_cast<std::size_t>(size) * sizeof(float), device);
    auto* const base = static_cast<float*>(model->storage_.back().data());
    const bool here = device == Device::cpu();
    const Buffer staging(here ? 0 : model->storage_.back().bytes());
    float* const host = here ? base : static_cast<float*>(staging.data());
    const bool resized =
        stored.grid_height() != model->config_.grid_height() || stored.grid_width() != model->config_.grid_width();
    std::int64_t at = 0;
    for_each_param(model->config_, model->params_, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        const Tensor& from = *file.find(name);
        if (name == "pos_embed" && resized) {
            std::vector<float> table(static_cast<std::size_t>(from.numel()));
            read_floats(file, from, table.data());
            table = resize_positions(table, stored, model->config_);
            std::copy(table.begin(), table.end(), host + at);
        } else {
            read_floats(file, from, host + at);
        }
        tensor.data = base + at;
        at += room(shape);
    });
    if (!here) backend_of(ctx).upload(ctx, host, {base, {size}, DType::f32, device});
    model->params_.changed();
    return model;
}

}  // namespace vimcore
