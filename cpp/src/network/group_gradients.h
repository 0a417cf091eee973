// SPDX-License-Identifier: Apache-2.0
// Gradients of one block from groups of images that run side by side. Each group sums into memory of its own; the
// sums are added up in the order of the groups, so that the result does not depend on who ran where.
#pragma once

#include <array>

#include "core/counting.h"
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
        memory_ = arena_of(ctx).take({count, elements_}, dtype_);
    }

    // The gradients of group `slot`, set to zero by whoever runs it.
    BlockParams start(Context& own, int slot) const
    {
        backend_of(own).fill_zero(own, memory_[slot]);
        return part(slot);
    }

    // Adds the first `count` groups to the sum.
    void finish(int count) const
    {
        const auto to = values(sum_);
        for_each_step(ctx_, 0, count, 1, [&](std::int64_t slot) {
            BlockParams own = part(static_cast<int>(slot));
            const auto from = values(own);
            backend_of(ctx_).accumulate(ctx_, {.to = to, .from = from});
        });
    }

private:
    static std::array<Tensor*, 19> tensors(BlockParams& p)
    {
        DirectionParams &f = p.forward, &r = p.reverse;
        return {&p.in_proj,   &p.out_proj,    &f.x_proj,      &r.x_proj,      &f.A_log,    &r.A_log,     &f.dt_weight,
                &r.dt_weight, &f.conv_weight, &r.conv_weight, &f.D,           &r.D,        &f.conv_bias, &r.conv_bias,
                &f.dt_bias,   &r.dt_bias,     &p.gamma,       &p.norm_weight, &p.norm_bias};
    }

    static std::array<Tensor, 19> values(BlockParams& p)
    {
        std::array<Tensor, 19> values;
        const auto from = tensors(p);
        for (std::size_t i = 0; i < from.size(); i++) values[i] = *from[i];
        return values;
    }

    BlockParams part(int slot) const
    {
        BlockParams part;
        const Tensor own = memory_[slot];
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

    Context& ctx_;
    BlockParams& sum_;
    std::int64_t elements_ = 0;
    DType dtype_ = DType::f32;
    Tensor memory_;
};

}  // namespace vimcore
