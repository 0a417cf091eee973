// SPDX-License-Identifier: Apache-2.0
#include "vimcore/context.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/backend.h"
#include "core/context_internals.h"

namespace vimcore {
namespace {

constexpr int max_threads = 1024;  // more than that is a slip, and would take the machine's memory

}  // namespace

Context::Context(Device device, int threads)
    : Context(device, threads, std::make_unique<ContextInternals>(backend_of(device), device, Arena::Mode::memory))
{
}

Context::Context(Device device, int threads, std::unique_ptr<ContextInternals> internals)
    : device_(device), threads_(1), internals_(std::move(internals))
{
    set_threads(threads);
}

Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

Context& worker_of(Context& ctx, int index)
{
    ContextInternals& own = internals(ctx);
    if (counts(ctx)) {  // all but the last take the same
        own.counted_workers = std::max(own.counted_workers, index + 1);
        index = std::min(index, 1);
    }
    while (static_cast<int>(own.workers.size()) <= index)
        own.workers.push_back(std::make_unique<Context>(ContextInternals::make(
            *own.backend, ctx.device(), 1, counts(ctx) ? Arena::Mode::counting : Arena::Mode::memory)));
    Context& worker = *own.workers[static_cast<std::size_t>(index)];
    internals(worker).cache = own.cache;
    internals(worker).training = own.training;
    internals(worker).tile = own.tile;
    return worker;
}

void Context::set_stream(void* stream)
{
    if (stream == stream_) return;
    internals_->backend->change_stream(*this, stream_, stream);
    stream_ = stream;
}

void Context::hold_memory(bool hold) { internals_->arena.hold(hold); }

void Context::set_threads(int threads)
{
    if (threads < 0 || threads > max_threads)
        throw std::invalid_argument("[context] threads: expected 0 to " + std::to_string(max_threads) + ", got " +
                                    std::to_string(threads));
    threads_ = threads == 0 ? internals_->backend->default_threads() : threads;
}

}  // namespace vimcore
