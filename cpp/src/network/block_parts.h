// SPDX-License-Identifier: Apache-2.0
// What forward and backward of a block share: which way its scans go, its sizes, out_proj with gamma in it.
#pragma once

#include "core/counting.h"
#include "core/device_scratch.h"
#include "vimcore/model.h"

namespace vimcore {

// One pass of a scan over the tokens: which weights, which way.
struct Route {
    DirectionParams weights;
    DirectionParams* gradients = nullptr;
    bool reverse = false;
};

struct Routes {
    Route route[2];
    int count = 1;
    int projections = 1;  // passes with a convolution and x_proj of their own
};

inline Routes routes(const BlockConfig& config, const BlockParams& params, bool reverse, BlockParams* dparams)
{
    Routes r;
    r.route[0] = {params.forward, dparams ? &dparams->forward : nullptr, reverse};
    if (!config.two_directions()) return r;
    r.count = 2;
    r.route[1] = {params.reverse, dparams ? &dparams->reverse : nullptr, true};
    if (config.directions == Directions::ssm_conv) {
        r.projections = 2;
    } else {  // ssm: all but A_log is shared, the convolution stays causal
        Tensor A_log = params.reverse.A_log;
        r.route[1].weights = params.forward;
        r.route[1].weights.A_log = A_log;
    }
    return r;
}

struct Sizes {
    std::int64_t batch, len, dim, inner, state, q;  // q: elements of a row
    DType dtype;                                    // of activations
};

inline Sizes sizes(const BlockConfig& config, const Tensor& x)
{
    const std::int64_t q = config.rank() + 2 * config.d_state;
    return {x.size(0),      x.size(1),      config.embed_dim,
            config.inner(), config.d_state, device_scratch::padded_columns(q, x.dtype, x.device.type),
            x.dtype};
}

// gamma folded into out_proj: h gamma = s (gamma W)^T.
inline Tensor scaled_out_proj(Context& ctx, const BlockParams& p)
{
    if (!p.gamma) return p.out_proj;
    const Tensor scaled = arena_of(ctx).take(p.out_proj.shape, p.out_proj.dtype);
    backend_of(ctx).scale_rows(ctx, {.matrix = p.out_proj, .factor = p.gamma, .out = scaled});
    return scaled;
}

// A scratch weight is not in the cache of packed weights.
class WithoutCache {
public:
    explicit WithoutCache(Context& ctx, bool apply) : ctx_(ctx), cache_(internals(ctx).cache)
    {
        if (apply) internals(ctx).cache = nullptr;
    }
    ~WithoutCache() { internals(ctx_).cache = cache_; }

private:
    Context& ctx_;
    WeightCache* cache_;
};

}  // namespace vimcore
