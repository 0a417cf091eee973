// SPDX-License-Identifier: Apache-2.0
// Checks every argument once, then hands over to the backend of the context.
#include "vimcore/ops.h"

#include <stdexcept>

#include "core/argument_check.h"
#include "core/backend.h"
#include "core/class_places.h"

namespace vimcore {

namespace {

// The shape of `tensor` with its last axis replaced.
Shape with_last(const Tensor& tensor, std::int64_t last) { return tensor.shape.with(-1, last); }

}  // namespace

void norm_forward(Context& ctx, const NormForward& a)
{
    Check check(ctx, "norm", "out", a.out);
    check.rank("out", a.out, 3);
    const Shape x = a.out.shape, vector{x[2]};
    if (!a.h && !a.residual) check.fail("h", "expected h or residual, got neither");
    check.optional("h", a.h, x).optional_wide("residual", a.residual, x);
    check.optional_wide("residual_out", a.residual_out, x).optional_wide("row_scale", a.row_scale, {x[0]});
    check.required_wide("weight", a.weight, vector).optional_wide("bias", a.bias, vector);
    if (x.numel()) backend_of(ctx).norm_forward(ctx, a);
}

void norm_backward(Context& ctx, const NormBackward& a)
{
    Check check(ctx, "norm backward", "dout", a.dout);
    check.rank("x", a.x, 3);
    const Shape x = a.x.shape, vector{x[2]};
    check.required_wide("x", a.x, x).required("dout", a.dout, x).optional("dh", a.dh, x);
    check.required_wide("dresidual", a.dresidual, x).optional_wide("dresidual_out", a.dresidual_out, x);
    check.optional_wide("row_scale", a.row_scale, {x[0]}).required_wide("weight", a.weight, vector);
    check.optional_wide("dweight", a.dweight, vector).optional_wide("dbias", a.dbias, vector);
    if (x.numel()) backend_of(ctx).norm_backward(ctx, a);
}

void linear_forward(Context& ctx, std::span<const LinearForward> args)
{
    for (const LinearForward& a : args) {
        Check check(ctx, "linear", "x", a.x);
        check.rank("weight", a.weight, 2);
        const std::int64_t outputs = a.weight.size(0);
        check.required("x", a.x, with_last(a.x, a.weight.size(1)));
        check.required("y", a.y, with_last(a.x, check.row_of(a.y, outputs)));
        check.linear_weight(a.weight).optional_wide("bias", a.bias, {outputs});
    }
    backend_of(ctx).linear_forward(ctx, args);
}

void linear_backward(Context& ctx, std::span<const LinearBackward> args)
{
    for (const LinearBackward& a : args) {
        Check check(ctx, "linear backward", "dy", a.dy);
        const Tensor& rows = a.dx ? a.weight : a.dweight;  // as many as dy has columns
        std::int64_t outputs = a.dy.shape[-1];
        if (!a.dbias && rows.shape.rank() == 2 && check.row_of(a.dy, rows.size(0)) == outputs) outputs = rows.size(0);
        if (a.dx) {
            check.rank("weight", a.weight, 2);
            check.required_wide("weight", a.weight, {outputs, a.weight.size(1)});
            check.required("dx", a.dx, with_last(a.dy, a.weight.size(1)));
        }
        if (a.dweight) {
            check.rank("dweight", a.dweight, 2);
            check.required_wide("dweight", a.dweight, {outputs, a.dweight.size(1)});
            check.required("x", a.x, with_last(a.dy, a.dweight.size(1)));
        }
        check.optional_wide("dbias", a.dbias, {outputs});
    }
    backend_of(ctx).linear_backward(ctx, args);
}

namespace {

// What both passes of a convolution share: x, weights, and u or du of `tokens` from `begin` on.
template <class Pass>
void check_conv_pass(const Check& check, const Tensor& x, const Pass& p, const char* name, const Tensor& u,
                     std::int64_t begin)
{
    check.rank(name, u, 3);
    const std::int64_t dim = u.size(2), tokens = u.size(1);
    const std::int64_t width = dim > 0 ? p.weight.numel() / dim : 0;
    check.positive("weight", width);
    check.required_wide("weight", p.weight, p.weight.shape.rank() == 3 ? Shape{dim, 1, width} : Shape{dim, width});
    check.optional_wide("bias", p.bias, {dim}).required(name, u, {x.size(0), tokens, dim});
    if (dim > x.size(2)) check.fail("x", "expected at least " + std::to_string(dim) + " columns, got " + describe(x));
    if (begin < 0 || begin + tokens > x.size(1)) check.fail(name, "tokens reach beyond x, " + describe(x));
}

// What both passes of a scan share.
template <class Pass>
void check_scan_pass(const Check& check, const Tensor& xz, const Pass& p, std::int64_t begin, std::int64_t chunk,
                     bool checkpoints)
{
    const std::int64_t batch = xz.size(0), len = xz.size(1), inner = xz.size(2) / 2;
    check.rank("A_log", p.A_log, 2);
    check.rank("dt_weight", p.dt_weight, 2);
    check.rank("u", p.u, 3);
    const std::int64_t state = p.A_log.size(1), rank = p.dt_weight.size(1), tokens = p.u.size(1);
    check.positive("d_state", state);
    check.positive("dt_rank", rank);
    check.required_wide("A_log", p.A_log, {inner, state}).required_wide("D", p.D, {inner});
    check.required_wide("dt_weight", p.dt_weight, {inner, rank}).required_wide("dt_bias", p.dt_bias, {inner});
    check.required("u", p.u, {batch, tokens, inner})
        .required("q", p.q, {batch, tokens, check.row_of(p.q, rank + 2 * state)});
    if (begin < 0 || begin + tokens > len) check.fail("u", "tokens reach beyond xz, " + describe(xz));
    if (!checkpoints) return;
    check.positive("chunk", chunk);
    check.required_wide("checkpoints", p.checkpoints, {batch, (len + chunk - 1) / chunk, state, inner});
}

template <class Scan>
void check_sequence(const Check& check, const Scan& a)
{
    check.rank("xz", a.xz, 3);
    const std::int64_t batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    check.required("out", a.out, {batch, len, inner}).required("xz", a.xz, {batch, len, 2 * inner});
}

template <class Scan>
void check_selective_scan(const Check& check, const Scan& a)
{
    check.rank("u", a.u, 3);
    check.rank("A", a.A, 2);
    const Shape x = a.u.shape, vector{x[2]}, A{x[2], a.A.size(1)}, B{x[0], x[1], a.A.size(1)};
    check.positive("A", a.A.size(1));
    check.required("u", a.u, x).required("delta", a.delta, x).required_wide("A", a.A, A);
    check.required("B", a.Bm, B).required("C", a.Cm, B).required("out", a.out, x);
    check.optional_wide("D", a.D, vector).optional("z", a.z, x).optional_wide("delta_bias", a.delta_bias, vector);
}

void check_patches(Context& ctx, const Patches& a)
{
    Check check(ctx, "patches", "cols", a.cols);
    check.rank("images", a.images, 4);
    check.rank("cols", a.cols, 3);
    check.positive("patch", a.patch);
    check.positive("stride", a.stride);
    const std::int64_t height = a.images.size(2), width = a.images.size(3);
    if (height < a.patch || width < a.patch)
        check.fail("images",
                   "expected at least " + std::to_string(a.patch) + " pixels a side, got " + describe(a.images));
    const std::int64_t total = ((height - a.patch) / a.stride + 1) * ((width - a.patch) / a.stride + 1);
    if (ctx.device().type == Device::Type::cpu)
        check.either("images", a.images, a.images.shape);
    else
        check.required("images", a.images, a.images.shape);
    check.required("cols", a.cols, {a.images.size(0), a.cols.size(1), a.images.size(1) * a.patch * a.patch});
    if (a.begin < 0 || a.begin + a.cols.size(1) > total)
        check.fail("cols", "rows reach beyond the " + std::to_string(total) + " patches of " + describe(a.images));
}

// Whether these places are among the `len` rows of a tensor.
void check_places(const Check& check, const ClassPlaces& places, std::int64_t len)
{
    const bool within = places.first >= 0 && places.first < len && places.step > 0 && places.count <= len &&
                        (places.count == 1 || (len - 1 - places.first) / places.step >= places.count - 1);
    if (places.count != 0 && (places.count < 0 || !within))
        check.fail("places", std::to_string(places.count) + " from " + std::to_string(places.first) + " in steps of " +
                                 std::to_string(places.step) + " do not fit " + std::to_string(len) + " tokens");
}

// Checks where class tokens stand in `out`, or its gradient; the shape of the patches beside them.
Shape check_tokens(const Check& check, const ClassPlaces& places, const Tensor& out)
{
    check.rank("out", out, 3);
    check_places(check, places, out.size(1));
    return {out.size(0), out.size(1) - places.count, out.size(2)};
}

void check_class_tokens(const Check& check, const Tensor (&tokens)[2], const ClassPlaces& places, std::int64_t dim)
{
    const std::int64_t first = held_by_first(tokens);
    check.optional_wide("class_token", tokens[0], {1, first, dim}).optional_wide("class_token", tokens[1], {1, 1, dim});
    if (first + (tokens[1] ? 1 : 0) > places.count)
        check.fail("class_token", "expected " + std::to_string(places.count) + ", got more");
}

// Tables of positions, or their gradients, of which some may be none.
void check_positions(Context& ctx, const Tensor& out, const Tensor& table, const Tensor& class_rows,
                     const Tensor& frame_rows, const TableResize& r)
{
    Check check(ctx, "positions", "out", out);
    if (wide(out.dtype) != out.dtype) check.fail("out", "expected a wide type, got " + describe(out));
    check.rank("out", out, 3);
    for (const std::int64_t side : {r.from.rows, r.from.columns, r.to.rows, r.to.columns, r.frames})
        check.positive("grid", side);
    const std::int64_t rows = r.from.count() + r.from_class.count, dim = out.size(2);
    check.required("out", out, {1, r.frames * r.to.count() + r.to_class.count, dim});
    check.optional("table", table, {1, rows, dim}).optional("frame_rows", frame_rows, {1, r.frames, dim});
    check.optional("class_rows", class_rows, {1, r.to_class.count, dim});
    check_places(check, r.from_class, rows);
    check_places(check, r.to_class, out.size(1));
    if (r.from_class.count != r.to_class.count && r.from_class.count != 0)
        check.fail("class tokens", "expected as many in both tables, or a table of their own");
}

void check_readout(const Check& check, Reduce reduce, const ClassPlaces& places, const Tensor& row, const Tensor& x)
{
    check.rank("x", x, 3);
    const std::int64_t joined = reduce == Reduce::join ? places.count : 1;
    check.required("x", x, x.shape).required("out", row, {x.size(0), joined * x.size(2)});
    check.positive("tokens", x.size(1));
    if (reduce != Reduce::select && reduce != Reduce::join) return;
    check.positive("places", places.count);
    check_places(check, places, x.size(1));
}

}  // namespace

void conv1d_forward(Context& ctx, const Conv1dForward& a)
{
    const Check check(ctx, "conv1d", "x", a.x);
    check.rank("x", a.x, 3);
    for (const ConvForwardPass& p : a.passes) check_conv_pass(check, a.x, p, "u", p.u, p.begin);
    backend_of(ctx).conv1d_forward(ctx, a);
}

void conv1d_backward(Context& ctx, const Conv1dBackward& a)
{
    const Check check(ctx, "conv1d backward", "x", a.x);
    check.rank("x", a.x, 3);
    check.required("dx", a.dx, a.x.shape);
    for (const ConvBackwardPass& p : a.passes) {
        check_conv_pass(check, a.x, p, "du", p.du, 0);
        if (p.du.size(1) != a.x.size(1))
            check.fail("du", "backward takes the whole sequence of " + std::to_string(a.x.size(1)) + " tokens");
        check.optional_wide("dbias", p.dbias, {p.du.size(2)}).optional_wide("dweight", p.dweight, p.weight.shape);
    }
    backend_of(ctx).conv1d_backward(ctx, a);
}

void scan_forward(Context& ctx, const ScanForward& a)
{
    const Check check(ctx, "scan", "xz", a.xz);
    check_sequence(check, a);
    for (const ScanForwardPass& p : a.passes) {
        check_scan_pass(check, a.xz, p, p.begin, a.chunk, static_cast<bool>(p.checkpoints));
        check.optional_wide("state", p.state, {a.xz.size(0), p.A_log.size(1), a.out.size(2)});
    }
    backend_of(ctx).scan_forward(ctx, a);
}

void scan_backward(Context& ctx, const ScanBackward& a)
{
    const Check check(ctx, "scan backward", "xz", a.xz);
    check_sequence(check, a);
    check.required("dout", a.dout, a.out.shape).required("dxz", a.dxz, a.xz.shape);
    for (const ScanBackwardPass& p : a.passes) {
        check_scan_pass(check, a.xz, p, 0, a.chunk, true);
        if (p.u.size(1) != a.xz.size(1))
            check.fail("u", "backward takes the whole sequence of " + std::to_string(a.xz.size(1)) + " tokens");
        check.required("du", p.du, p.u.shape).required("dq", p.dq, p.q.shape);
        check.optional_wide("dA_log", p.dA_log, p.A_log.shape).optional_wide("dD", p.dD, p.D.shape);
        check.optional_wide("ddt_weight", p.ddt_weight, p.dt_weight.shape);
        check.optional_wide("ddt_bias", p.ddt_bias, p.dt_bias.shape);
    }
    backend_of(ctx).scan_backward(ctx, a);
}

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a)
{
    check_selective_scan(Check(ctx, "selective_scan", "u", a.u), a);
    backend_of(ctx).selective_scan_forward(ctx, a);
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackward& a)
{
    const Check check(ctx, "selective_scan backward", "u", a.u);
    check_selective_scan(check, a);
    const Shape &x = a.u.shape, vector{x[2]};
    check.required("dout", a.dout, x).required("du", a.du, x).required("ddelta", a.ddelta, x);
    check.required_wide("dA", a.dA, a.A.shape).required("dB", a.dB, a.Bm.shape).required("dC", a.dC, a.Cm.shape);
    if (a.D) check.required_wide("dD", a.dD, vector);
    if (a.z) check.required("dz", a.dz, x);
    if (a.delta_bias) check.required_wide("ddelta_bias", a.ddelta_bias, vector);
    backend_of(ctx).selective_scan_backward(ctx, a);
}

void patches_forward(Context& ctx, const Patches& args)
{
    check_patches(ctx, args);
    backend_of(ctx).patches_forward(ctx, args);
}

void patches_backward(Context& ctx, const Patches& args)
{
    check_patches(ctx, args);
    backend_of(ctx).patches_backward(ctx, args);
}

void tokens_forward(Context& ctx, const TokensForward& a)
{
    const Check check(ctx, "tokens", "out", a.out);
    const Shape patches = check_tokens(check, a.places, a.out), x = a.out.shape;
    check_class_tokens(check, a.class_token, a.places, x[2]);
    if (held_by_first(a.class_token) + (a.class_token[1] ? 1 : 0) != a.places.count)
        check.fail("class_token", "expected " + std::to_string(a.places.count) + ", got fewer");
    check.required("patches", a.patches, patches).required("out", a.out, x).optional_wide("dropout", a.dropout, x);
    check.optional_wide("pos_embed", a.pos_embed, {1, x[1], x[2]});
    backend_of(ctx).tokens_forward(ctx, a);
}

void tokens_backward(Context& ctx, const TokensBackward& a)
{
    const Check check(ctx, "tokens backward", "dout", a.dout);
    const Shape patches = check_tokens(check, a.places, a.dout), x = a.dout.shape;
    check_class_tokens(check, a.dclass_token, a.places, x[2]);
    check.required("dpatches", a.dpatches, patches).required("dout", a.dout, x);
    check.optional_wide("dropout", a.dropout, x).optional_wide("dpos_embed", a.dpos_embed, {1, x[1], x[2]});
    backend_of(ctx).tokens_backward(ctx, a);
}

void positions_forward(Context& ctx, const PositionsForward& args)
{
    const auto& [table, class_rows, frame_rows, out, resize] = args;
    check_positions(ctx, out, table, class_rows, frame_rows, resize);
    if (!table || (resize.from_class.count < resize.to_class.count && !class_rows))
        throw std::invalid_argument("[positions] table: expected one, and one of the class tokens, got none");
    backend_of(ctx).positions_forward(ctx, args);
}

void positions_backward(Context& ctx, const PositionsBackward& args)
{
    check_positions(ctx, args.dout, args.dtable, args.dclass_rows, args.dframe_rows, args.resize);
    backend_of(ctx).positions_backward(ctx, args);
}

void rope(Context& ctx, const Rope& args)
{
    Check check(ctx, "rope", "x", args.x);
    check.rank("x", args.x, 3);
    const Shape table{args.x.size(1) - args.skip, args.x.size(2)};
    check.required_wide("cos", args.cos, table).required_wide("sin", args.sin, table);
    backend_of(ctx).rope(ctx, args);
}

void readout_forward(Context& ctx, const ReadoutForward& a)
{
    check_readout(Check(ctx, "readout", "x", a.x), a.reduce, a.places, a.out, a.x);
    backend_of(ctx).readout_forward(ctx, a);
}

void readout_backward(Context& ctx, const ReadoutBackward& a)
{
    const Check check(ctx, "readout", "x", a.dx);
    check_readout(check, a.reduce, a.places, a.dout, a.dx);
    if (a.reduce == Reduce::max) check.required("x", a.x, a.dx.shape);
    backend_of(ctx).readout_backward(ctx, a);
}

void add(Context& ctx, const Add& args)
{
    const auto& [a, b, out, row_scale] = args;
    const bool narrow = out.dtype != wide(out.dtype);
    Check check(ctx, "add", "out", narrow ? out : b);
    check.rank("out", out, 3);
    check.either("out", out, out.shape).either("a", a, out.shape).either("b", b, out.shape);
    check.optional_wide("row_scale", row_scale, {out.size(0)});
    backend_of(ctx).add(ctx, args);
}

}  // namespace vimcore
