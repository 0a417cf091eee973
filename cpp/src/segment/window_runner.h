// SPDX-License-Identifier: Apache-2.0
// The network of a session on normalised windows: their coarse logits, and what they need of memory.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "segment/network.h"
#include "vimcore/model.h"

namespace vimcore {

// f(piece, begin, end) for a few pieces of [0, count) for each thread, side by side.
inline std::int64_t piece_count(Context& ctx, std::int64_t count)
{
    return std::min<std::int64_t>(count, ctx.threads() > 1 ? 2 * ctx.threads() : 1);
}
template <class F>
void for_pieces(Context& ctx, std::int64_t count, F&& f)
{
    struct Work {
        F& f;
        std::int64_t count, pieces;
    } work{f, count, piece_count(ctx, count)};
    backend_of(ctx).run_workers(
        ctx, static_cast<int>(work.pieces),
        [](void* context, int index) {
            const Work& w = *static_cast<Work*>(context);
            w.f(static_cast<std::int64_t>(index), index * w.count / w.pieces, (index + 1) * w.count / w.pieces);
        },
        &work);
}

class WindowRunner {
public:
    // Error where the machine has too little memory.
    WindowRunner(const SegmentationFile& about, const SegmentationNetwork& network, int threads, DType dtype);

    // count windows (count, channels, h, w) to their coarse logits (count, rows, columns, classes). Error where these
    // are not finite.
    void run(const float* images, std::int64_t count, float* out);

    std::int64_t image() const { return network_.window.images_shape(1).numel(); }  // numbers of a window
    std::int64_t coarse() const { return rows * columns * classes; }                // and of its coarse logits
    std::int64_t bytes() const { return bytes_; }

    const SegmentationFile& about;
    Context ctx;
    const std::int64_t together;  // windows that run through the backbone side by side
    const std::int64_t classes, rows, columns;

private:
    struct Streams {
        Outputs outputs;                // of all windows
        std::vector<Tensor> tokens;     // the same in float32
        std::vector<Tensor> of_window;  // (L, D) of one
    };
    void run(Context& ctx, Streams& streams, const float* images, std::int64_t count, float* out) const;
    std::int64_t counted_bytes() const;

    const SegmentationNetwork& network_;
    const DType dtype_;  // of the backbone's activations
    Streams streams_;
    std::int64_t bytes_ = 0;
};

}  // namespace vimcore
