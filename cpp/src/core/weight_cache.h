// SPDX-License-Identifier: Apache-2.0
// Packed forms of weights (GEMM panels, transposed convolution weights, exp(A_log), casts), built at first use and
// rebuilt after Params::changed(). Shared between concurrent calls on the same weights.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/table_cache.h"
#include "vimcore/error.h"

namespace vimcore {

// How a packed weight is stored.
enum class WeightForm : std::uint8_t {
    panels,             // (N, K) for y = x W^T: panels of the CPU's matrix kernel
    panels_transposed,  // the same for y = x W
    transposed,         // (columns, rows)
    decay,              // of A_log: -exp(A_log) log2(e), transposed
    cast,               // as it is, in another type
    cast_pair,          // two casts side by side, named by the first
};

struct WeightKey {
    const void* weight;
    WeightForm form;
    DType format;  // of the packed elements
    auto operator<=>(const WeightKey&) const = default;
};

inline std::size_t copied_bytes(const std::vector<Copy>& copies)
{
    std::size_t bytes = 0;
    for (const Copy& c : copies) bytes += c.to.bytes();
    return bytes;
}

class WeightCache {
public:
    // The packed form of a weight; fill writes it when it is missing or stale. On a device with streams, `fill` queues
    // its work on the context's stream; other streams wait for it.
    const void* get(Context& ctx, const WeightKey& key, std::size_t bytes, const std::function<void(void*)>& fill)
    {
        if (counts(ctx)) return placeholder_memory(bytes);
        {
            std::shared_lock lock(mutex_);
            auto found = entries_.find(key);
            if (found != entries_.end() && found->second.current(bytes, version_)) return found->second.use(ctx);
        }
        if (backend_of(ctx).recording(ctx)) not_prepared();
        std::unique_lock lock(mutex_);
        Entry& entry = entries_[key];
        if (!entry.current(bytes, version_)) {
            place(ctx, entry, bytes);
            fill(entry.data);
            entry.filled_now(ctx, version_, backend_of(ctx).mark(ctx));
        }
        return entry.use(ctx);
    }

    // A packed form that consists of copies(to), with zeros elsewhere. The first time it is made alone; later all of
    // one format are renewed by one piece of work, as soon as one that is stale is asked for. While a graph is
    // recorded, that is part of the graph: once for an inference whose forms are stale, and once for every training
    // step, as weights will have changed when it is replayed.
    const void* get_copies(Context& ctx, const WeightKey& key, std::size_t bytes,
                           const std::function<std::vector<Copy>(void*)>& copies)
    {
        if (counts(ctx)) return placeholder_memory(bytes);
        const bool step_recorded = internals(ctx).training && backend_of(ctx).recording(ctx);
        if (!step_recorded) {
            std::shared_lock lock(mutex_);
            const auto found = entries_.find(key);
            if (found != entries_.end() && found->second.current(bytes, version_)) return found->second.use(ctx);
        }
        const std::uint64_t recording = backend_of(ctx).recording(ctx);
        std::unique_lock lock(mutex_);
        if (recording) return recorded(ctx, key, bytes, recording);
        Entry& entry = entries_[key];
        if (entry.current(bytes, version_)) return entry.use(ctx);
        if (entry.bytes == bytes && same_sources(entry.copies, copies(entry.data))) {
            renew(ctx, key.format);
            const std::shared_ptr<void> done = backend_of(ctx).mark(ctx);
            for (auto& [other, copied] : entries_)
                if (copied.of_copies && other.format == key.format) copied.filled_now(ctx, version_, done);
        } else {
            place(ctx, entry, bytes);
            entry.of_copies = true;
            entry.copies = copies(entry.data);
            groups_[key.format].prepared = nullptr;  // has one more
            if (copied_bytes(entry.copies) < bytes)
                backend_of(ctx).fill_zero(ctx,
                                          {entry.data, {static_cast<std::int64_t>(bytes)}, DType::u8, ctx.device()});
            for (const Copy& c : entry.copies) backend_of(ctx).copy(ctx, c.from, c.to);
            entry.filled_now(ctx, version_, backend_of(ctx).mark(ctx));
        }
        return entry.use(ctx);
    }

    TableCache tables;  // for image sizes

    void invalidate()  // contents change, places stay
    {
        tables.weights_changed();
        std::unique_lock lock(mutex_);
        version_++;
    }

    // A training step begins: if it is recorded, it renews its copies itself.
    void begin_step()
    {
        std::unique_lock lock(mutex_);
        for (auto& [unused, group] : groups_) group.recorded = {};
    }

private:
    struct Entry {
        void* data = nullptr;  // in a slab
        std::size_t bytes = 0;
        std::int64_t version = -1;
        void* stream = nullptr;        // that filled it
        std::shared_ptr<void> filled;  // when that was done
        bool of_copies = false;        // which all of its format are renewed with
        std::vector<Copy> copies;

        bool current(std::size_t wanted, std::int64_t now) const { return bytes == wanted && version == now; }
        void filled_now(Context& ctx, std::int64_t now, std::shared_ptr<void> done)
        {
            filled = std::move(done);
            stream = ctx.stream();
            version = now;
        }
        const void* use(Context& ctx) const
        {
            if (filled && stream != ctx.stream()) backend_of(ctx).await(ctx, filled.get());
            return data;
        }
    };
    struct Group {                                          // the copies of one format
        void* prepared = nullptr;                           // all its copies; null: to be prepared
        std::pair<std::uint64_t, std::int64_t> recorded{};  // recording that renewed them, and at which version
    };

    // While a graph is recorded: memory that was used before, which the graph fills again.
    const void* recorded(Context& ctx, const WeightKey& key, std::size_t bytes, std::uint64_t recording)
    {
        const auto found = entries_.find(key);
        if (found == entries_.end() || found->second.bytes != bytes) not_prepared();
        const Entry& entry = found->second;
        if (!internals(ctx).training && entry.version == version_) return entry.use(ctx);
        Group& group = groups_[key.format];
        const std::pair now{recording, version_};
        if (group.recorded != now) renew(ctx, key.format);
        group.recorded = now;
        return entry.use(ctx);
    }

    [[noreturn]] static void not_prepared()
    {
        throw Error("[weights] not prepared yet: make the call once before recording it in a graph");
    }

    static bool same_sources(const std::vector<Copy>& a, const std::vector<Copy>& b)
    {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                          [](const Copy& x, const Copy& y) { return x.from.data == y.from.data; });
    }

    // Queues all copies of a format, behind what filled them before.
    void renew(Context& ctx, DType format)
    {
        std::vector<Copy> all;
        void* awaited = nullptr;
        void*& prepared = groups_[format].prepared;
        for (const auto& [key, entry] : entries_) {
            if (!entry.of_copies || key.format != format) continue;
            if (!prepared) all.insert(all.end(), entry.copies.begin(), entry.copies.end());
            if (std::exchange(awaited, entry.filled.get()) != entry.filled.get()) entry.use(ctx);
        }
        if (!prepared) prepared = prepared_.emplace_back(backend_of(ctx).prepare_copies(ctx, std::move(all))).get();
        backend_of(ctx).run_copies(ctx, prepared);
    }

    void place(Context& ctx, Entry& entry, std::size_t bytes)
    {
        if (entry.bytes == bytes) return;
        entry.data = take(ctx.device(), bytes);
        entry.bytes = bytes;
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
    std::map<WeightKey, Entry> entries_;
    std::map<DType, Group> groups_;
    std::vector<std::shared_ptr<void>> prepared_;  // also what graphs may still read
    std::vector<Buffer> slabs_;
    std::size_t used_ = 0, total_ = 0;  // of the last slab, of all
    std::int64_t version_ = 0;
};

}  // namespace vimcore
