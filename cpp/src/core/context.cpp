// SPDX-License-Identifier: Apache-2.0
#include "vimcore/context.h"

#include <stdexcept>

#include "core/arena.h"
#include "core/backend.h"

namespace vimcore {
namespace {

constexpr int max_threads = 1024;  // more than that is a slip, and would take the machine's memory

}  // namespace

Context::Context(Device device, int threads)
    : device_(device), threads_(1), backend_(&backend_of(device)), arena_(std::make_unique<Arena>(device))
{
    set_threads(threads);
}

Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

Context& Context::worker(int index)
{
    while (static_cast<int>(workers_.size()) <= index) workers_.push_back(std::make_unique<Context>(device_, 1));
    Context& worker = *workers_[static_cast<std::size_t>(index)];
    worker.cache = cache;
    worker.training = training;
    worker.tile = tile;
    return worker;
}

void Context::set_stream(void* stream)
{
    if (stream == stream_) return;
    backend_->change_stream(*this, stream_, stream);
    stream_ = stream;
}

void Context::hold_memory(bool hold) { arena_->hold(hold); }

void Context::set_threads(int threads)
{
    if (threads < 0 || threads > max_threads)
        throw std::invalid_argument("[context] threads: expected 0 to " + std::to_string(max_threads) + ", got " +
                                    std::to_string(threads));
    threads_ = threads == 0 ? backend_->default_threads() : threads;
}

}  // namespace vimcore
