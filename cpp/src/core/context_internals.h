// SPDX-License-Identifier: Apache-2.0
// What the library itself needs of a context, and its users do not.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "vimcore/context.h"

namespace vimcore {

class Backend;
class WeightCache;

struct ContextInternals {
    ContextInternals(Backend& backend, Device device, Arena::Mode mode) : backend(&backend), arena(device, mode) {}

    Backend* backend;
    Arena arena;                   // scratch of the running call
    WeightCache* cache = nullptr;  // packed weights of the running call, or none
    bool training = false;         // the running call is the forward or the backward of a training step
    // Tokens that one operator call works on at most; 0: chosen by the backend. Results do not depend on it.
    std::int64_t tile = 0;
    std::vector<std::unique_ptr<Context>> workers;
    int counted_workers = 0;  // that `workers` stand for, where memory is counted

    static ContextInternals& of(Context& ctx) { return *ctx.internals_; }
    static Context make(Backend& backend, Device device, int threads, Arena::Mode mode)
    {
        return {device, threads, std::make_unique<ContextInternals>(backend, device, mode)};
    }
};

inline ContextInternals& internals(Context& ctx) { return ContextInternals::of(ctx); }
inline Arena& arena_of(Context& ctx) { return internals(ctx).arena; }
inline Backend& backend_of(Context& ctx) { return *internals(ctx).backend; }

// Whether calls in this context compute nothing and only take scratch memory (core/counting.h).
inline bool counts(Context& ctx) { return arena_of(ctx).counts(); }

// The index-th of some single-threaded contexts for parallel work on parts of a batch; made at first use.
Context& worker_of(Context& ctx, int index);

}  // namespace vimcore
