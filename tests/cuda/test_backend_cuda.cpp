// SPDX-License-Identifier: Apache-2.0
// Memory, copies, streams and recordings of the CUDA backend, and what its errors say.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <limits>
#include <string>

#include "check_cuda.h"
#include "launch.h"
#include "vimcore/build_info.h"
#include "vimcore/error.h"
#include "vimcore/ops.h"
#ifdef VIMCORE_SHIM
#include "runtime.h"
#endif

using namespace vimcore;
using namespace vimcore::test;

namespace {

// What the error of f() says; empty without one.
template <class F>
std::string message(F&& f)
{
    try {
        f();
    } catch (const Error& error) {
        return error.what();
    }
    return {};
}

bool has(const std::string& text, const std::string& part)
{
    if (text.find(part) != std::string::npos) return true;
    std::printf("'%s' does not contain '%s'\n", text.c_str(), part.c_str());
    return false;
}

void check_memory()
{
    for (std::int64_t count : {1, 3, 64, 1001}) {
        Side side = Side::cuda(DType::f32);
        const Floats values = Random(2).normal(count);
        CHECK(side.values(side.parameter({count}, values)) == values);
    }
    Buffer moved(100, Device::cuda()), other(std::move(moved));
    CHECK(other.data() != nullptr && reinterpret_cast<std::uintptr_t>(other.data()) % 64 == 0);
    CHECK(Buffer(0, Device::cuda()).data() == nullptr);
    Context& ctx = cuda_context();
    backend_of(ctx).upload(ctx, nullptr, {nullptr, {0, 5}, DType::f32, ctx.device()});
    backend_of(ctx).download(ctx, {nullptr, {0, 5}, DType::f32, ctx.device()}, nullptr);
}

void check_copies()
{
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (DType from : device_types)
        for (DType to : device_types)
            for (std::int64_t count : {1, 7, 8, 1000}) {
                Side side = Side::cuda(DType::f32);
                Floats values = rounded(from, Random(3).normal(count));
                values.back() = count == 7 ? infinity : -0.0f;
                const Tensor x = side.make({count}, from, values), y = side.make({count}, to, Floats(values.size()));
                backend_of(side.ctx).copy(side.ctx, x, y);
                CHECK(side.values(y) == rounded(to, values));
                backend_of(side.ctx).fill_zero(side.ctx, y);
                CHECK(side.values(y) == Floats(values.size()));
            }
    Side side = Side::cuda(DType::f32);
    const Floats factors = {2, -1, 0};
    const Tensor matrix = side.parameter({3, 5}, Random(4).normal(15)), factor = side.parameter({3}, factors);
    const Tensor out = side.parameter({3, 5}, Floats(15));
    backend_of(side.ctx).scale_rows(side.ctx, {.matrix = matrix, .factor = factor, .out = out});
    const Floats in = side.values(matrix), scaled = side.values(out);
    for (std::size_t i = 0; i < 15; i++) CHECK(scaled[i] == in[i] * factors[i / 5]);
}

// Work follows the context from stream to stream.
void check_streams()
{
    Context ctx(Device::cuda());
    Backend& backend = backend_of(ctx);
    const std::shared_ptr<void> one = backend.make_stream(0), two = backend.make_stream(0);
    CHECK(one && two && one != two);
    Side side(ctx, DType::f32);
    const Floats values = Random(5).normal(1 << 16);
    const Tensor a = side.parameter({1 << 16}, values), b = side.wide_result({1 << 16}),
                 c = side.wide_result({1 << 16});
    ctx.set_stream(one.get());
    backend.copy(ctx, a, b);
    const std::shared_ptr<void> copied = backend.mark(ctx);
    CHECK(copied && !backend.recording(ctx));
    ctx.set_stream(two.get());
    backend.await(ctx, copied.get());
    backend.copy(ctx, b, c);
    CHECK(side.values(c) == values);
    ctx.set_stream(nullptr);
    backend.fill_zero(ctx, c);
    CHECK(side.values(c) == Floats(values.size()));
    CHECK(side.values(b) == values);
}

// A recording does nothing until it is replayed, and then works on what memory holds.
void check_recordings()
{
    Context ctx(Device::cuda());
    Backend& backend = backend_of(ctx);
    const std::shared_ptr<void> stream = backend.make_stream(0);
    ctx.set_stream(stream.get());
    Side side(ctx, DType::f32);
    const Floats first = Random(6).normal(100), second = Random(7).normal(100);
    const Tensor a = side.parameter({100}, first), b = side.parameter({100}, Floats(100));
    auto record = [&](auto&& program) {
        return backend.record(ctx, [](void* f) { (*static_cast<decltype(&program)>(f))(); }, &program);
    };
    const std::shared_ptr<void> recorded = record([&] {
        CHECK(backend.recording(ctx));
        CHECK(backend.mark(ctx) == nullptr);
        backend.copy(ctx, a, b);
    });
    CHECK(!backend.recording(ctx));
    CHECK(side.values(b) == Floats(100));
    backend.replay(ctx, recorded.get());
    CHECK(side.values(b) == first);
    assign(ctx, a, second);
    backend.replay(ctx, recorded.get());
    CHECK(side.values(b) == second);

    // A program that fails leaves the stream as it was.
    CHECK(message([&] { record([] { throw Error("stop"); }); }) == "stop");
    CHECK(!backend.recording(ctx));
    backend.fill_zero(ctx, b);
    CHECK(side.values(b) == Floats(100));
}

void check_errors()
{
    const std::string memory = message([] { Buffer buffer(std::size_t{1} << 44, Device::cuda()); });
    CHECK(has(memory, "CUDA out of memory. cuda:0 (") && has(memory, "was asked for 16777216 MiB, free are "));
    CHECK(has(message([] { Buffer buffer(64, Device::cuda(99)); }), "devices 0 to"));
    CHECK(Buffer(64, Device::cuda()).data() != nullptr);  // neither error stays behind

    using cuda::after_launch;
    cudaStream_t none = nullptr;
    CHECK(message([&] { after_launch(cudaSuccess, "first_kernel", "/a/b.cu", 1, none); }).empty());
    const std::string launch =
        message([&] { after_launch(cudaErrorInvalidConfiguration, "wide", "/a/b.cu", 12, none); });
    CHECK(has(launch, "kernel wide: ") && has(launch, "cudaErrorInvalidConfiguration") && has(launch, "[b.cu:12]"));
    const std::string late = message([&] { after_launch(cudaErrorIllegalAddress, "next", "/a/b.cu", 13, none); });
    CHECK(has(late, "kernel next was not launched") && has(late, "last launched: wide, first_kernel"));
    const std::string call = message([] { VIM_CUDA(cudaErrorInvalidValue); });
    CHECK(has(call, "[cuda] cudaErrorInvalidValue: ") && has(call, "[test_backend_cuda.cpp:"));
    CHECK(has(message([] { cuda::allow_shared_memory(nullptr, 1 << 30); }), "needs 1073741824 bytes of shared memory"));
}

// Whoever else holds memory is asked once, and only where there is too little. Not on a GPU, which other tests share.
void check_memory_of_others()
{
#ifdef VIMCORE_SHIM
    const std::size_t before = shim::device_memory();
    shim::set_device_memory(std::size_t{64} << 20);
    std::size_t free = 0, total = 0;
    VIM_CUDA(cudaMemGetInfo(&free, &total));
    const std::size_t wanted = free / 8 * 5;
    Buffer others(wanted, Device::cuda());
    int asked = 0;
    auto ask = [&](bool give) {
        set_give_back_memory([&asked, &others, wanted, give](int device, std::size_t bytes) {
            CHECK(device == 0 && bytes == wanted);
            asked++;
            if (give) others = Buffer();
            return true;
        });
    };
    auto take = [&] { return message([&] { Buffer buffer(wanted, Device::cuda()); }); };
    ask(false);  // says so, but frees nothing: no third attempt
    CHECK(has(take(), "out of memory") && asked == 1);
    ask(true);
    CHECK(take().empty() && asked == 2);
    CHECK(take().empty() && asked == 2);
    others = Buffer(wanted, Device::cuda());
    set_give_back_memory([](int, std::size_t) -> bool { throw Error("stop"); });
    CHECK(take() == "stop");
    set_give_back_memory(nullptr);
    CHECK(has(take(), "out of memory") && asked == 2);
    others = Buffer();
    shim::set_device_memory(before);
#endif
}

// A child of a process that used the device has none: every call says what to do instead.
void check_fork()
{
    const pid_t child = fork();
    if (child == 0) {
        const std::string memory = message([] { Buffer buffer(64, Device::cuda()); });
        const std::string call = message([] { cuda_description(0); });
        _exit(has(memory, "was forked") && has(memory, "\"spawn\" or \"forkserver\"") && has(call, "was forked") &&
                      cuda_device_count() == 0
                  ? 0
                  : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    CHECK(Buffer(64, Device::cuda()).data() != nullptr);
}

void check_description()
{
    CHECK(cuda_device_count() >= 1);
    CHECK(has(cuda_description(0), "compute capability"));
    CHECK(has(cuda_description(0), "matrices by"));
    CHECK(!message([] { cuda_description(99); }).empty());
    CHECK(build_info().cuda);
}

}  // namespace

int main()
{
    check_description();
    check_memory();
    check_copies();
    check_streams();
    check_recordings();
    check_errors();
    check_memory_of_others();
    check_fork();
    return check_failures();
}
