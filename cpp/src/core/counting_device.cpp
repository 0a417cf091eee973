// SPDX-License-Identifier: Apache-2.0
// The CUDA operators, as far as they take scratch memory: for plans, where there need be no device.
#include "core/counting.h"
#include "core/device_scratch.h"

namespace vimcore {

namespace {

using namespace device_scratch;

class NoScratch : public Backend {
public:
#define VIM_DEFINE(function, Arguments) \
    void function(Context&, const Arguments&) override {}
    VIM_OPERATORS(VIM_DEFINE)
#undef VIM_DEFINE
};

// Those that are not here take none.
class DeviceScratch : public NoScratch {
public:
    explicit DeviceScratch(std::size_t product_bytes) : product_bytes_(product_bytes) {}

    int default_threads() const override { return 1; }
    std::int64_t tile() const override { return undivided_tile; }

    void norm_backward(Context& ctx, const NormBackward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        const NormSums own = norm_sums(ctx, a);
        const ColumnSum sums[] = {{own.dweight, a.dweight}, {own.dbias, a.dbias}};
        sum(ctx, sums);
    }

    void linear_forward(Context& ctx, const std::span<const LinearForward>& args) override
    {
        Arena::Scope scope(arena_of(ctx));
        for (const LinearForward& a : args) {
            weight(ctx, a.weight, a.x.dtype, a.y.shape[-1]);
            product(ctx, {a.y.numel(), a.weight.size(1)});
        }
    }
    void linear_backward(Context& ctx, const std::span<const LinearBackward>& args) override
    {
        Arena::Scope scope(arena_of(ctx));
        for (const LinearBackward& a : args)
            if (a.dweight) product(ctx, {a.dy.numel(), a.dweight.numel()});
        for (const LinearBackward& a : args) {
            if (!a.dbias) continue;
            const Index outputs = a.dy.shape[-1];
            const ColumnSum bias{a.dy.view({a.dy.numel() / std::max<Index>(outputs, 1), outputs}), a.dbias};
            sum(ctx, {&bias, 1});
        }
        for (const LinearBackward& a : args) {
            if (!a.dx) continue;
            weight(ctx, a.weight, a.dy.dtype, a.dy.shape[-1]);
            product(ctx, {a.dx.numel(), a.weight.size(0)});
        }
    }

    void conv1d_backward(Context& ctx, const Conv1dBackward& a) override
    {
        if (a.passes.empty() || a.passes[0].du.numel() == 0) return;
        const Index batch = a.x.size(0), len = a.x.size(1);
        auto join = [&](ConvPasses passes, const ConvParts& parts) {
            ColumnSum sums[most_sums];
            for (std::size_t i = 0; i < passes.size(); i++) {
                const Tensor& dweight = passes[i].dweight;
                sums[2 * i] = {parts.dweight[i], dweight ? dweight.view({dweight.numel()}) : Tensor{}};
                sums[2 * i + 1] = {parts.dbias[i], passes[i].dbias};
            }
            sum(ctx, {sums, 2 * passes.size()});
        };
        if (conv_has_window(a)) {
            Arena::Scope scope(arena_of(ctx));
            join(a.passes, conv_parts(ctx, a.passes, batch * ceil_div(len, conv_chunk(a))));
            return;
        }
        for (const ConvBackwardPass& pass : a.passes) {
            Arena::Scope scope(arena_of(ctx));
            const ConvParts parts = conv_parts(ctx, {&pass, 1}, batch * len);
            conv_gradient(ctx, a, pass);
            if (pass.dweight || pass.dbias) join({&pass, 1}, parts);
        }
    }

    void scan_forward(Context& ctx, const ScanForward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        if (is_tuned(a)) {
            direction_sum(ctx, a);
            return;
        }
        for (const ScanForwardPass& pass : a.passes) {
            ScanForward single = a;
            single.passes = {&pass, 1};
            if (a.passes.size() > 1)
                scan_forward(ctx, single);
            else if (!pass.state)
                generic_memory(ctx, a.xz.size(0), pass.A_log.size(1), a.xz.size(2) / 2);
        }
    }
    void scan_backward(Context& ctx, const ScanBackward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        if (is_tuned(a)) {
            tuned_backward(ctx, a);
            return;
        }
        const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
        launches_sum(ctx, a);
        for (const ScanBackwardPass& p : a.passes) {
            Arena::Scope own(arena_of(ctx));
            floats(ctx, p.u.shape);  // the gradient of delta before bias and softplus
            generic_partials(ctx, batch, len, p.A_log.size(1), inner);
            {
                Arena::Scope states(arena_of(ctx));
                generic_backward_states(ctx, batch, len, p.A_log.size(1), inner, a.chunk);
            }
            if (p.ddt_weight && p.dt_weight.size(1) > 0) dt_parts(ctx, batch * len, p.dt_weight.size(1), inner);
        }
    }
    void selective_scan_forward(Context& ctx, const SelectiveScanForward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        generic_memory(ctx, a.u.size(0), a.A.size(1), a.u.size(2));
    }
    void selective_scan_backward(Context& ctx, const SelectiveScanBackward& a) override
    {
        const Index batch = a.u.size(0), len = a.u.size(1), dim = a.u.size(2), states = a.A.size(1);
        Arena::Scope scope(arena_of(ctx));
        floats(ctx, {batch, ceil_div(len, textbook_chunk), states, dim});  // states at every chunk
        {
            Arena::Scope forward(arena_of(ctx));
            generic_memory(ctx, batch, states, dim);
        }
        if (states > generic_states) floats(ctx, a.u.shape);
        generic_partials(ctx, batch, len, states, dim);
        generic_backward_states(ctx, batch, len, states, dim, textbook_chunk);
    }

    void positions_backward(Context& ctx, const PositionsBackward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        positions_along_rows(ctx, a);
    }
    void readout_forward(Context& ctx, const ReadoutForward& a) override
    {
        Arena::Scope scope(arena_of(ctx));
        const bool pools = a.reduce == Reduce::mean || a.reduce == Reduce::max;
        if (pools && a.out.numel() > 0) pool_parts(ctx, a);
    }

private:
    static void sum(Context& ctx, std::span<const ColumnSum> sums)
    {
        sum_columns(ctx, sums, [](std::span<const ColumnSum>, std::span<const ColumnSum>, Index) {});
    }
    // A cast of a weight that is not in the cache of weights: of a network's, gamma W alone.
    static void weight(Context& ctx, const Tensor& weight, DType dtype, Index rows)
    {
        if (!internals(ctx).cache && weight.dtype != dtype) arena_of(ctx).take({rows * weight.size(1)}, dtype);
    }
    void product(Context& ctx, const Shape& work) const
    {
        if (product_bytes_ == 0 || work[0] == 0 || work[1] == 0) return;
        Arena::Scope scope(arena_of(ctx));
        blas_memory(ctx, product_bytes_);
    }

    std::size_t product_bytes_;
};

}  // namespace

std::unique_ptr<Backend> counting_backend(Device device, std::size_t product_bytes)
{
    if (device.type == Device::Type::cpu) return counting_cpu();
    return std::make_unique<Counting<DeviceScratch>>(product_bytes);
}

}  // namespace vimcore
