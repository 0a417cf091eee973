// SPDX-License-Identifier: Apache-2.0
#include "cuda_backend.h"

#include <atomic>
#include <limits>
#include <string>

#include "cublaslt.h"
#include "vimcore/build_info.h"
#include "vimcore/error.h"

namespace vimcore {

namespace cuda {

namespace {

// Calls that are forbidden while a graph is being captured, made so that they do not disturb it.
class OutsideCapture {
public:
    OutsideCapture() { VIM_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
    ~OutsideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
    OutsideCapture(const OutsideCapture&) = delete;
    OutsideCapture& operator=(const OutsideCapture&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The number of the capture that the stream takes part in, or 0.
std::uint64_t capturing(cudaStream_t stream)
{
    static std::atomic<std::uint64_t> unknown = std::numeric_limits<std::uint64_t>::max();  // never the same twice
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (error == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another one captures
        (void)cudaGetLastError();
        return unknown--;
    }
    VIM_CUDA(error);
    if (status == cudaStreamCaptureStatusNone) return 0;
    unsigned long long number = 0;
    if (cudaStreamGetCaptureInfo(stream, &status, &number) == cudaSuccess && number > 0) return number;
    (void)cudaGetLastError();
    return unknown--;
}

// Copies of weights, cut into pieces, in device memory.
struct CastTable {
    Buffer memory;
    Index pieces;
};

std::shared_ptr<void> event_behind(cudaStream_t stream)
{
    cudaEvent_t made = nullptr;
    VIM_CUDA(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    std::shared_ptr<void> event(made, [](void* e) { (void)cudaEventDestroy(static_cast<cudaEvent_t>(e)); });
    VIM_CUDA(cudaEventRecord(made, stream));
    return event;
}

std::string mebibytes(std::size_t bytes)
{
    return bytes < 1u << 20 ? std::to_string(bytes) + " bytes" : std::to_string(bytes >> 20) + " MiB";
}

std::string version(int number)  // 13020 -> 13.2
{
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why there is no device, or nothing.
std::string missing_device()
{
    int count = 0, driver = 0, runtime = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0) return {};
    (void)cudaGetLastError();
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
    (void)cudaGetLastError();
    if (status == cudaErrorInitializationError)
        return "CUDA cannot be used here (" + std::string(cudaGetErrorName(status)) + ")" + forked_remedy;
    if (driver == 0) return "this machine has no NVIDIA driver; install one, or use the CPU";
    if (status == cudaErrorInsufficientDriver)
        return "the NVIDIA driver is made for CUDA " + version(driver) + ", this build of vimcore for " +
               version(runtime) + "; update the driver, or use the CPU";
    if (status == cudaErrorNoDevice || status == cudaSuccess)
        return "no GPU is visible; is one there, and does CUDA_VISIBLE_DEVICES allow it? Otherwise use the CPU";
    return std::string("the driver gave no device: ") + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
           ")";
}

}  // namespace

// ---- memory --------------------------------------------------------------------------------------------------------

void* CudaBackend::allocate(std::size_t bytes, int device)
{
    const DeviceGuard guard(device);
    void* memory = nullptr;
    auto allocated = [&] {
        const OutsideCapture outside;
        const cudaError_t status = cudaMalloc(&memory, bytes);
        if (status != cudaErrorMemoryAllocation) check(status, "cudaMalloc", __FILE__, __LINE__);
        (void)cudaGetLastError();
        return status == cudaSuccess;
    };
    if (allocated()) return memory;
    if (others_gave_back(device, bytes) && allocated()) return memory;
    std::size_t free = 0, total = 0;
    VIM_CUDA(cudaMemGetInfo(&free, &total));
    cudaDeviceProp properties{};
    VIM_CUDA(cudaGetDeviceProperties(&properties, device));
    // Programs that look for the largest batch recognise the first words.
    throw OutOfMemory("[cuda] CUDA out of memory. " + to_string(Device::cuda(device)) + " (" + properties.name +
                      ") was asked for " + mebibytes(bytes) + ", free are " + mebibytes(free) + " of " +
                      mebibytes(total) +
                      "; use a smaller batch or image, or have others give memory back (torch.cuda.empty_cache())");
}

void CudaBackend::release(void* memory, int device) noexcept
{
    try {
        const DeviceGuard guard(device);
        const OutsideCapture outside;
        (void)cudaFree(memory);  // waits for the kernels that use it
    } catch (const Error&) {     // the driver has shut down, or the device has failed: the memory is gone already
    }
}

void CudaBackend::upload(Context& ctx, const void* host, const Tensor& to)
{
    if (to.bytes() == 0) return;
    const DeviceGuard guard(ctx.device().index);
    VIM_CUDA(cudaMemcpyAsync(to.data, host, to.bytes(), cudaMemcpyHostToDevice, stream_of(ctx)));
    VIM_CUDA(cudaStreamSynchronize(stream_of(ctx)));
}

void CudaBackend::download(Context& ctx, const Tensor& from, void* host)
{
    if (from.bytes() == 0) return;
    const DeviceGuard guard(ctx.device().index);
    VIM_CUDA(cudaMemcpyAsync(host, from.data, from.bytes(), cudaMemcpyDeviceToHost, stream_of(ctx)));
    VIM_CUDA(cudaStreamSynchronize(stream_of(ctx)));
}

// ---- streams and graphs --------------------------------------------------------------------------------------------

void CudaBackend::change_stream(Context& ctx, void* from, void* to)
{
    const DeviceGuard guard(ctx.device().index);
    const auto before = static_cast<cudaStream_t>(from), after = static_cast<cudaStream_t>(to);
    if (capturing(before)) return;  // what it records runs when the caller replays it
    const std::shared_ptr<void> event = [&] {
        const OutsideCapture outside;
        return event_behind(before);
    }();
    if (capturing(after)) {  // a graph cannot wait for what is not part of it
        const OutsideCapture outside;
        VIM_CUDA(cudaEventSynchronize(static_cast<cudaEvent_t>(event.get())));
    } else {
        VIM_CUDA(cudaStreamWaitEvent(after, static_cast<cudaEvent_t>(event.get()), 0));
    }
}

std::shared_ptr<void> CudaBackend::mark(Context& ctx)
{
    const DeviceGuard guard(ctx.device().index);
    return capturing(stream_of(ctx)) ? nullptr : event_behind(stream_of(ctx));
}

void CudaBackend::await(Context& ctx, void* mark)
{
    const DeviceGuard guard(ctx.device().index);
    if (capturing(stream_of(ctx))) {
        const OutsideCapture outside;
        VIM_CUDA(cudaEventSynchronize(static_cast<cudaEvent_t>(mark)));
    } else {
        VIM_CUDA(cudaStreamWaitEvent(stream_of(ctx), static_cast<cudaEvent_t>(mark), 0));
    }
}

std::uint64_t CudaBackend::recording(Context& ctx)
{
    const DeviceGuard guard(ctx.device().index);
    return capturing(stream_of(ctx));
}

std::shared_ptr<void> CudaBackend::make_stream(int device)
{
    const DeviceGuard guard(device);
    cudaStream_t stream = nullptr;
    VIM_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return {stream, [](void* s) { (void)cudaStreamDestroy(static_cast<cudaStream_t>(s)); }};
}

std::shared_ptr<void> CudaBackend::record(Context& ctx, void (*program)(void*), void* context)
{
    const DeviceGuard guard(ctx.device().index);
    const cudaStream_t stream = stream_of(ctx);
    VIM_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t captured = nullptr;
    try {
        program(context);
    } catch (...) {
        if (cudaStreamEndCapture(stream, &captured) == cudaSuccess && captured) (void)cudaGraphDestroy(captured);
        (void)cudaGetLastError();
        throw;
    }
    VIM_CUDA(cudaStreamEndCapture(stream, &captured));
    const std::shared_ptr<void> graph(captured, [](void* g) { (void)cudaGraphDestroy(static_cast<cudaGraph_t>(g)); });
    cudaGraphExec_t made = nullptr;
    VIM_CUDA(cudaGraphInstantiate(&made, captured, 0));
    return {made, [](void* g) { (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(g)); }};
}

void CudaBackend::replay(Context& ctx, void* recording)
{
    const DeviceGuard guard(ctx.device().index);
    after_launch(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), stream_of(ctx)), "recorded graph", __FILE__,
                 __LINE__, stream_of(ctx));
}

void CudaBackend::run(Context& ctx, void (*program)(void*), void* context)
{
    const DeviceGuard guard(ctx.device().index);
    program(context);
}

void CudaBackend::run_workers(Context& ctx, int count, void (*body)(void*, int), void* context)
{
    const DeviceGuard guard(ctx.device().index);
    for (int i = 0; i < count; i++) body(context, i);
}

// ---- copies --------------------------------------------------------------------------------------------------------

void CudaBackend::copy(Context& ctx, const Tensor& from, const Tensor& to)
{
    const DeviceGuard guard(ctx.device().index);
    cuda::copy(ctx, from, to);
}

std::shared_ptr<void> CudaBackend::prepare_copies(Context& ctx, std::vector<Copy> copies)
{
    const int device = ctx.device().index;
    const DeviceGuard guard(device);
    const std::vector<CastPiece> pieces = cast_pieces(copies);
    const std::size_t bytes = pieces.size() * sizeof(CastPiece);
    const auto table = std::make_shared<CastTable>(Buffer(bytes, ctx.device()), static_cast<Index>(pieces.size()));
    if (bytes == 0) return table;
    const OutsideCapture outside;  // on a stream of its own, which no capture includes
    const std::shared_ptr<void> own = make_stream(device);
    const auto stream = static_cast<cudaStream_t>(own.get());
    VIM_CUDA(cudaMemcpyAsync(table->memory.data(), pieces.data(), bytes, cudaMemcpyHostToDevice, stream));
    VIM_CUDA(cudaStreamSynchronize(stream));
    return table;
}

void CudaBackend::run_copies(Context& ctx, const void* prepared)
{
    const DeviceGuard guard(ctx.device().index);
    const auto& table = *static_cast<const CastTable*>(prepared);
    cast_all(ctx, static_cast<const CastPiece*>(table.memory.data()), table.pieces);
}

void CudaBackend::fill_zero(Context& ctx, const Tensor& tensor)
{
    const DeviceGuard guard(ctx.device().index);
    cuda::fill_zero(ctx, tensor);
}

// ---- operators, with the context's device as the current one -------------------------------------------------------

#define VIM_DEFINE(function, Arguments)                             \
    void CudaBackend::function(Context& ctx, const Arguments& args) \
    {                                                               \
        const DeviceGuard guard(ctx.device().index);                \
        cuda::function(ctx, args);                                  \
    }
VIM_OPERATORS(VIM_DEFINE)
#undef VIM_DEFINE

}  // namespace cuda

Backend& cuda_backend()
{
    // Never destroyed: buffers in other static objects may outlive it.
    static Backend& backend = *[] {
        if (const std::string why = cuda::missing_device(); !why.empty()) throw Error("[cuda] " + why);
        return new cuda::CudaBackend;
    }();
    return backend;
}

int cuda_device_count()
{
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    (void)cudaGetLastError();
    return 0;
}

std::string cuda_description(int device)
{
    (void)cuda_backend();  // says why there is no device
    const CudaProducts products = cuda_products();
    cudaDeviceProp properties{};
    int driver = 0;
    VIM_CUDA(cudaGetDeviceProperties(&properties, device));
    VIM_CUDA(cudaDriverGetVersion(&driver));
    return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) + ", " + cuda::mebibytes(properties.totalGlobalMem) + ", driver for CUDA " +
           cuda::version(driver) + ", matrices by " + cuda::blas_name() +
           (products.built_in == 0 ? std::string()
                                   : ", but " + std::to_string(products.built_in) +
                                         " products by slow built-in kernels, the first " + products.first_built_in);
}

}  // namespace vimcore
