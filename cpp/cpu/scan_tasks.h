// SPDX-License-Identifier: Apache-2.0
// The tasks of a scan, whatever its arguments: images and blocks of channels, and the sums that cross tasks.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu_backend.h"

namespace vimcore::cpu {

inline constexpr Index forward_channels = 32;   // channels of a forward task
inline constexpr Index backward_channels = 64;  // channels of a backward task: one partial sum of dB and dC each

// What all tasks of one pass share; pointers are those of image 0.
template <class T>
struct ScanPass {
    ScanArgs<T> args{};
    Index tokens = 0, q_row = 0, begin = 0, chunks = 0;
};

// B and C in the type of the sums: as they are, or converted once for all channels.
template <class T>
void set_BC(Context& ctx, ScanArgs<T>& s, const T* B, const T* C, Index ld, Index rows)
{
    if constexpr (std::is_same_v<T, Wide<T>>) {
        s.B = B;
        s.C = C;
        s.ldb = ld;
    } else {
        constexpr Index block = 256;
        using W = Wide<T>;
        W* to = scratch<W>(ctx, 2 * rows * s.state).template as<W>();
        s.B = to;
        s.C = to + rows * s.state;
        s.ldb = s.state;
        const Index blocks = ceil_div(rows, block);
        parallel_for(ctx, 2 * blocks, [&](Index task) {
            const Index begin = task / 2 * block, count = std::min(block, rows - begin);
            kernels<T>().widen((task % 2 ? C : B) + begin * ld, ld, count, s.state,
                               to + (task % 2 * rows + begin) * s.state);
        });
    }
}

// Moves the pointers of a pass to image b and channels [e0, e1).
template <class T>
ScanArgs<T> for_task(const ScanPass<T>& pass, Index len, Index b, Index e0, Index e1)
{
    ScanArgs<T> s = pass.args;
    s.u += b * pass.tokens * s.ldu;
    s.dt += b * pass.tokens * s.lddt;
    s.B += b * pass.tokens * s.ldb;
    s.C += b * pass.tokens * s.ldb;
    if (s.h) s.h += b * s.state * s.dim;
    s.y += b * len * s.ldy;
    if (s.z) s.z += b * len * s.ldz;
    if (s.checkpoints) s.checkpoints += b * pass.chunks * s.state * s.dim;
    s.e0 = e0;
    s.e1 = e1;
    return s;
}

// Gradients that one task leaves behind for the sums over channel blocks and over images.
template <class T>
struct ScanPartials {
    T* ddelta;           // (B, L, E)
    Wide<T>* dBC;        // (B, blocks, 2, L, N)
    Wide<T>* dA;         // (B, N, E)
    Wide<T>*dD, *dbias;  // (B, E)
};

template <class T>
ScanPartials<T> make_partials(Context& ctx, Index batch, Index len, Index dim, Index state, Index blocks)
{
    const auto sums = [&](Index count) { return scratch<Wide<T>>(ctx, count).template as<Wide<T>>(); };
    return {scratch<T>(ctx, batch * len * dim).template as<T>(), sums(batch * blocks * 2 * len * state),
            sums(batch * state * dim), sums(batch * dim), sums(batch * dim)};
}

template <class T>
ScanBackwardArgs<T> backward_args(const ScanArgs<T>& f, const ScanPartials<T>& part, Index len, Index b, Index block,
                                  Index blocks, Wide<T>* own)
{
    ScanBackwardArgs<T> s{};
    s.f = f;
    s.ddelta = part.ddelta + b * len * f.dim;
    s.ldddelta = f.dim;
    s.dB = part.dBC + (b * blocks + block) * 2 * len * f.state;
    s.dC = s.dB + len * f.state;
    s.dA = part.dA + b * f.state * f.dim;
    s.dD = part.dD + b * f.dim;
    s.dbias = part.dbias + b * f.dim;
    s.scratch = own;
    return s;
}

// dB and dC of image b, tokens [t0, t1): sums over channel blocks in order, into rows of stride ld.
template <class T>
void reduce_BC(const ScanPartials<T>& part, Index len, Index state, Index blocks, Index b, Index t0, Index t1, T* dB,
               T* dC, Index ld)
{
    for (Index which = 0; which < 2; which++)
        for (Index t = t0; t < t1; t++) {
            T* row = (which ? dC : dB) + t * ld;
            Wide<T>* sum = part.dBC + ((b * blocks * 2 + which) * len + t) * state;  // of the first block
            for (Index block = 1; block < blocks; block++) {
                const Wide<T>* in = sum + block * 2 * len * state;
                for (Index n = 0; n < state; n++) sum[n] += in[n];
            }
            for (Index n = 0; n < state; n++) row[n] = T(sum[n]);
        }
}

template <class T>
void add_over_images(const T* part, Index batch, Index count, T* sum)
{
    if (!sum) return;
    for (Index b = 0; b < batch; b++)
        for (Index i = 0; i < count; i++) sum[i] += part[b * count + i];
}

}  // namespace vimcore::cpu
