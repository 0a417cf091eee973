// SPDX-License-Identifier: Apache-2.0
// The table of single-threaded kernels that every instruction set fills. Plain pointers and sizes only: the kernel
// translation units include no standard library header, because the linker could keep an inline function compiled
// for a wide instruction set and run it on a machine without it.
#pragma once

namespace vimcore::cpu {

using Index = long long;

inline constexpr int checksum_lanes = 64;

// bfloat16, the upper half of a float32: rounded to nearest, ties to even, and a NaN stays one. Always inline, so that
// no copy compiled for a wide instruction set is left for the linker.
struct bf16 {
    unsigned short bits;

    bf16() = default;
    __attribute__((always_inline)) explicit bf16(float value)
    {
        const unsigned word = __builtin_bit_cast(unsigned, value);
        bits = static_cast<unsigned short>(value != value ? word >> 16 | 64 : (word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    __attribute__((always_inline)) operator float() const
    {
        return __builtin_bit_cast(float, static_cast<unsigned>(bits) << 16);
    }
};

// The type of parameters, residual stream, states and sums beside activations of T; all arithmetic is done in it.
template <class T>
struct WideOf {
    using type = T;
};
template <>
struct WideOf<bf16> {
    using type = float;
};
template <class T>
using Wide = typename WideOf<T>::type;

// Packed right-hand side: panels [ceil(n / nr)][k][nr], zero-padded. transposed: w is (k, n). bf16: the order that the
// unit wants, and k is padded to a multiple of `depth`.
template <class T>
struct PackArgs {
    const Wide<T>* w;
    Index ldw;
    Index n, k;
    bool transposed;
    T* out;
};

// y[i, j] = (add ? y[i, j] : 0) + bias[j] + sum_p x[i, p] w[j, p]. The order of summation over p never depends on m.
template <class T>
struct GemmArgs {
    const T* x;
    Index ldx;
    const T* packed;
    const Wide<T>* bias;  // or null
    T* y;
    Index ldy;
    Index m, n, k;
    Index panel_begin, panel_end;  // panels of nr columns to compute
    bool add;
};

// dw[j, p] += sum_i dy[i, j] x[i, p] for j in [j_begin, j_end), p in [0, k). scratch: gemm_tn_scratch(m, k) elements.
// Rows are summed in blocks of a fixed length, so the result does not depend on how j is split.
template <class T>
struct GemmTnArgs {
    const T* dy;
    Index lddy;
    const T* x;
    Index ldx;
    Wide<T>* dw;
    Index lddw;
    Index m, k, j_begin, j_end;
    T* scratch;
};

// One image, rows [0, len) of width dim. layer false: RMSNorm. Null pointers where ops.h says "or none".
template <class T>
struct NormForwardArgs {
    const T* h;
    const Wide<T>*residual, *weight, *bias;
    Wide<T>* residual_out;
    T* out;
    Wide<T> row_scale;
    Wide<T> eps;
    bool layer;
    Index len, dim;
};

// dweight and dbias are (dim), added to in row order.
template <class T>
struct NormBackwardArgs {
    const Wide<T>*x, *weight;
    Wide<T> row_scale;
    Wide<T> eps;
    bool layer;
    Index len, dim;
    const T* dout;
    const Wide<T>* dresidual_out;
    Wide<T>* dresidual;
    T* dh;
    Wide<T>*dweight, *dbias;
};

// One image, one direction, a sequence of total tokens, channels [e0, e1). weight is (width, dim): transposed.
template <class T>
struct Conv {
    const T* x;
    Index ldx;  // row 0 of the sequence
    const Wide<T>*weight, *bias;
    Index total, dim, e0, e1, width;
    bool reverse, silu;
};

// Tokens [begin, begin + len).
template <class T>
struct ConvForwardArgs {
    Conv<T> f;
    T* u;
    Index ldu;  // row 0 is token `begin`
    Index begin, len;
};

// The whole sequence. Adds to dx when add_dx; dweight (width, dim) and dbias (dim) are added to.
template <class T>
struct ConvBackwardArgs {
    Conv<T> f;
    const T* du;
    Index lddu;
    T* dx;
    Index lddx;
    bool add_dx;
    Wide<T>*dweight, *dbias;
};

// One image, one direction, len tokens, channels [e0, e1). All row pointers are at the first token of these len.
template <class T>
struct ScanArgs {
    bool reverse;
    Index len, dim, state, rank;  // E, N, R
    Index e0, e1;
    const T* u;
    Index ldu;
    const T* dt;
    Index lddt;              // rank > 0: (len, R) low-rank; rank 0: (len, E) delta before bias and softplus
    const T* dt_weight;      // (R, E) transposed, or null when rank is 0; bf16: pairs along R, (ceil(R / 2), E, 2)
    const Wide<T>* dt_bias;  // (E) or null
    bool softplus;
    const Wide<T>* A;  // (N, E): A * log2(e), transposed
    const Wide<T>*B, *C;
    Index ldb;         // (len, N) rows of stride ldb
    const Wide<T>* D;  // (E) or null
    Wide<T>* h;        // (N, E) state in and out; null: starts at zero, not returned
    T* y;
    Index ldy;    // out
    bool add;     // y += instead of y =
    bool finish;  // y = scale * y * silu(z)
    const T* z;
    Index ldz;  // or null: no gate
    Wide<T> scale;
    // states on entry of every chunk of `chunk` tokens, chunk c covering tokens [c chunk, (c+1) chunk) counted from
    // token 0 of the sequence (the first of these len is token `begin`): (chunks, N, E), or null
    Wide<T>* checkpoints;
    Index chunk, begin;
};

// Backward of one direction, one image, channels [e0, e1), the whole sequence (len tokens).
// gy = dout * scale * silu(z) (or dout * scale without z) is the gradient of y.
template <class T>
struct ScanBackwardArgs {
    ScanArgs<T> f;  // f.checkpoints is read; f.y receives y (without gate; added to when f.add)
    const T* dout;
    Index lddout;
    T* du;
    Index lddu;
    T* ddelta;
    Index ldddelta;      // gradient of delta before bias and softplus, (len, E)
    Wide<T>*dB, *dC;     // (len, N) contiguous, overwritten: the sums over channels [e0, e1)
    Wide<T>* dA;         // (N, E): gradient of A (not of A log2 e), overwritten for [e0, e1)
    Wide<T>*dD, *dbias;  // (E) overwritten for [e0, e1), or null
    Wide<T>* scratch;    // scan_backward_scratch(state, chunk, e1 - e0) elements, 64-byte aligned, contents ignored
};

// Gate: with y the ungated sum of directions, dz = dout * scale * y * silu'(z) and y <- scale * y * silu(z).
template <class T>
struct GateBackwardArgs {
    Index len, e0, e1;
    T* y;
    Index ldy;
    const T* z;
    Index ldz;
    const T* dout;
    Index lddout;
    T* dz;
    Index lddz;  // or null
    Wide<T> scale;
};

// Pixels of `channels` numbers at `row`, one after the other; result x lies between two of them.
template <class T>
struct StretchArgs {
    const T* row;
    Index channels;
    const Index *left, *right;  // (columns)
    const T* part;              // (columns) the right one's
    Index columns;
    T* out;       // of stretch
    Index pixel;  // elements from one result to the next
    bool add;
};

// Every set fills every slot. One that some sets do not have is declared with ` = nullptr` and left out of their
// tables; whoever calls it asks for null first.
template <class T>
struct Kernels {
    const char* isa;
    Index lanes;   // elements of a vector: channel ranges are multiples of it, except the last
    Index mr, nr;  // register tile of gemm
    Index depth;   // packed weights are padded to multiples of it along k

    void (*pack)(const PackArgs<T>&);
    void (*gemm)(const GemmArgs<T>&);
    void (*gemm_tn)(const GemmTnArgs<T>&);
    Index (*gemm_tn_scratch)(Index m, Index k);
    void (*norm_forward)(const NormForwardArgs<T>&);
    void (*norm_backward)(const NormBackwardArgs<T>&);
    void (*conv_forward)(const ConvForwardArgs<T>&);
    void (*conv_backward)(const ConvBackwardArgs<T>&);
    void (*widen)(const T* from, Index ld, Index rows, Index columns, Wide<T>* to);  // to: contiguous rows
    void (*scan_forward)(const ScanArgs<T>&);
    void (*scan_backward)(const ScanBackwardArgs<T>&);
    Index (*scan_backward_scratch)(Index state, Index chunk, Index channels);
    void (*gate_backward)(const GateBackwardArgs<T>&);
    void (*prepare_A)(const Wide<T>* A_log, Index dim, Index state,
                      Wide<T>* out);                                   // out (N, E) = -exp(A_log) log2(e), transposed
    void (*checksum)(const void* data, Index bytes, unsigned* state);  // state: checksum_lanes numbers, updated
    Wide<T> (*fma_peak)(Index rounds);  // busy loop of multiply-adds; returns a value so that it is not removed
    Index fma_per_round;                // flops of one round
    // Of heads, which have no bf16.
    void (*relu)(T* y, Index count) = nullptr;
    void (*gelu)(T* y, Index count) = nullptr;
    void (*blend)(const T* a, const T* b, T part, T* out, Index count) = nullptr;
    void (*stretch)(const StretchArgs<T>&) = nullptr;
    void (*arg_max)(const StretchArgs<T>&, unsigned char* out) = nullptr;
};

// One per instruction set that was built; null entries where it was not.
template <class T>
const Kernels<T>* kernels_baseline();
template <class T>
const Kernels<T>* kernels_avx2();
template <class T>
const Kernels<T>* kernels_avx512();
template <class T>
const Kernels<T>* kernels_neon();
// With a unit for bf16, which is the only type that they are made for.
template <class T>
const Kernels<T>* kernels_avx512bf16();
template <class T>
const Kernels<T>* kernels_amx();
template <class T>
const Kernels<T>* kernels_neonbf16();

}  // namespace vimcore::cpu
