// SPDX-License-Identifier: Apache-2.0
// What a device must provide: services (memory, copies, streams, parallel work) and the operators of operators.h.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/context_internals.h"
#include "core/operators.h"

namespace vimcore {

struct Copy {
    Tensor from, to;
};

class DeviceServices {
public:
    virtual ~DeviceServices() = default;

    virtual int default_threads() const = 0;
    virtual std::int64_t tile() const = 0;  // tokens per operator call that suit its caches

    // Runs `program`, a sequence of operator calls that belong together.
    virtual void run(Context& ctx, void (*program)(void* context), void* context) = 0;

    // Calls body(context, i) for i in [0, count), side by side where that pays.
    virtual void run_workers(Context& ctx, int count, void (*body)(void* context, int index), void* context) = 0;

    // Memory of the device, and copies within it and to and from the host. upload and download have finished with the
    // host's memory when they return.
    virtual void* allocate(std::size_t bytes, int device) = 0;  // throws vimcore::Error
    virtual void release(void* memory, int device) noexcept = 0;
    virtual void upload(Context& ctx, const void* host, const Tensor& to) = 0;
    virtual void download(Context& ctx, const Tensor& from, void* host) = 0;
    virtual void copy(Context& ctx, const Tensor& from, const Tensor& to) = 0;  // converts between float types
    // Copies that are made again and again: prepared once, then queued as one piece of work, where the device has that.
    // Sources are float32. Allowed while a graph is recorded, which needs what was prepared for as long as it lives.
    virtual std::shared_ptr<void> prepare_copies(Context&, std::vector<Copy> copies)
    {
        return std::make_shared<std::vector<Copy>>(std::move(copies));
    }
    virtual void run_copies(Context& ctx, const void* prepared)
    {
        for (const Copy& c : *static_cast<const std::vector<Copy>*>(prepared)) copy(ctx, c.from, c.to);
    }
    virtual void fill_zero(Context& ctx, const Tensor& tensor) = 0;
    // Weights (n, k) of linear maps as DType::bf16_panels: the bytes that these take, 0 where the device has no such
    // form; and how they are made, from float32.
    virtual std::size_t panel_bytes(std::int64_t, std::int64_t) const { return 0; }
    virtual void make_panels(const float*, std::int64_t, std::int64_t, void*) const {}
    // Makes work on stream `to` wait for what was queued on `from`.
    virtual void change_stream(Context& ctx, void* from, void* to) = 0;
    // A mark behind what is queued on the context's stream, for another stream to wait for; none where calls complete.
    virtual std::shared_ptr<void> mark(Context& ctx) = 0;
    virtual void await(Context& ctx, void* mark) = 0;
    // Whether what is queued now is recorded, by us or by the caller: the number of the recording, or 0.
    virtual std::uint64_t recording(Context& ctx) = 0;
    virtual std::shared_ptr<void> make_stream(int device) = 0;  // none on the CPU
    // What `program` queues on the context's stream, recorded instead of run; replay queues it again.
    virtual std::shared_ptr<void> record(Context& ctx, void (*program)(void* context), void* context) = 0;
    virtual void replay(Context& ctx, void* recording) = 0;
};

class Backend : public DeviceServices, public Operators {};

template <class F>
void run_together(Context& ctx, F&& program)
{
    backend_of(ctx).run(ctx, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); }, &program);
}

// Asks who set_give_back_memory() named. False: nobody was named, or nothing was given back.
bool others_gave_back(int device, std::size_t bytes);

Backend& cpu_backend();
Backend& cuda_backend();  // throws vimcore::Error where the build or the machine has no CUDA

inline Backend& backend_of(Device device) { return device.type == Device::Type::cpu ? cpu_backend() : cuda_backend(); }

}  // namespace vimcore
