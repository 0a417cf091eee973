// SPDX-License-Identifier: Apache-2.0
// The backward pass of a block, over whole sequences: what forward did not save is computed again on the way.
#include <algorithm>

#include "network/block_parts.h"

namespace vimcore {

void block_backward(Context& ctx, const BlockConfig& config, const BlockParams& params, const Block& block,
                    const BlockSaved& saved, const BlockGradients& g, BlockParams& dparams)
{
    if (saved.residual.numel() == 0) return;
    Arena::Scope scope(arena_of(ctx));
    Sizes s = sizes(config, saved.residual);
    s.dtype = saved.q.dtype;
    s.q = saved.q.shape[-1];
    const Routes r = routes(config, params, block.reverse, &dparams);
    const auto passes = static_cast<std::size_t>(r.count), projections = static_cast<std::size_t>(r.projections);
    auto take = [&](const Shape& shape) { return arena_of(ctx).take(shape, s.dtype); };
    const Shape sequence{s.batch, s.len, s.inner};

    // out_proj, as far as its input gradient
    const Tensor out_proj = scaled_out_proj(ctx, params);
    const Tensor dy = take(sequence), y = take(sequence), dxz = take({s.batch, s.len, 2 * s.inner});
    Tensor v, xz = saved.xz;
    auto normalise = [&] {  // once more, as in forward
        v = take(saved.residual.shape);
        norm_forward(ctx, {.residual = saved.residual,
                           .weight = params.norm_weight,
                           .bias = params.norm_bias,
                           .kind = config.norm,
                           .eps = config.norm_eps,
                           .out = v});
    };
    if (!xz) {
        normalise();
        xz = take(dxz.shape);
        const LinearForward args{.x = v, .weight = params.in_proj, .y = xz};
        linear_forward(ctx, {&args, 1});
    }
    {
        WithoutCache guard(ctx, static_cast<bool>(params.gamma));
        const LinearBackward args{.weight = out_proj, .dy = g.dout, .dx = dy};
        linear_backward(ctx, {&args, 1});
    }

    // u again, then both scans backward. What belongs to the directions lies side by side: equal distances let a
    // backend batch their products.
    const Tensor us = take({r.projections, s.batch, s.len, s.inner}), dus = take(us.shape);
    ConvForwardPass conv[2];
    ConvBackwardPass dconv[2];
    for (std::size_t p = 0; p < projections; p++) {
        const Route& route = r.route[p];
        const bool reverse = passes == projections && route.reverse;
        conv[p] = {.reverse = reverse,
                   .weight = route.weights.conv_weight,
                   .bias = route.weights.conv_bias,
                   .u = us[static_cast<std::int64_t>(p)]};
        dconv[p] = {.reverse = reverse,
                    .weight = route.weights.conv_weight,
                    .bias = route.weights.conv_bias,
                    .du = dus[static_cast<std::int64_t>(p)],
                    .dweight = route.gradients->conv_weight,
                    .dbias = route.gradients->conv_bias};
    }
    conv1d_forward(ctx, {.x = xz, .passes = {conv, projections}});
    const Tensor dqs = take({r.count, s.batch, s.len, s.q});
    ScanBackwardPass scan[2];
    for (std::size_t p = 0; p < passes; p++) {
        const std::size_t source = std::min(p, projections - 1);
        const DirectionParams& w = r.route[p].weights;
        const DirectionParams& d = *r.route[passes == projections ? p : 0].gradients;
        scan[p] = {.reverse = r.route[p].reverse,
                   .u = conv[source].u,
                   .q = saved.q[static_cast<std::int64_t>(source)],
                   .A_log = w.A_log,
                   .D = w.D,
                   .dt_weight = w.dt_weight,
                   .dt_bias = w.dt_bias,
                   .checkpoints = saved.checkpoints[static_cast<std::int64_t>(p)],
                   .du = p == source ? dconv[p].du : take(sequence),
                   .dq = dqs[static_cast<std::int64_t>(p)],
                   .dA_log = r.route[p].gradients->A_log,
                   .dD = d.D,
                   .ddt_weight = d.dt_weight,
                   .ddt_bias = d.dt_bias};
    }
    scan_backward(ctx, {.xz = xz,
                        .passes = {scan, passes},
                        .scale = config.direction_scale(),
                        .chunk = saved.chunk,
                        .out = y,
                        .dout = dy,
                        .dxz = dxz});
    if (passes > projections) {  // both scans read the same u and q
        add(ctx, {.a = scan[0].du, .b = scan[1].du, .out = scan[0].du});
        add(ctx, {.a = scan[0].dq, .b = scan[1].dq, .out = scan[0].dq});
    }

    // out_proj's own gradient, now that its input is known again
    const LinearBackward out_grad{
        .x = y,
        .dy = g.dout,
        .dweight = params.gamma ? arena_of(ctx).take(params.out_proj.shape, params.out_proj.dtype) : dparams.out_proj};
    if (params.gamma) backend_of(ctx).fill_zero(ctx, out_grad.dweight);
    if (out_grad.dweight) linear_backward(ctx, {&out_grad, 1});
    if (params.gamma)  // d(gamma W) into dW and dgamma
        backend_of(ctx).scale_rows_backward(ctx, {.matrix = params.out_proj,
                                                  .factor = params.gamma,
                                                  .dout = out_grad.dweight,
                                                  .dmatrix = dparams.out_proj,
                                                  .dfactor = dparams.gamma});

    // x_proj, convolution
    LinearBackward x_proj[2];
    for (std::size_t p = 0; p < projections; p++)
        x_proj[p] = {.x = conv[p].u,
                     .weight = r.route[p].weights.x_proj,
                     .dy = scan[p].dq,
                     .dx = dconv[p].du,
                     .accumulate_dx = true,
                     .dweight = r.route[p].gradients->x_proj};
    linear_backward(ctx, {x_proj, projections});
    conv1d_backward(ctx, {.x = xz, .passes = {dconv, projections}, .dx = dxz});

    // in_proj and norm
    if (!v) normalise();
    const Tensor dv = take(saved.residual.shape);
    const LinearBackward in_proj{.x = v, .weight = params.in_proj, .dy = dxz, .dx = dv, .dweight = dparams.in_proj};
    linear_backward(ctx, {&in_proj, 1});
    norm_backward(ctx, {.x = saved.residual,
                        .row_scale = block.row_scale,
                        .weight = params.norm_weight,
                        .kind = config.norm,
                        .eps = config.norm_eps,
                        .dout = dv,
                        .dresidual_out = g.dresidual_out,
                        .dresidual = g.dresidual,
                        .dh = g.dh,
                        .dweight = dparams.norm_weight,
                        .dbias = dparams.norm_bias});
}

}  // namespace vimcore
