// SPDX-License-Identifier: Apache-2.0
#include "network/head.h"

namespace vimcore {

namespace {

// What the head sees of an image, and on the way to it: the tokens read out, each narrowed by the neck, as the neck's
// norm takes them. Without a neck the row is what was read out.
struct Row {
    Tensor joined;      // (B, D), of registers (B, n D)
    Tensor narrow;      // (B n, D / r)
    Tensor normalised;  // (B, 1, n D / r), wide: what the norm is of
    Tensor row;         // (B, readout width)
};

Row read_out(const Pass& pass, const Tensor& tokens)
{
    const Config& c = pass.config;
    const Selection selection = pass.selection();
    const std::int64_t count = selection.reduce == Reduce::join ? selection.places.count : 1;
    Row r;
    r.joined = pass.take({pass.batch, count * pass.dim});
    readout_forward(pass.ctx, {.reduce = selection.reduce, .places = selection.places, .x = tokens, .out = r.joined});
    if (c.neck_reduction == 1) {
        r.row = r.joined;
        return r;
    }
    const Shape row{pass.batch, 1, c.readout_width()};
    r.narrow = pass.take({pass.batch * count, pass.dim / c.neck_reduction});
    const LinearForward neck{
        .x = r.joined.view({pass.batch * count, pass.dim}), .weight = pass.params.neck_weight, .y = r.narrow};
    linear_forward(pass.ctx, {&neck, 1});
    r.normalised = pass.take_wide(row);
    r.row = pass.take({pass.batch, c.readout_width()});
    norm_forward(pass.ctx, {.h = r.narrow.view(row),
                            .weight = pass.params.neck_norm_weight,
                            .bias = pass.params.neck_norm_bias,
                            .kind = c.norm,
                            .eps = c.norm_eps,
                            .residual_out = r.normalised,
                            .out = r.row.view(row)});
    return r;
}

void read_out_backward(const Pass& pass, const Tensor& tokens, const Row& r, const Tensor& drow, const Tensor& dtokens,
                       Params& dparams)
{
    const Config& c = pass.config;
    const Selection selection = pass.selection();
    Tensor djoined = drow;
    if (c.neck_reduction > 1) {
        const Shape row = r.normalised.shape;
        const Tensor dnarrow = pass.take(r.narrow.shape);
        djoined = pass.take(r.joined.shape);
        norm_backward(pass.ctx, {.x = r.normalised,
                                 .weight = pass.params.neck_norm_weight,
                                 .kind = c.norm,
                                 .eps = c.norm_eps,
                                 .dout = drow.view(row),
                                 .dresidual = pass.take_wide(row),
                                 .dh = dnarrow.view(row),
                                 .dweight = dparams.neck_norm_weight,
                                 .dbias = dparams.neck_norm_bias});
        const Shape separate{dnarrow.size(0), pass.dim};
        const LinearBackward neck{.x = r.joined.view(separate),
                                  .weight = pass.params.neck_weight,
                                  .dy = dnarrow,
                                  .dx = djoined.view(separate),
                                  .dweight = dparams.neck_weight};
        linear_backward(pass.ctx, {&neck, 1});
    }
    readout_backward(
        pass.ctx,
        {.reduce = selection.reduce, .places = selection.places, .x = tokens, .dout = djoined, .dx = dtokens});
}

void classify_backward(const Pass& pass, const Tensor& x, const Tensor& dy, const Tensor& dx, Params& dparams)
{
    if (pass.config.num_classes == 0) return backend_of(pass.ctx).copy(pass.ctx, dy, dx);
    const LinearBackward args{.x = x,
                              .weight = pass.params.head_weight,
                              .dy = dy,
                              .dx = dx,
                              .dweight = dparams.head_weight,
                              .dbias = dparams.head_bias};
    linear_backward(pass.ctx, {&args, 1});
}

}  // namespace

void classify(const Pass& pass, const Tensor& x, const Tensor& y)
{
    if (pass.config.num_classes == 0) return backend_of(pass.ctx).copy(pass.ctx, x, y);
    const LinearForward args{.x = x, .weight = pass.params.head_weight, .bias = pass.params.head_bias, .y = y};
    linear_forward(pass.ctx, {&args, 1});
}

void head_forward(const Pass& pass, const Tensor& tokens, const Tensor& logits)
{
    Arena::Scope scope(arena_of(pass.ctx));
    const Config& c = pass.config;
    if (!c.head_per_token()) {
        classify(pass, read_out(pass, tokens).row, logits);
    } else if (c.pool == Pool::all) {
        classify(pass, tokens, logits);
    } else {
        const Tensor all = pass.take({pass.batch, pass.len, c.outputs()});
        classify(pass, tokens, all);
        readout_forward(pass.ctx, {.reduce = Reduce::max, .x = all, .out = logits});
    }
}

void head_backward(const Pass& pass, const Tensor& tokens, const Tensor& dlogits, const Tensor& dtokens,
                   Params& dparams)
{
    Arena::Scope scope(arena_of(pass.ctx));
    const Config& c = pass.config;
    if (!c.head_per_token()) {
        const Row r = read_out(pass, tokens);
        const Tensor drow = pass.take(r.row.shape);
        classify_backward(pass, r.row, dlogits, drow, dparams);
        read_out_backward(pass, tokens, r, drow, dtokens, dparams);
    } else if (c.pool == Pool::all) {
        classify_backward(pass, tokens, dlogits, dtokens, dparams);
    } else {
        const Shape shape{pass.batch, pass.len, c.outputs()};
        Tensor x = tokens;
        if (c.num_classes > 0) {
            x = pass.take(shape);
            classify(pass, tokens, x);
        }
        const Tensor dx = pass.take(shape);
        readout_backward(pass.ctx, {.reduce = Reduce::max, .x = x, .dout = dlogits, .dx = dx});
        classify_backward(pass, tokens, dx, dtokens, dparams);
    }
}

}  // namespace vimcore
