// SPDX-License-Identifier: Apache-2.0
// Gradients of one block from groups of images that run side by side. Each group sums into memory of its own; the
// sums are added up in the order of the groups, so that the result does not depend on who ran where.
#pragma once

#include <array>
#include <cstring>

#include "arena.h"
#include "backend.h"
#include "vimcore/params.h"

namespace vimcore {

class GroupGradients {
public:
    // Memory for `count` groups at a time, from the arena.
    GroupGradients(Context& ctx, BlockParams& sum, int count) : ctx_(ctx), sum_(sum)
    {
        for (const Tensor* tensor : tensors(sum)) {
            elements_ += *tensor ? (tensor->numel() + 15) / 16 * 16 : 0;
            if (*tensor) dtype_ = tensor->dtype;
        }
        memory_ = ctx.arena().take({count, elements_}, dtype_);
    }

    // The gradients of group `slot`, set to zero.
    BlockParams start(int slot) const
    {
        BlockParams part;
        const Tensor own = memory_[slot];
        std::memset(own.data, 0, own.bytes());
        std::int64_t used = 0;
        auto to = tensors(part);
        const auto like = tensors(sum_);
        for (std::size_t i = 0; i < to.size(); i++) {
            if (!*like[i]) continue;
            *to[i] = own.slice(used, used + like[i]->numel()).view(like[i]->shape);
            used += (like[i]->numel() + 15) / 16 * 16;
        }
        return part;
    }

    // Adds the first `count` groups to the sum. Tensors are dealt out to the threads.
    void finish(int count) const
    {
        struct Work {
            const GroupGradients& self;
            int count, workers;
        } work{*this, count, ctx_.threads()};
        ctx_.backend().run_workers(
            ctx_, work.workers,
            [](void* context, int index) {
                const Work& w = *static_cast<Work*>(context);
                w.self.dtype_ == DType::f32 ? w.self.add<float>(w.count, index, w.workers)
                                            : w.self.add<double>(w.count, index, w.workers);
            },
            &work);
    }

private:
    static std::array<Tensor*, 19> tensors(BlockParams& p)
    {
        DirectionParams &f = p.forward, &r = p.reverse;
        return {&p.in_proj,   &p.out_proj,    &f.x_proj,      &r.x_proj,      &f.A_log,    &r.A_log,     &f.dt_weight,
                &r.dt_weight, &f.conv_weight, &r.conv_weight, &f.D,           &r.D,        &f.conv_bias, &r.conv_bias,
                &f.dt_bias,   &r.dt_bias,     &p.gamma,       &p.norm_weight, &p.norm_bias};
    }

    // Every thread takes its share of every tensor.
    template <class T>
    void add(int count, int index, int workers) const
    {
        std::int64_t used = 0;
        for (const Tensor* tensor : tensors(sum_)) {
            if (!*tensor) continue;
            const std::int64_t n = tensor->numel(), begin = n * index / workers, end = n * (index + 1) / workers;
            T* sum = tensor->as<T>();
            for (int slot = 0; slot < count; slot++) {
                const T* part = memory_[slot].as<T>() + used;
                for (std::int64_t i = begin; i < end; i++) sum[i] += part[i];
            }
            used += (n + 15) / 16 * 16;
        }
    }

    Context& ctx_;
    BlockParams& sum_;
    std::int64_t elements_ = 0;
    DType dtype_ = DType::f32;
    Tensor memory_;
};

}  // namespace vimcore
