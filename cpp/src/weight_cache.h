// SPDX-License-Identifier: Apache-2.0
// Packed forms of weights (GEMM panels, transposed convolution weights, exp(A_log)), built at first use and rebuilt
// after Params::changed(). Shared between concurrent calls on the same weights.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "vimcore/tensor.h"

namespace vimcore {

class WeightCache {
public:
    // The packed form `kind` of the weight at `weight`; fill writes it when it is missing or stale.
    const void* get(const void* weight, int kind, std::size_t bytes, const std::function<void(void*)>& fill)
    {
        const Key key{weight, kind};
        {
            std::shared_lock lock(mutex_);
            auto found = entries_.find(key);
            if (found != entries_.end() && found->second.version == version_ && found->second.buffer.bytes() == bytes)
                return found->second.buffer.data();
        }
        std::unique_lock lock(mutex_);
        Entry& entry = entries_[key];
        if (entry.version != version_ || entry.buffer.bytes() != bytes) {
            if (entry.buffer.bytes() != bytes) entry.buffer = Buffer(bytes);
            fill(entry.buffer.data());
            entry.version = version_;
        }
        return entry.buffer.data();
    }

    void invalidate()  // contents change, places stay
    {
        std::unique_lock lock(mutex_);
        version_++;
    }

private:
    using Key = std::pair<const void*, int>;
    struct Entry {
        Buffer buffer;
        std::int64_t version = -1;
    };
    std::shared_mutex mutex_;
    std::map<Key, Entry> entries_;
    std::int64_t version_ = 0;
};

}  // namespace vimcore
