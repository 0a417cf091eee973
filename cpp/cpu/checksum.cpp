// SPDX-License-Identifier: Apache-2.0
#include "vimcore/checksum.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "threads.h"

namespace vimcore {

namespace {

constexpr std::int64_t task_bytes = 1 << 18;  // some 10 us

std::uint64_t mix(std::uint64_t x)  // a bijection
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

}  // namespace

Checksum::Checksum(std::span<const Tensor> tensors)
{
    std::int64_t room = 0;  // in the last task
    for (const Tensor& tensor : tensors) {
        if (!tensor) continue;
        const char* data = tensor.as<char>();
        for (auto left = static_cast<std::int64_t>(tensor.bytes()); left > 0;) {
            if (room == 0) {
                tasks_.push_back(pieces_.size());
                room = task_bytes;
            }
            const std::int64_t bytes = std::min(left, room);
            pieces_.push_back({data, bytes});
            data += bytes;
            left -= bytes;
            room -= bytes;
        }
    }
    tasks_.push_back(pieces_.size());
}

std::uint64_t Checksum::operator()(Context& ctx) const
{
    const cpu::Kernels<float>& kernel = cpu::kernels<float>();
    std::atomic<std::uint64_t> sum{0};  // of the tasks' values: their order does not matter
    cpu::parallel_for(ctx.threads(), static_cast<std::int64_t>(tasks_.size()) - 1, [&](std::int64_t task) {
        const auto index = static_cast<std::size_t>(task);
        unsigned state[cpu::checksum_lanes];
        for (int i = 0; i < cpu::checksum_lanes; i++) state[i] = static_cast<unsigned>(i);
        for (std::size_t p = tasks_[index]; p < tasks_[index + 1]; p++)
            kernel.checksum(pieces_[p].data, pieces_[p].bytes, state);
        std::uint64_t value = index;
        for (const unsigned word : state) value = mix(value ^ word);
        sum.fetch_add(value, std::memory_order_relaxed);
    });
    return sum.load();
}

}  // namespace vimcore
