// SPDX-License-Identifier: Apache-2.0
// Host side of the tuned scan, of one pass or of both directions over the same tokens: where it applies, which shape.
#include "scan/tuned.cuh"

#include <algorithm>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "scan/choice.h"

namespace vimcore::cuda {

namespace {

using device_scratch::most_shared;

// Least work per token, for launches that fill the device; fewer blocks gain from spreading channels over more lanes,
// in longer tiles, as there is less of each.
template <class T>
using Whole = TunedShape<T, 16, 2, 16, 8, 32, true>;
template <class T, int N>
using Wide = TunedShape<T, N, N == 8 ? 1 : 2, 8, 16, 64>;
template <class T>
using Middle = TunedShape<T, 16, 1, 4, 32, 64>;
template <class T>
using Narrow = TunedShape<T, 16, 1, 1, sizeof(T) == 2 ? 64 : 32, 64>;
// Blocks from which on a shape pays; Whole, when 132 multiprocessors no longer hold all blocks of Wide at a time.
constexpr Index enough_whole = 397, enough_wide = 256, enough_middle = 128;

int narrow(Index size) { return static_cast<int>(size); }

bool is_aligned(const void* p, Index bytes)
{
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

template <class T>
TunedScan<T> tuned_args(Context& ctx, const ScanForward& a, std::span<const ScanForwardPass> passes)
{
    const ScanForwardPass& first = passes[0];
    const Index inner = a.xz.size(2) / 2, rank = first.dt_weight.size(1), size = sizeof(T);
    TunedScan<T> s{};
    s.directions = narrow(static_cast<Index>(passes.size()));
    s.tokens = narrow(first.u.size(1));
    s.len = narrow(a.xz.size(1));
    s.dim = narrow(inner);
    s.begin = narrow(first.begin);
    s.chunk = narrow(a.chunk);
    s.rank = narrow(rank);
    s.row = narrow(first.q.size(2));
    s.inverse_scale = 1.0f / static_cast<float>(a.scale);
    s.z = a.xz.as<T>() + first.begin * 2 * inner + inner;
    s.out = a.out.as<T>() + first.begin * inner;
    s.sum = static_cast<float*>(device_scratch::direction_sum(ctx, a).data);
    s.aligned = inner * size % 16 == 0 && is_aligned(s.z, 16) && is_aligned(s.out, 16);
    s.q_bytes = 16;
    for (std::size_t i = 0; i < passes.size(); i++) {
        const ScanForwardPass& p = passes[i];
        TunedPass<T>& to = s.pass[i];
        to.u = p.u.as<T>();
        to.q = p.q.as<T>();
        to.A_log = p.A_log.as<float>();
        to.D = p.D.as<float>();
        to.dt_weight = p.dt_weight.as<float>();
        to.dt_bias = p.dt_bias.as<float>();
        to.state = p.state.as<float>();
        to.checkpoints = p.checkpoints.as<float>();
        if (p.checkpoints) to.chunks = narrow(p.checkpoints.size(1));
        to.reverse = p.reverse;
        to.add = p.add;
        to.finish = p.finish;
        s.aligned = s.aligned && is_aligned(to.u, 16);
        while (s.q_bytes > 2 && (s.row * size % s.q_bytes != 0 || !is_aligned(to.q, s.q_bytes))) s.q_bytes /= 2;
    }
    if (s.q_bytes == 2) s.q_bytes = 0;
    return s;
}

// Whether chunks and shared memory allow a shape.
template <class Shape>
bool applies(const ScanForward& a, const ScanForwardPass& p)
{
    const Index rank = p.dt_weight.size(1);
    if (rank > most_shared || 2 * Shape::layout(narrow(rank), narrow(p.q.size(2))).bytes > most_shared) return false;
    return !p.checkpoints || (a.chunk % Shape::tile == 0 && p.begin % Shape::tile == 0);
}

// Whether Whole does: see `straight` of TunedShape; offsets are of 32 bits.
template <class T>
bool is_straight(const ScanForward& a, std::span<const ScanForwardPass> passes, const TunedScan<T>& s)
{
    return passes.size() == 2 && passes[1].finish && s.tokens == s.len && s.begin == 0 &&
           s.dim % Whole<T>::channels == 0 && s.rank % 4 == 0 && s.row % 4 == 0 && s.aligned && s.q_bytes == 16 &&
           is_aligned(s.sum, 16) && a.xz.numel() < (Index{1} << 31);
}

template <class Shape>
bool run_shape(Context& ctx, const ScanForward& a, std::span<const ScanForwardPass> passes)
{
    using T = typename Shape::Type;
    for (const ScanForwardPass& p : passes)
        if (!applies<Shape>(a, p)) return false;
    Arena::Scope scope(arena_of(ctx));
    TunedScan<T> s = tuned_args<T>(ctx, a, passes);
    if (Shape::straight && !is_straight(a, passes, s)) return false;
    s.groups = narrow(ceil_div(s.dim, Shape::channels));
    const dim3 grid(static_cast<unsigned>(a.xz.size(0) * s.groups));
    const int bytes = s.directions * Shape::layout(s.rank, s.row).bytes;
    VIM_LAUNCH((scan_tuned<Shape>), grid, s.directions * Shape::threads, bytes, stream_of(ctx), s);
    return true;
}

// Runs passes that fit in one launch, or returns false.
template <class T, int N>
bool run_tuned(Context& ctx, const ScanForward& a, std::span<const ScanForwardPass> passes)
{
    using Widest = Wide<T, N>;
    static_assert(Widest::channels == device_scratch::wide_channels(N) && Widest::tile == device_scratch::wide_tile);
    static_assert(Widest::layout(1, 130).bytes == device_scratch::wide_shared(sizeof(T), N, 1, 130) &&
                  Widest::layout(100, 232).bytes == device_scratch::wide_shared(sizeof(T), N, 100, 232));
    const ScanKernel forced = forced_scan();
    if constexpr (N == 16) {
        using Wholly = Whole<T>;
        static_assert(Wholly::channels == device_scratch::whole_channels && Wholly::tile == device_scratch::whole_tile);
        static_assert(Wholly::layout(12, 48).bytes == device_scratch::whole_shared(sizeof(T), 12, 48));
        auto wanted = [&](ScanKernel kernel, bool by_size) {
            return forced == kernel || (forced == ScanKernel::automatic && by_size);
        };
        auto blocks = [&](int channels) { return a.xz.size(0) * ceil_div(a.xz.size(2) / 2, channels); };
        const bool spread = blocks(Widest::channels) < enough_wide;
        const bool spread_more = spread && blocks(Middle<T>::channels) < enough_middle;
        if (wanted(ScanKernel::narrow, spread_more) && run_shape<Narrow<T>>(ctx, a, passes)) return true;
        if (wanted(ScanKernel::middle, spread) && run_shape<Middle<T>>(ctx, a, passes)) return true;
        if (wanted(ScanKernel::whole, blocks(Wholly::channels) >= enough_whole) && run_shape<Wholly>(ctx, a, passes))
            return true;
    }
    return (forced == ScanKernel::automatic || forced == ScanKernel::wide) && run_shape<Widest>(ctx, a, passes);
}

}  // namespace

bool scan_forward_tuned(Context& ctx, const ScanForward& args)
{
    // That the widest shape applies is asked of the others, too, so that this does not depend on the batch.
    if (!device_scratch::is_tuned(args)) return false;
    const ScanForwardPass& first = args.passes[0];
    bool done = args.out.numel() == 0 || first.u.numel() == 0;
    if (done) return true;
    dispatch(args.xz.dtype, [&](auto type) {
        select<8, 16, 32, 64>(first.A_log.size(1), [&](auto N) {
            done = run_tuned<decltype(type), decltype(N)::value>(ctx, args, args.passes);
        });
    });
    return done;
}

}  // namespace vimcore::cuda
