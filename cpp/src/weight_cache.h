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
    // On a device with streams, `fill` queues its work on the context's stream; other streams wait for it.
    const void* get(Context& ctx, const void* weight, int kind, std::size_t bytes,
                    const std::function<void(void*)>& fill)
    {
        const Key key{weight, kind};
        {
            std::shared_lock lock(mutex_);
            auto found = entries_.find(key);
            if (found != entries_.end() && found->second.version == version_ && found->second.bytes == bytes)
                return found->second.use(ctx);
        }
        if (ctx.backend().recording(ctx))
            throw Error("[weights] not prepared yet: make the call once before recording it in a graph");
        std::unique_lock lock(mutex_);
        Entry& entry = entries_[key];
        if (entry.version != version_ || entry.bytes != bytes) {
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
