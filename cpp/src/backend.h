// SPDX-License-Identifier: Apache-2.0
// What a device must provide: one method per operator of ops.h, arguments already checked.
#pragma once

#include <memory>
#include <span>
#include <type_traits>

#include "vimcore/ops.h"

namespace vimcore {

class Backend {
public:
    virtual ~Backend() = default;

    virtual int default_threads() const = 0;
    virtual std::int64_t tile() const = 0;  // tokens per operator call that suit its caches

    // Runs `program`, a sequence of operator calls that belong together.
    virtual void run(Context& ctx, void (*program)(void* context), void* context) = 0;

    // Calls body(context, i) for i in [0, count), side by side where that pays.
    virtual void run_workers(Context& ctx, int count, void (*body)(void* context, int index), void* context) = 0;

    virtual void norm_forward(Context& ctx, const NormForward& args) = 0;
    virtual void norm_backward(Context& ctx, const NormBackward& args) = 0;
    virtual void linear_forward(Context& ctx, std::span<const LinearForward> args) = 0;
    virtual void linear_backward(Context& ctx, std::span<const LinearBackward> args) = 0;
    virtual void conv1d_forward(Context& ctx, const Conv1d& args) = 0;
    virtual void conv1d_backward(Context& ctx, const Conv1d& args) = 0;
    virtual void scan_forward(Context& ctx, const Scan& args) = 0;
    virtual void scan_backward(Context& ctx, const Scan& args) = 0;
    virtual void selective_scan_forward(Context& ctx, const SelectiveScan& args) = 0;
    virtual void selective_scan_backward(Context& ctx, const SelectiveScan& args) = 0;
    virtual void patches_forward(Context& ctx, const Patches& args) = 0;
    virtual void patches_backward(Context& ctx, const Patches& args) = 0;
    virtual void tokens_forward(Context& ctx, const Tokens& args) = 0;
    virtual void tokens_backward(Context& ctx, const Tokens& args) = 0;
    virtual void rope(Context& ctx, const Rope& args) = 0;
    virtual void readout_forward(Context& ctx, const Readout& args) = 0;
    virtual void readout_backward(Context& ctx, const Readout& args) = 0;
    virtual void add(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& row_scale) = 0;
};

template <class F>
void run_together(Context& ctx, F&& program)
{
    ctx.backend().run(ctx, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); }, &program);
}

Backend& cpu_backend();
Backend& cuda_backend();  // throws vimcore::Error where the build or the machine has no CUDA

}  // namespace vimcore
