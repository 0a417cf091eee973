// SPDX-License-Identifier: Apache-2.0
// The operators behind vimcore.ops. Outputs are allocated by the caller; shapes are checked by the operators.
#include "bindings.h"
#include "place.h"
#include "saved.h"

namespace vimcore::python {

namespace {

Norm to_norm(const std::string& kind)
{
    if (kind == "rms") return Norm::rms;
    if (kind == "layer") return Norm::layer;
    throw std::invalid_argument("[norm] kind: expected \"rms\" or \"layer\", got \"" + kind + "\"");
}

// ---- norm ----------------------------------------------------------------------------------------------------------

void norm_forward(const std::string& kind, double eps, const In& x, const MaybeIn& residual, const In& weight,
                  const MaybeIn& bias, const MaybeOut& residual_out, const Out& out, const Place& place)
{
    const char* op = kind == "layer" ? "layer_norm" : "rms_norm";
    NormForward a;
    a.kind = to_norm(kind);
    a.eps = eps;
    a.h = to_tensor(x, op, "x");
    a.residual = to_tensor(residual, op, "residual");
    a.weight = to_tensor(weight, op, "weight");
    a.bias = to_tensor(bias, op, "bias");
    a.residual_out = to_tensor(residual_out, op, "residual_out");
    a.out = to_tensor(out, op, "out");
    with_context(a.out.device, place, [&](Context& ctx) { vimcore::norm_forward(ctx, a); });
}

void norm_backward(const std::string& kind, double eps, const In& x, const In& weight, const In& dout,
                   const MaybeIn& dresidual_out, const Out& dresidual, const MaybeOut& dx, const MaybeOut& dweight,
                   const MaybeOut& dbias, const Place& place)
{
    const char* op = kind == "layer" ? "layer_norm" : "rms_norm";
    NormBackward a;
    a.kind = to_norm(kind);
    a.eps = eps;
    a.x = to_tensor(x, op, "x");
    a.weight = to_tensor(weight, op, "weight");
    a.dout = to_tensor(dout, op, "dout");
    a.dresidual_out = to_tensor(dresidual_out, op, "dresidual_out");
    a.dresidual = to_tensor(dresidual, op, "dresidual");
    a.dh = to_tensor(dx, op, "dx");
    a.dweight = to_tensor(dweight, op, "dweight");
    a.dbias = to_tensor(dbias, op, "dbias");
    with_context(a.x.device, place, [&](Context& ctx) { vimcore::norm_backward(ctx, a); });
}

// ---- convolution ---------------------------------------------------------------------------------------------------

void conv1d_forward(const In& x, const In& weight, const MaybeIn& bias, bool silu, bool reverse, const Out& u,
                    const Place& place)
{
    const char* op = "causal_conv1d";
    ConvForwardPass pass;
    pass.reverse = reverse;
    pass.weight = to_tensor(weight, op, "weight");
    pass.bias = to_tensor(bias, op, "bias");
    pass.u = to_tensor(u, op, "out");
    Conv1dForward a;
    a.x = to_tensor(x, op, "x");
    a.passes = {&pass, 1};
    a.silu = silu;
    with_context(a.x.device, place, [&](Context& ctx) { vimcore::conv1d_forward(ctx, a); });
}

void conv1d_backward(const In& x, const In& weight, const MaybeIn& bias, bool silu, bool reverse, const In& du,
                     const Out& dx, const MaybeOut& dweight, const MaybeOut& dbias, const Place& place)
{
    const char* op = "causal_conv1d";
    ConvBackwardPass pass;
    pass.reverse = reverse;
    pass.weight = to_tensor(weight, op, "weight");
    pass.bias = to_tensor(bias, op, "bias");
    pass.du = to_tensor(du, op, "dout");
    pass.dweight = to_tensor(dweight, op, "dweight");
    pass.dbias = to_tensor(dbias, op, "dbias");
    Conv1dBackward a;
    a.x = to_tensor(x, op, "x");
    a.passes = {&pass, 1};
    a.silu = silu;
    a.dx = to_tensor(dx, op, "dx");
    with_context(a.x.device, place, [&](Context& ctx) { vimcore::conv1d_backward(ctx, a); });
}

// ---- scan on its own -----------------------------------------------------------------------------------------------

// inputs: u, delta, A, B, C, then D, z, delta_bias or None
template <class Scan>
Scan selective(const std::vector<MaybeIn>& inputs, bool softplus, bool reverse, const Out& out)
{
    const char* op = "selective_scan";
    static const char* const names[] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias"};
    if (inputs.size() != 8) throw std::invalid_argument("[selective_scan] inputs: expected 8 arrays");
    Scan a;
    Tensor* const places[] = {&a.u, &a.delta, &a.A, &a.Bm, &a.Cm, &a.D, &a.z, &a.delta_bias};
    for (std::size_t i = 0; i < 8; i++) *places[i] = to_tensor(inputs[i], op, names[i]);
    a.delta_softplus = softplus;
    a.reverse = reverse;
    a.out = to_tensor(out, op, "out");
    return a;
}

void selective_scan_forward(const std::vector<MaybeIn>& inputs, bool softplus, bool reverse, const Out& out,
                            const Place& place)
{
    const auto a = selective<SelectiveScanForward>(inputs, softplus, reverse, out);
    with_context(a.out.device, place, [&](Context& ctx) { vimcore::selective_scan_forward(ctx, a); });
}

void selective_scan_backward(const std::vector<MaybeIn>& inputs, bool softplus, bool reverse, const Out& out,
                             const In& dout, const std::vector<MaybeOut>& gradients, const Place& place)
{
    const char* op = "selective_scan";
    if (gradients.size() != 8) throw std::invalid_argument("[selective_scan] gradients: expected 8 arrays");
    auto a = selective<SelectiveScanBackward>(inputs, softplus, reverse, out);
    a.dout = to_tensor(dout, op, "dout");
    Tensor* const places[] = {&a.du, &a.ddelta, &a.dA, &a.dB, &a.dC, &a.dD, &a.dz, &a.ddelta_bias};
    for (std::size_t i = 0; i < 8; i++) *places[i] = to_tensor(gradients[i], op, "gradient");
    with_context(a.out.device, place, [&](Context& ctx) { vimcore::selective_scan_backward(ctx, a); });
}

// ---- both directions, with dt projection, skip, sum and gate -------------------------------------------------------

// Arrays of one direction: u, q, A_log, D, dt_weight, dt_bias, and its checkpoints; in backward also `gradients`:
// du, dq, dA_log, dD, ddt_weight, ddt_bias.
template <class Pass>
Pass to_pass(const std::vector<MaybeIn>& inputs, const std::vector<MaybeOut>& outputs, std::size_t gradients,
             bool reverse)
{
    const char* op = "bidirectional_scan";
    static const char* const names[] = {"u", "q", "A_log", "D", "dt_weight", "dt_bias"};
    if (inputs.size() != 6 || outputs.size() != 1 + gradients)
        throw std::invalid_argument("[bidirectional_scan] inputs: expected 6 arrays a direction");
    Pass pass;
    pass.reverse = reverse;
    Tensor* const places[] = {&pass.u, &pass.q, &pass.A_log, &pass.D, &pass.dt_weight, &pass.dt_bias};
    for (std::size_t i = 0; i < 6; i++) *places[i] = to_tensor(inputs[i], op, names[i]);
    pass.checkpoints = to_tensor(outputs[0], op, "checkpoints");
    return pass;
}

ScanBackwardPass to_backward_pass(const std::vector<MaybeIn>& inputs, const std::vector<MaybeOut>& outputs,
                                  bool reverse)
{
    auto pass = to_pass<ScanBackwardPass>(inputs, outputs, 6, reverse);
    Tensor* const gradients[] = {&pass.du, &pass.dq, &pass.dA_log, &pass.dD, &pass.ddt_weight, &pass.ddt_bias};
    for (std::size_t i = 0; i < 6; i++) *gradients[i] = to_tensor(outputs[i + 1], "bidirectional_scan", "gradient");
    return pass;
}

void scan_forward(const In& xz, const std::vector<std::vector<MaybeIn>>& inputs,
                  const std::vector<std::vector<MaybeOut>>& outputs, double scale, std::int64_t chunk, const Out& out,
                  const Place& place)
{
    if (inputs.size() != 2 || outputs.size() != 2)
        throw std::invalid_argument("[bidirectional_scan] inputs: expected two directions");
    ScanForwardPass passes[] = {to_pass<ScanForwardPass>(inputs[0], outputs[0], 0, false),
                                to_pass<ScanForwardPass>(inputs[1], outputs[1], 0, true)};
    passes[0].finish = false;
    passes[1].add = true;  // the second direction adds to the first and finishes
    ScanForward a;
    a.xz = to_tensor(xz, "bidirectional_scan", "z");
    a.passes = passes;
    a.scale = scale;
    a.chunk = chunk;
    a.out = to_tensor(out, "bidirectional_scan", "out");
    with_context(a.out.device, place, [&](Context& ctx) { vimcore::scan_forward(ctx, a); });
}

void scan_backward(const In& xz, const std::vector<std::vector<MaybeIn>>& inputs,
                   const std::vector<std::vector<MaybeOut>>& outputs, double scale, std::int64_t chunk, const Out& out,
                   const In& dout, const Out& dxz, const Place& place)
{
    if (inputs.size() != 2 || outputs.size() != 2)
        throw std::invalid_argument("[bidirectional_scan] inputs: expected two directions");
    const ScanBackwardPass passes[] = {to_backward_pass(inputs[0], outputs[0], false),
                                       to_backward_pass(inputs[1], outputs[1], true)};
    ScanBackward a;
    a.xz = to_tensor(xz, "bidirectional_scan", "z");
    a.passes = passes;
    a.scale = scale;
    a.chunk = chunk;
    a.out = to_tensor(out, "bidirectional_scan", "out");
    a.dout = to_tensor(dout, "bidirectional_scan", "dout");
    a.dxz = to_tensor(dxz, "bidirectional_scan", "dxz");
    with_context(a.out.device, place, [&](Context& ctx) { vimcore::scan_backward(ctx, a); });
}

// ---- one block -----------------------------------------------------------------------------------------------------

// Points the parameters of a block at arrays in state-dict order.
template <class Array>
BlockParams to_block_params(const BlockConfig& config, const std::vector<Array>& arrays, bool gradients)
{
    BlockParams params;
    std::size_t index = 0;
    for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
        if (index == arrays.size()) throw std::invalid_argument("[vim_block] " + name + ": missing");
        tensor = to_tensor(arrays[index++], "vim_block", (gradients ? "gradient of " : "") + name);
        if (tensor && !(tensor.shape == shape))
            throw std::invalid_argument("[vim_block] " + name + ": expected " + to_string(shape) + ", got " +
                                        describe(tensor));
    });
    return params;
}

// Of `config` the sizes and options of a block count.
void block_forward(const Config& config, const std::vector<In>& parameters, const In& x, const MaybeIn& residual,
                   bool reverse, const Out& residual_out, const Out& out, SavedHandle* saved, const Place& place)
{
    const BlockParams params = to_block_params(config, parameters, false);
    Block block;
    block.h = to_tensor(x, "vim_block", "x");
    block.residual = to_tensor(residual, "vim_block", "residual");
    block.reverse = reverse;
    block.residual_out = to_tensor(residual_out, "vim_block", "residual_out");
    block.out = to_tensor(out, "vim_block", "out");
    with_context(block.out.device, place, [&](Context& ctx) {
        if (saved) (**saved).prepare_block(config, block.out.shape, block.out.dtype, block.out.device);
        vimcore::block_forward(ctx, config, params, block, saved ? &(**saved).blocks[0] : nullptr);
    });
}

// residual_out: the forward's. dresidual: of the residual, and of x beside it; dx: of x in the type of activations, or
// None. gradients: one per parameter, added to, or None.
void block_backward(const Config& config, const std::vector<In>& parameters, const In& residual_out, bool reverse,
                    const Kept& kept, const In& dout, const MaybeIn& dresidual_out, const Out& dresidual,
                    const MaybeOut& dx, const std::vector<MaybeOut>& gradients, const Place& place)
{
    const BlockParams params = to_block_params(config, parameters, false);
    BlockParams dparams = to_block_params(config, gradients, true);
    Block block;
    block.reverse = reverse;
    BlockGradients g;
    g.dout = to_tensor(dout, "vim_block", "dout");
    BlockSaved saved = kept.saved(g.dout, "vim_block",
                                  [&](Saved& at, void* data, std::size_t bytes) {
                                      at.attach_block(config, g.dout.shape, g.dout.dtype, g.dout.device, data, bytes);
                                  })
                           .blocks.at(0);
    saved.residual = to_tensor(residual_out, "vim_block", "residual_out");
    g.dresidual_out = to_tensor(dresidual_out, "vim_block", "dresidual_out");
    g.dresidual = to_tensor(dresidual, "vim_block", "dresidual");
    g.dh = to_tensor(dx, "vim_block", "dx");
    with_context(g.dout.device, place,
                 [&](Context& ctx) { vimcore::block_backward(ctx, config, params, block, saved, g, dparams); });
}

}  // namespace

void bind_ops(nb::module_& m)
{
    m.def("norm_forward", &norm_forward, nb::arg("kind"), nb::arg("eps"), nb::arg("x").noconvert(),
          nb::arg("residual").noconvert().none(), nb::arg("weight").noconvert(), nb::arg("bias").noconvert().none(),
          nb::arg("residual_out").noconvert().none(), nb::arg("out").noconvert(), nb::arg("place"));
    m.def("norm_backward", &norm_backward, nb::arg("kind"), nb::arg("eps"), nb::arg("x").noconvert(),
          nb::arg("weight").noconvert(), nb::arg("dout").noconvert(), nb::arg("dresidual_out").noconvert().none(),
          nb::arg("dresidual").noconvert(), nb::arg("dx").noconvert().none(), nb::arg("dweight").noconvert().none(),
          nb::arg("dbias").noconvert().none(), nb::arg("place"));
    m.def("conv1d_forward", &conv1d_forward, nb::arg("x").noconvert(), nb::arg("weight").noconvert(),
          nb::arg("bias").noconvert().none(), nb::arg("silu"), nb::arg("reverse"), nb::arg("out").noconvert(),
          nb::arg("place"));
    m.def("conv1d_backward", &conv1d_backward, nb::arg("x").noconvert(), nb::arg("weight").noconvert(),
          nb::arg("bias").noconvert().none(), nb::arg("silu"), nb::arg("reverse"), nb::arg("dout").noconvert(),
          nb::arg("dx").noconvert(), nb::arg("dweight").noconvert().none(), nb::arg("dbias").noconvert().none(),
          nb::arg("place"));
    m.def("selective_scan_forward", &selective_scan_forward, nb::arg("inputs").noconvert(), nb::arg("delta_softplus"),
          nb::arg("reverse"), nb::arg("out").noconvert(), nb::arg("place"));
    m.def("selective_scan_backward", &selective_scan_backward, nb::arg("inputs").noconvert(), nb::arg("delta_softplus"),
          nb::arg("reverse"), nb::arg("out").noconvert(), nb::arg("dout").noconvert(), nb::arg("gradients").noconvert(),
          nb::arg("place"));
    m.def("scan_forward", &scan_forward, nb::arg("xz").noconvert(), nb::arg("inputs").noconvert(),
          nb::arg("outputs").noconvert(), nb::arg("scale"), nb::arg("chunk"), nb::arg("out").noconvert(),
          nb::arg("place"));
    m.def("scan_backward", &scan_backward, nb::arg("xz").noconvert(), nb::arg("inputs").noconvert(),
          nb::arg("outputs").noconvert(), nb::arg("scale"), nb::arg("chunk"), nb::arg("out").noconvert(),
          nb::arg("dout").noconvert(), nb::arg("dxz").noconvert(), nb::arg("place"));
    m.def("block_forward", &block_forward, nb::arg("config"), nb::arg("parameters").noconvert(),
          nb::arg("x").noconvert(), nb::arg("residual").noconvert().none(), nb::arg("reverse"),
          nb::arg("residual_out").noconvert(), nb::arg("out").noconvert(), nb::arg("saved").none(), nb::arg("place"));
    m.def("block_backward", &block_backward, nb::arg("config"), nb::arg("parameters").noconvert(),
          nb::arg("residual_out").noconvert(), nb::arg("reverse"), nb::arg("kept"), nb::arg("dout").noconvert(),
          nb::arg("dresidual_out").noconvert().none(), nb::arg("dresidual").noconvert(),
          nb::arg("dx").noconvert().none(), nb::arg("gradients").noconvert(), nb::arg("place"));
}

}  // namespace vimcore::python
