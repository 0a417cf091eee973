// SPDX-License-Identifier: Apache-2.0
// Shared by the files of the CPU backend, which cuts every operator into independent tasks of the single-threaded
// kernels. Where sums cross tasks, the cut does not depend on the number of threads, so results do not either.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <span>

#include "core/backend.h"
#include "core/weight_cache.h"
#include "isa.h"
#include "threads.h"

namespace vimcore {
template <>
inline constexpr DType dtype_of<cpu::bf16> = DType::bf16;
}

namespace vimcore::cpu {

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// f with a number of the type that activations have, or with one that wide tensors have.
template <class F>
void dispatch(DType dtype, F&& f)
{
    if (dtype == DType::f32)
        f(float{});
    else if (dtype == DType::bf16)
        f(bf16{});
    else
        f(double{});
}
template <class F>
void dispatch_wide(DType dtype, F&& f)
{
    if (dtype == DType::f32)
        f(float{});
    else
        f(double{});
}

// The tasks of an operator. Where memory is counted none runs, and operators end before what they do by themselves.
template <class F>
void parallel_for(Context& ctx, Index count, F&& f)
{
    if (!counts(ctx)) parallel_for(ctx.threads(), count, f);
}

template <class T>
Tensor scratch(Context& ctx, Index count)
{
    return arena_of(ctx).take({count}, dtype_of<T>);
}

// The packed form of a weight from the running call's cache, or made anew in the arena without one.
template <class T, class F>
const T* packed(Context& ctx, const Tensor& weight, WeightForm form, Index count, F&& fill)
{
    if (WeightCache* cache = internals(ctx).cache)
        return static_cast<const T*>(cache->get(ctx, {weight.data, form, dtype_of<T>},
                                                sizeof(T) * static_cast<std::size_t>(count),
                                                [&](void* out) { fill(static_cast<T*>(out)); }));
    T* out = scratch<T>(ctx, count).template as<T>();
    if (!counts(ctx)) fill(out);
    return out;
}

// y = x W^T + bias (+ y), W packed; dw += dy^T x. Any leading dimensions.
template <class T>
struct Gemm {
    const T* x;
    Index ldx;
    const T* packed;
    const Wide<T>* bias;
    T* y;
    Index ldy;
    Index m, n, k;
    bool add;
};
template <class T>
struct GemmTn {
    const T* dy;
    Index lddy;
    const T* x;
    Index ldx;
    Wide<T>* dw;
    Index lddw;
    Index m, n, k;
};
template <class T>
void run_gemms(Context& ctx, std::span<const Gemm<T>> problems);
template <class T>
void run_gemms_tn(Context& ctx, std::span<const GemmTn<T>> problems);

// W (n, k) for y = x W^T, or for y = x W when transposed (then W is (k, n)).
template <class T>
const T* packed_linear(Context& ctx, const Tensor& w, Index n, Index k, bool transposed);
// (rows, columns) -> (columns, rows)
template <class T>
const T* packed_transpose(Context& ctx, const Tensor& w, Index rows, Index columns);

class CpuBackend : public Backend {
public:
    int default_threads() const override { return core_count(); }
    std::int64_t tile() const override { return 512; }  // keeps the activations of a block in the second-level cache

    void run(Context& ctx, void (*program)(void*), void* context) override
    {
        program_run(ctx.threads(), program, context);
    }
    void run_workers(Context& ctx, int count, void (*body)(void*, int), void* context) override
    {
        parallel_for(ctx.threads(), count, [&](std::int64_t index) { body(context, static_cast<int>(index)); });
    }
    void* allocate(std::size_t bytes, int device) override;
#ifdef _WIN32
    void release(void* memory, int) noexcept override { ::_aligned_free(memory); }
#else
    void release(void* memory, int) noexcept override { std::free(memory); }
#endif
    void upload(Context&, const void* host, const Tensor& to) override { std::memcpy(to.data, host, to.bytes()); }
    void download(Context&, const Tensor& from, void* host) override { std::memcpy(host, from.data, from.bytes()); }
    void copy(Context& ctx, const Tensor& from, const Tensor& to) override;
    void fill_zero(Context&, const Tensor& tensor) override { std::memset(tensor.data, 0, tensor.bytes()); }
    std::size_t panel_bytes(std::int64_t n, std::int64_t k) const override;
    void make_panels(const float* weight, std::int64_t n, std::int64_t k, void* panels) const override;
    void change_stream(Context& ctx, void* from, void* to) override;
    std::shared_ptr<void> mark(Context&) override { return nullptr; }
    void await(Context&, void*) override {}
    std::uint64_t recording(Context&) override { return 0; }
    std::shared_ptr<void> make_stream(int) override { return nullptr; }
    std::shared_ptr<void> record(Context& ctx, void (*program)(void*), void* context) override;
    void replay(Context& ctx, void* recording) override;

#define VIM_DECLARE(function, Arguments) void function(Context& ctx, const Arguments& args) override;
    VIM_OPERATORS(VIM_DECLARE)
#undef VIM_DECLARE
};

}  // namespace vimcore::cpu
