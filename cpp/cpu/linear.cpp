// SPDX-License-Identifier: Apache-2.0
// Projections: y = x W^T, dx = dy W, dW = dy^T x.
#include <array>

#include "cpu_backend.h"

namespace vimcore::cpu {

struct GemmCut {
    Index rows, row_tasks, panels, panel_tasks;
    Index tasks() const { return row_tasks * panel_tasks; }
};

namespace {

constexpr std::size_t max_problems = 8;  // projections of one parallel region

// Enough tasks to balance, few enough that a panel of weights is reused over many rows.
template <class T>
GemmCut cut_gemm(const Gemm<T>& g, int threads, const Kernels<T>& kernel)
{
    const Index panels = ceil_div(g.n, kernel.nr);
    if (threads <= 1) return {g.m, 1, panels, 1};
    const Index most = ceil_div(g.m, 12 * kernel.mr), wanted = std::max<Index>(4 * threads, most);
    const Index rows = std::max(round_up(ceil_div(g.m, wanted), kernel.mr), kernel.mr);
    const Index row_tasks = ceil_div(g.m, rows);
    const Index panel_tasks = std::clamp<Index>(ceil_div(2 * threads, std::max<Index>(row_tasks, 1)), 1, panels);
    return {rows, row_tasks, panels, panel_tasks};
}

}  // namespace

template <class T>
void run_gemms(Context& ctx, std::span<const Gemm<T>> problems)
{
    const Kernels<T>& kernel = kernels<T>();
    for (auto rest = problems; !rest.empty(); rest = rest.subspan(std::min(max_problems, rest.size()))) {
        const auto group = rest.first(std::min(max_problems, rest.size()));
        std::array<GemmCut, max_problems> cuts{};
        Index total = 0;
        for (std::size_t i = 0; i < group.size(); i++) {
            if (group[i].m > 0 && group[i].n > 0) cuts[i] = cut_gemm(group[i], ctx.threads(), kernel);
            total += cuts[i].tasks();
        }
        parallel_for(ctx, total, [&](Index task) {
            std::size_t i = 0;
            while (task >= cuts[i].tasks()) task -= cuts[i++].tasks();
            const Gemm<T>& g = group[i];
            const GemmCut& cut = cuts[i];
            const Index row = task / cut.panel_tasks * cut.rows, part = task % cut.panel_tasks;
            kernel.gemm({.x = g.x + row * g.ldx,
                         .ldx = g.ldx,
                         .packed = g.packed,
                         .bias = g.bias,
                         .y = g.y + row * g.ldy,
                         .ldy = g.ldy,
                         .m = std::min(cut.rows, g.m - row),
                         .n = g.n,
                         .k = g.k,
                         .panel_begin = part * cut.panels / cut.panel_tasks,
                         .panel_end = (part + 1) * cut.panels / cut.panel_tasks,
                         .add = g.add});
        });
    }
}

template <class T>
void run_gemms_tn(Context& ctx, std::span<const GemmTn<T>> problems)
{
    const Kernels<T>& kernel = kernels<T>();
    std::span<const GemmTn<T>> group;
    for (auto rest = problems; !rest.empty(); rest = rest.subspan(group.size())) {
        std::size_t size = 1;  // sums into the same gradient follow each other, for the order and against a race
        while (size < std::min(max_problems, rest.size()) && rest[size].dw != rest[size - 1].dw) size++;
        group = rest.first(size);
        std::array<Index, max_problems> width{}, tasks{};
        Index total = 0, space = 0;
        for (std::size_t i = 0; i < group.size(); i++) {
            const GemmTn<T>& g = group[i];
            if (g.m == 0 || g.n == 0 || g.k == 0) continue;
            const Index wanted = ctx.threads() > 1 ? 2 * ctx.threads() : 1;  // tasks
            width[i] = round_up(std::max(2 * kernel.mr, ceil_div(g.n, wanted)), kernel.mr);
            tasks[i] = ceil_div(g.n, width[i]);
            total += tasks[i];
            space = std::max(space, round_up(kernel.gemm_tn_scratch(g.m, g.k), 16));
        }
        Arena::Scope scope(arena_of(ctx));
        T* memory = scratch<T>(ctx, space * total).template as<T>();
        parallel_for(ctx, total, [&](Index task) {
            T* own = memory + task * space;
            std::size_t i = 0;
            while (task >= tasks[i]) task -= tasks[i++];
            const GemmTn<T>& g = group[i];
            kernel.gemm_tn({.dy = g.dy,
                            .lddy = g.lddy,
                            .x = g.x,
                            .ldx = g.ldx,
                            .dw = g.dw,
                            .lddw = g.lddw,
                            .m = g.m,
                            .k = g.k,
                            .j_begin = task * width[i],
                            .j_end = std::min(g.n, (task + 1) * width[i]),
                            .scratch = own});
        });
    }
}

template <class T>
Index panel_elements(Index n, Index k)
{
    const Kernels<T>& kernel = kernels<T>();
    return round_up(n, kernel.nr) * round_up(k, kernel.depth);
}

template <class T>
const T* packed_linear(Context& ctx, const Tensor& w, Index n, Index k, bool transposed)
{
    if (w.dtype == DType::bf16_panels) return w.as<T>();
    const WeightForm form = transposed ? WeightForm::panels_transposed : WeightForm::panels;
    const Kernels<T>& kernel = kernels<T>();
    return packed<T>(ctx, w, form, panel_elements<T>(n, k), [&](T* out) {
        kernel.pack(
            {.w = w.as<Wide<T>>(), .ldw = transposed ? n : k, .n = n, .k = k, .transposed = transposed, .out = out});
    });
}

template <class T>
const T* packed_transpose(Context& ctx, const Tensor& w, Index rows, Index columns)
{
    return packed<T>(ctx, w, WeightForm::transposed, rows * columns, [&](T* out) {
        const T* in = w.as<T>();
        for (Index i = 0; i < rows; i++)
            for (Index j = 0; j < columns; j++) out[j * rows + i] = in[i * columns + j];
    });
}

namespace {

// dbias += sum over rows, in blocks so that long sums stay accurate.
template <class T>
void add_column_sums(const T* dy, Index rows, Index columns, Wide<T>* dbias)
{
    constexpr Index block = 256, width = 64;
    for (Index j0 = 0; j0 < columns; j0 += width) {
        const Index j1 = std::min(columns, j0 + width);
        for (Index begin = 0; begin < rows; begin += block) {
            Wide<T> sums[width] = {};
            for (Index i = begin; i < std::min(rows, begin + block); i++)
                for (Index j = j0; j < j1; j++) sums[j - j0] += dy[i * columns + j];
            for (Index j = j0; j < j1; j++) dbias[j] += sums[j - j0];
        }
    }
}

template <class T>
void forward(Context& ctx, std::span<const LinearForward> args)
{
    std::array<Gemm<T>, max_problems> problems;
    std::size_t count = 0;
    Arena::Scope scope(arena_of(ctx));
    for (const LinearForward& a : args) {
        const Index n = a.weight.size(0), k = a.weight.size(1);
        problems[count++] = {.x = a.x.as<T>(),
                             .ldx = k,
                             .packed = packed_linear<T>(ctx, a.weight, n, k, false),
                             .bias = a.bias.as<Wide<T>>(),
                             .y = a.y.as<T>(),
                             .ldy = n,
                             .m = n ? a.y.numel() / n : 0,
                             .n = n,
                             .k = k,
                             .add = false};
    }
    run_gemms<T>(ctx, std::span(problems.data(), count));
}

template <class T>
void backward(Context& ctx, std::span<const LinearBackward> args)
{
    std::array<Gemm<T>, max_problems> inputs;
    std::array<GemmTn<T>, max_problems> weights;
    std::size_t input_count = 0, weight_count = 0;
    Arena::Scope scope(arena_of(ctx));
    for (const LinearBackward& a : args) {
        const Index n = a.dy.shape[-1], m = n ? a.dy.numel() / n : 0;
        if (a.dx) {
            const Index k = a.weight.size(1);
            inputs[input_count++] = {.x = a.dy.as<T>(),
                                     .ldx = n,
                                     .packed = packed_linear<T>(ctx, a.weight, k, n, true),
                                     .bias = nullptr,
                                     .y = a.dx.as<T>(),
                                     .ldy = k,
                                     .m = m,
                                     .n = k,
                                     .k = n,
                                     .add = a.accumulate_dx};
        }
        if (a.dweight) {
            const Index k = a.dweight.size(1);
            weights[weight_count++] = {.dy = a.dy.as<T>(),
                                       .lddy = n,
                                       .x = a.x.as<T>(),
                                       .ldx = k,
                                       .dw = a.dweight.as<Wide<T>>(),
                                       .lddw = k,
                                       .m = m,
                                       .n = n,
                                       .k = k};
        }
        if (a.dbias && !counts(ctx)) add_column_sums(a.dy.as<T>(), m, n, a.dbias.as<Wide<T>>());
    }
    run_gemms<T>(ctx, std::span(inputs.data(), input_count));
    run_gemms_tn<T>(ctx, std::span(weights.data(), weight_count));
}

}  // namespace

std::size_t CpuBackend::panel_bytes(std::int64_t n, std::int64_t k) const
{
    return sizeof(bf16) * static_cast<std::size_t>(panel_elements<bf16>(n, k));
}

void CpuBackend::make_panels(const float* weight, std::int64_t n, std::int64_t k, void* panels) const
{
    kernels<bf16>().pack(
        {.w = weight, .ldw = k, .n = n, .k = k, .transposed = false, .out = static_cast<bf16*>(panels)});
}

void CpuBackend::linear_forward(Context& ctx, const std::span<const LinearForward>& args)
{
    for (auto rest = args; !rest.empty(); rest = rest.subspan(std::min(max_problems, rest.size()))) {
        const auto group = rest.first(std::min(max_problems, rest.size()));
        dispatch(rest[0].x.dtype, [&](auto t) { forward<decltype(t)>(ctx, group); });
    }
}

void CpuBackend::linear_backward(Context& ctx, const std::span<const LinearBackward>& args)
{
    for (auto rest = args; !rest.empty(); rest = rest.subspan(std::min(max_problems, rest.size()))) {
        const auto group = rest.first(std::min(max_problems, rest.size()));
        dispatch(rest[0].dy.dtype, [&](auto t) { backward<decltype(t)>(ctx, group); });
    }
}

template void run_gemms<float>(Context&, std::span<const Gemm<float>>);
template void run_gemms<double>(Context&, std::span<const Gemm<double>>);
template void run_gemms<bf16>(Context&, std::span<const Gemm<bf16>>);
template void run_gemms_tn<float>(Context&, std::span<const GemmTn<float>>);
template void run_gemms_tn<double>(Context&, std::span<const GemmTn<double>>);
template void run_gemms_tn<bf16>(Context&, std::span<const GemmTn<bf16>>);
template const float* packed_linear<float>(Context&, const Tensor&, Index, Index, bool);
template const double* packed_linear<double>(Context&, const Tensor&, Index, Index, bool);
template const bf16* packed_linear<bf16>(Context&, const Tensor&, Index, Index, bool);
template const float* packed_transpose<float>(Context&, const Tensor&, Index, Index);
template const double* packed_transpose<double>(Context&, const Tensor&, Index, Index);

}  // namespace vimcore::cpu
