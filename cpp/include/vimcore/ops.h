// SPDX-License-Identifier: Apache-2.0
// The operators of Vision Mamba, forward and backward. Each call checks types, shapes and devices once, then runs on
// the context's backend. Gradients of parameters are added to; gradients of activations are overwritten.
// Sizes: B batch, L tokens, D width, E inner width, N state, R dt rank, K conv width. All tensors are channel-last.
// A tensor marked "or none" may be left out.
// Types: activations are f32, f64 or bf16 on the CPU; f32, f16 or bf16 on CUDA. Parameters and their gradients, the
// residual stream and its gradient, row_scale, dropout, tables and scan states are wide(that type): never below f32.
#pragma once

#include <cstdint>
#include <span>

#include "vimcore/config.h"
#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// ---- residual add and normalisation --------------------------------------------------------------------------------
// x = residual + scale[b] h;  out = weight * (x - mean) * rstd + bias, mean = 0 and no bias for Norm::rms.
struct NormForward {
    Tensor h = {};          // (B, L, D) or none
    Tensor row_scale = {};  // (B) drop-path factor of h, or none
    Tensor residual = {};   // (B, L, D) or none
    Tensor weight;          // (D)
    Tensor bias = {};       // (D) or none
    Norm kind = Norm::rms;
    double eps = 1e-5;
    Tensor residual_out = {};  // (B, L, D): x, or none; may be the memory of `residual`
    Tensor out;                // (B, L, D)
};
void norm_forward(Context& ctx, const NormForward& args);

// Statistics are recomputed from x.
struct NormBackward {
    Tensor x;               // (B, L, D) the forward's residual_out
    Tensor row_scale = {};  // (B) or none
    Tensor weight;          // (D)
    Norm kind = Norm::rms;
    double eps = 1e-5;
    Tensor dout;                      // (B, L, D)
    Tensor dresidual_out = {};        // (B, L, D) gradient that arrives on residual_out, or none
    Tensor dresidual;                 // (B, L, D) out, may be the memory of dresidual_out
    Tensor dh = {};                   // (B, L, D) out: row_scale[b] * dresidual, or none
    Tensor dweight = {}, dbias = {};  // (D) added to, or none
};
void norm_backward(Context& ctx, const NormBackward& args);

// ---- projections ---------------------------------------------------------------------------------------------------
// y = x W^T + bias. Several independent projections run as one parallel region. In 16-bit types on CUDA the rows of y
// and dy may be padded to the next multiple of 8 elements: forward writes zeros there, backward wants zeros there.
struct LinearForward {
    Tensor x;          // (..., K)
    Tensor weight;     // (N, K)
    Tensor bias = {};  // (N) or none
    Tensor y;          // (..., N), or padded
};
void linear_forward(Context& ctx, std::span<const LinearForward> args);

struct LinearBackward {
    Tensor x = {};               // (..., K), needed for dweight
    Tensor weight = {};          // (N, K), needed for dx
    Tensor dy;                   // (..., N), or padded where dbias is none
    Tensor dx = {};              // (..., K) overwritten, or none
    bool accumulate_dx = false;  // add to dx instead
    Tensor dweight = {};         // (N, K) added to, or none
    Tensor dbias = {};           // (N) added to, or none
};
void linear_backward(Context& ctx, std::span<const LinearBackward> args);

// ---- depthwise causal convolution + SiLU ---------------------------------------------------------------------------
// forward: u[t] = silu(bias + sum_k w[k] x[t - K + 1 + k]);  reverse: u[t] = silu(bias + sum_k w[k] x[t + K - 1 - k]).
// x is the first E columns of rows of `stride` elements, so that it can be half of in_proj's output.
struct ConvForwardPass {
    bool reverse = false;
    Tensor weight;           // (E, 1, K) or (E, K)
    Tensor bias = {};        // (E) or none
    std::int64_t begin = 0;  // first token of u within x
    Tensor u;                // (B, T, E) out
};
struct Conv1dForward {
    Tensor x;  // (B, L, stride), stride >= E
    std::span<const ConvForwardPass> passes;
    bool silu = true;
};
void conv1d_forward(Context& ctx, const Conv1dForward& args);

struct ConvBackwardPass {
    bool reverse = false;
    Tensor weight, bias = {};         // as in forward
    Tensor du;                        // (B, L, E)
    Tensor dweight = {}, dbias = {};  // added to, or none
};
struct Conv1dBackward {
    Tensor x;  // (B, L, stride)
    std::span<const ConvBackwardPass> passes;
    bool silu = true;
    Tensor dx;  // (B, L, stride), first E columns overwritten
};
void conv1d_backward(Context& ctx, const Conv1dBackward& args);

// ---- bidirectional selective scan, with dt projection, skip, sum of directions and gate ----------------------------
// delta = softplus(dt_weight q[:R] + dt_bias);  h[t] = exp(delta A) h[t-1] + delta u B;  y = C h + D u;
// out = scale (y_forward + y_reverse) silu(z), where q = [dt (R) | B (N) | C (N)] and A = -exp(A_log).
struct ScanForwardPass {
    bool reverse = false;
    Tensor u;                 // (B, T, E)
    Tensor q;                 // (B, T, R + 2N), or with rows padded as those of a projection
    Tensor A_log;             // (E, N)
    Tensor D;                 // (E)
    Tensor dt_weight;         // (E, R)
    Tensor dt_bias;           // (E)
    std::int64_t begin = 0;   // first of the T tokens within the sequence
    Tensor state = {};        // (B, N, E) in and out: state before / after these tokens, or none (starts at zero)
    bool add = false;         // add to what `out` holds (the other direction's y)
    bool finish = true;       // apply scale and gate to the sum
    Tensor checkpoints = {};  // (B, chunks, N, E) states on entry of every chunk, or none
};
struct ScanForward {
    Tensor xz;  // (B, L, 2E), z in the second half
    std::span<const ScanForwardPass> passes;
    double scale = 1.0;
    std::int64_t chunk = 0;  // tokens between checkpoints
    Tensor out;              // (B, L, E)
};
void scan_forward(Context& ctx, const ScanForward& args);

struct ScanBackwardPass {
    bool reverse = false;
    Tensor u, q, A_log, D, dt_weight, dt_bias;                    // as in forward, T = L
    Tensor checkpoints;                                           // that forward wrote
    Tensor du, dq;                                                // like u and q, out; zeros where q is padded
    Tensor dA_log = {}, dD = {}, ddt_weight = {}, ddt_bias = {};  // added to, or none
};
struct ScanBackward {
    Tensor xz;  // (B, L, 2E)
    std::span<const ScanBackwardPass> passes;
    double scale = 1.0;
    std::int64_t chunk = 0;
    Tensor out;   // (B, L, E) written: forward's output, computed again
    Tensor dout;  // (B, L, E)
    Tensor dxz;   // (B, L, 2E), second half written with dz
};
void scan_backward(Context& ctx, const ScanBackward& args);

// ---- the scan on its own, textbook arguments -----------------------------------------------------------------------
// A is meant to be negative. Where delta A log2(e) exceeds 127 the state has no float32 value, and what comes out is
// unspecified (inf or a finite number, by instruction set).
struct SelectiveScanForward {
    Tensor u, delta;                         // (B, L, E)
    Tensor A;                                // (E, N)
    Tensor Bm, Cm;                           // (B, L, N)
    Tensor D = {}, z = {}, delta_bias = {};  // (E), (B, L, E), (E), each or none
    bool delta_softplus = false, reverse = false;
    Tensor out;  // (B, L, E)
};
void selective_scan_forward(Context& ctx, const SelectiveScanForward& args);

struct SelectiveScanBackward {
    Tensor u, delta, A, Bm, Cm, D = {}, z = {}, delta_bias = {};  // as in forward
    bool delta_softplus = false, reverse = false;
    Tensor out;                                 // (B, L, E) written: forward's output, computed again
    Tensor dout;                                // (B, L, E)
    Tensor du, ddelta, dA, dB, dC;              // as their inputs, overwritten
    Tensor dD = {}, dz = {}, ddelta_bias = {};  // overwritten, or none where the input is
};
void selective_scan_backward(Context& ctx, const SelectiveScanBackward& args);

// ---- embedding, RoPE, read-out -------------------------------------------------------------------------------------
// Rows of patches: cols[b, gy*gw + gx] = image[b, :, gy*stride : +P, gx*stride : +P], flattened (C, P, P).
struct Patches {
    Tensor images;  // (B, C, H, W), of the type of cols; on the CPU float32 beside bf16 as well
    std::int64_t patch = 16, stride = 16;
    std::int64_t begin = 0;  // first patch row of cols
    Tensor cols;             // (B, J', C P P)
};
void patches_forward(Context& ctx, const Patches& args);   // images -> cols
void patches_backward(Context& ctx, const Patches& args);  // cols -> adds to images (a gradient)

// out[b, t] = (a patch or a class token, + pos[t]) * dropout[b, t].
struct TokensForward {
    Tensor patches;              // (B, J, D)
    Tensor class_token[2] = {};  // (1, n, D), or none; the second of two may be a tensor of its own
    ClassPlaces places = {};     // of the class tokens
    Tensor pos_embed = {};       // (1, L, D) or none
    Tensor dropout = {};         // (B, L, D) factors, or none
    Tensor out;                  // (B, L, D)
};
void tokens_forward(Context& ctx, const TokensForward& args);

struct TokensBackward {
    ClassPlaces places = {};
    Tensor dropout = {};          // (B, L, D) or none
    Tensor dout;                  // (B, L, D)
    Tensor dpatches;              // (B, J, D) overwritten
    Tensor dclass_token[2] = {};  // as class_token, added to, or none
    Tensor dpos_embed = {};       // (1, L, D) added to, or none
};
void tokens_backward(Context& ctx, const TokensBackward& args);

// The positions of a sequence: rows of patches are resized from a table (bicubic as torch's, no antialiasing), the same
// in every frame of a clip but for that frame's row; those of class tokens are carried over, from the table or from one
// of their own. Of wide types. See table_resize in positions.h.
struct TableResize {
    Grid from, to;
    ClassPlaces from_class = {};  // none where class tokens have a table of their own
    ClassPlaces to_class = {};
    std::int64_t frames = 1;  // of `to`
};
struct PositionsForward {
    Tensor table;            // (1, patches + class tokens, D) of `from`
    Tensor class_rows = {};  // (1, class tokens, D), or none: they are in the table
    Tensor frame_rows = {};  // (1, frames, D) or none
    Tensor out;              // (1, frames * patches + class tokens, D) of `to`
    TableResize resize;
};
void positions_forward(Context& ctx, const PositionsForward& args);

struct PositionsBackward {
    Tensor dout;         // as the forward's out
    Tensor dtable = {};  // as its tables, added to, or none
    Tensor dclass_rows = {};
    Tensor dframe_rows = {};
    TableResize resize;
};
void positions_backward(Context& ctx, const PositionsBackward& args);

// Adjacent pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin); inverse: the transpose. In place. skip leading tokens
// pass.
struct Rope {
    Tensor x;         // (B, L, D)
    Tensor cos, sin;  // (L - skip, D)
    std::int64_t skip = 0;
    bool inverse = false;
};
void rope(Context& ctx, const Rope& args);

// Pools tokens to rows. select: mean over the tokens at `places`; join: those tokens one after the other.
enum class Reduce : std::uint8_t { mean, max, select, join };
struct ReadoutForward {
    Reduce reduce = Reduce::mean;
    ClassPlaces places = {};  // select, join
    Tensor x;                 // (B, L, D)
    Tensor out;               // (B, D); join: (B, count * D)
};
void readout_forward(Context& ctx, const ReadoutForward& args);

struct ReadoutBackward {
    Reduce reduce = Reduce::mean;
    ClassPlaces places = {};
    Tensor x = {};  // (B, L, D), needed for max
    Tensor dout;    // as the forward's out
    Tensor dx;      // (B, L, D) overwritten
};
void readout_backward(Context& ctx, const ReadoutBackward& args);

// out = a + row_scale[b] b. Each of the three may be wide.
struct Add {
    Tensor a, b;            // (B, L, D)
    Tensor out;             // (B, L, D); may be a or b
    Tensor row_scale = {};  // (B) or none
};
void add(Context& ctx, const Add& args);

}  // namespace vimcore
