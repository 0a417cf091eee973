// SPDX-License-Identifier: Apache-2.0
// Tables for the image sizes that were used last: resized position tables and rotations. Shared between concurrent
// calls on the same weights; a call keeps its table, whoever needs the room meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "vimcore/error.h"

namespace vimcore {

class TableCache {
public:
    using Key = std::array<std::int64_t, 8>;  // what the table depends on, besides the contents of weights

    // The table of `key`; fill writes it when it is missing, or stale: made before the last change of the weights, if
    // it is made of them. On a device with streams, `fill` queues its work on the context's stream; other streams wait
    // for it. A table that a recorded graph reads is kept for good.
    template <class F>
    std::shared_ptr<const void> get(Context& ctx, const Key& key, bool of_weights, std::size_t bytes, F&& fill)
    {
        if (counts(ctx)) return {std::shared_ptr<void>(), placeholder_memory(bytes)};
        const std::uint64_t recording = backend_of(ctx).recording(ctx);
        std::lock_guard lock(mutex_);
        const std::int64_t wanted = of_weights ? version_ : 0;
        auto found = std::find_if(tables_.begin(), tables_.end(),
                                  [&](const Table& t) { return t.key == key && t.memory->bytes() == bytes; });
        if (recording && (found == tables_.end() || found->version != wanted))
            throw Error("[weights] not prepared yet: make the call once before recording it in a graph");
        if (found == tables_.end()) {
            make_room(bytes);
            found = tables_.insert(tables_.end(), Table(key, std::make_shared<Buffer>(bytes, ctx.device())));
        }
        if (found->version != wanted) {
            found->version = -1;  // should fill throw
            // others read the former one
            if (found->memory.use_count() > 1) found->memory = std::make_shared<Buffer>(bytes, ctx.device());
            fill(found->memory->data());
            found->filled = backend_of(ctx).mark(ctx);
            found->stream = ctx.stream();
            found->version = wanted;
        } else if (found->filled && found->stream != ctx.stream()) {
            backend_of(ctx).await(ctx, found->filled.get());
        }
        if (recording) found->kept = true;
        std::shared_ptr<const void> data(found->memory, found->memory->data());
        std::rotate(found, found + 1, tables_.end());  // used last
        return data;
    }

    void weights_changed()
    {
        std::lock_guard lock(mutex_);
        version_++;
    }

private:
    struct Table {
        Table(const Key& key, std::shared_ptr<Buffer> memory) : key(key), memory(std::move(memory)) {}
        Key key;
        std::shared_ptr<Buffer> memory;
        std::int64_t version = -1;
        void* stream = nullptr;        // that filled it
        std::shared_ptr<void> filled;  // when that was done
        bool kept = false;
    };

    // The one that was not used for longest goes, until another of `bytes` is within the limits.
    void make_room(std::size_t bytes)
    {
        constexpr std::size_t most = 16, most_bytes = std::size_t{1} << 28;
        for (auto table = tables_.begin(); table != tables_.end();) {
            std::size_t total = bytes;
            for (const Table& t : tables_) total += t.memory->bytes();
            if (tables_.size() < most && total <= most_bytes) return;
            table = table->kept ? table + 1 : tables_.erase(table);
        }
    }

    std::mutex mutex_;
    std::vector<Table> tables_;  // the one used last comes last
    std::int64_t version_ = 0;
};

}  // namespace vimcore
