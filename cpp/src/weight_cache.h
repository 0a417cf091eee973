// SPDX-License-Identifier: Apache-2.0
// Packed forms of weights (GEMM panels, transposed convolution weights, exp(A_log)), built at first use and rebuilt
// after Params::changed(). Shared between concurrent calls on the same weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "backend.h"
#include "vimcore/error.h"

namespace vimcore {

class WeightCache {
public:
    // The packed form `kind` of the weight at `weight`; fill writes it when it is missing or stale.
    // On a device with streams, `fill` queues its work on the context's stream; other streams wait for it. A training
    // step that is recorded in a graph fills again in every replay, as weights will have changed. A table is filled
    // once.
    const void* get(Context& ctx, const void* weight, int kind, std::size_t bytes,
                    const std::function<void(void*)>& fill, bool table = false)
    {
        const Key key{weight, kind};
        auto current = [&](const Entry& entry) {
            return entry.bytes == bytes && (entry.version == version_ || (table && entry.version >= 0));
        };
        const bool fill_in_graph = ctx.training && !table && ctx.backend().recording(ctx);
        if (!fill_in_graph) {
            std::shared_lock lock(mutex_);
            auto found = entries_.find(key);
            if (found != entries_.end() && current(found->second)) return found->second.use(ctx);
        }
        if (ctx.backend().recording(ctx)) return recorded(ctx, key, bytes, fill_in_graph ? &fill : nullptr);
        std::unique_lock lock(mutex_);
        Entry& entry = entries_[key];
        if (!current(entry)) {
            if (entry.bytes != bytes) {
                entry.data = take(ctx.device(), bytes);
                entry.bytes = bytes;
            }
            fill(entry.data);
            entry.filled = ctx.backend().mark(ctx);
            entry.stream = ctx.stream();
            entry.version = version_;
        }
        return entry.use(ctx);
    }

    void invalidate()  // contents change, places stay
    {
        std::unique_lock lock(mutex_);
        version_++;
    }

private:
    using Key = std::pair<const void*, int>;
    struct Entry {
        void* data = nullptr;  // in a slab
        std::size_t bytes = 0;
        std::int64_t version = -1;
        void* stream = nullptr;        // that filled it
        std::shared_ptr<void> filled;  // when that was done

        const void* use(Context& ctx) const
        {
            if (filled && stream != ctx.stream()) ctx.backend().await(ctx, filled.get());
            return data;
        }
    };
    // While a graph is recorded: memory that was used before, which the graph fills again.
    const void* recorded(Context& ctx, const Key& key, std::size_t bytes, const std::function<void(void*)>* fill)
    {
        std::unique_lock lock(mutex_);
        const auto found = entries_.find(key);
        if (!fill || found == entries_.end() || found->second.bytes != bytes)
            throw Error("[weights] not prepared yet: make the call once before recording it in a graph");
        found->second.use(ctx);  // behind an earlier fill
        (*fill)(found->second.data);
        return found->second.data;
    }

    // From the last slab, or a new one: few large blocks of memory are had much faster than many small ones.
    void* take(Device device, std::size_t bytes)
    {
        bytes = (bytes + 255) / 256 * 256;
        if (slabs_.empty() || slabs_.back().bytes() - used_ < bytes) {
            const std::size_t slab = std::clamp(total_, std::size_t{1} << 16, std::size_t{1} << 22);
            slabs_.emplace_back(std::max(slab, bytes), device);
            used_ = 0;
        }
        void* data = static_cast<char*>(slabs_.back().data()) + used_;
        used_ += bytes;
        total_ += bytes;
        return data;
    }

    std::shared_mutex mutex_;
    std::map<Key, Entry> entries_;
    std::vector<Buffer> slabs_;
    std::size_t used_ = 0, total_ = 0;  // of the last slab, of all
    std::int64_t version_ = 0;
};

}  // namespace vimcore
