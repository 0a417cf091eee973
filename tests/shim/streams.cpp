// SPDX-License-Identifier: Apache-2.0
// The fake runtime: streams, events, graphs. Work runs as it is queued; while a stream is being captured it is kept
// instead, to be run by every launch of the graph.
#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "runtime.h"

namespace {

struct Capture {
    unsigned long long number = 0;
    CUstream_st* origin = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;
    bool invalid = false;
    std::vector<std::function<void()>> work;
    std::set<CUstream_st*> streams;   // that take part
    std::set<CUstream_st*> unjoined;  // with work that the origin does not wait for yet
};

}  // namespace

struct CUstream_st {
    int device = 0;
    bool blocking = true;  // waits for the default stream and the other way round
    std::shared_ptr<Capture> capture;
};
struct CUevent_st {
    int device = 0;
    bool recorded = false;
    std::shared_ptr<Capture> capture;  // recorded while this was going on
    std::set<CUstream_st*> behind;     // streams of that capture whose work comes before the event
    std::chrono::steady_clock::time_point time;
};
struct CUgraph_st {
    std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> work;
};

namespace vimcore::shim {
namespace {

struct Handles {
    std::set<CUstream_st*> streams;
    std::set<CUevent_st*> events;
    std::set<CUgraph_st*> graphs;
    std::set<CUgraphExec_st*> execs;
    std::vector<std::shared_ptr<Capture>> captures;  // that are going on
};
Handles& handles()
{
    static Handles& value = *new Handles;  // outlives everything that destroys streams
    return value;
}

cudaError_t unknown(const char* what) { return error(cudaErrorInvalidResourceHandle, what, " that does not exist"); }

cudaError_t refuse(Capture& capture, cudaError_t code, const char* why)
{
    capture.invalid = true;
    return error(code, why, ", while a stream is being captured");
}

// For anything queued on the stream.
cudaError_t check_stream(cudaStream_t stream)
{
    if (!stream) {
        for (const auto& capture : handles().captures)
            for (const CUstream_st* other : capture->streams)
                if (other->blocking)
                    return refuse(*capture, cudaErrorStreamCaptureImplicit, "use of the default stream");
        return cudaSuccess;
    }
    if (!handles().streams.contains(stream)) return unknown("a stream");
    if (stream->device != current_device())
        return error(cudaErrorInvalidResourceHandle, "stream of device ", stream->device, " while device ",
                     current_device(), " is the current one");
    if (stream->capture && stream->capture->invalid)
        return error(cudaErrorStreamCaptureInvalidated, "the capture has failed before");
    return cudaSuccess;
}

}  // namespace

// As in CUDA, a thread's mode says which captures forbid it unsafe calls.
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t allow_unsafe(const char* call)
{
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (const auto& capture : handles().captures)
        if (capture->mode == cudaStreamCaptureModeGlobal ||
            (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread == std::this_thread::get_id()))
            return refuse(*capture, cudaErrorStreamCaptureUnsupported, call);
    return cudaSuccess;
}

cudaError_t submit(cudaStream_t stream, std::function<void()> work)
{
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = check_stream(stream)) return status;
        if (stream && stream->capture) {
            Capture& capture = *stream->capture;
            capture.work.push_back(std::move(work));
            if (stream != capture.origin) capture.unjoined.insert(stream);
            return cudaSuccess;
        }
    }
    work();
    return cudaSuccess;
}

}  // namespace vimcore::shim

using namespace vimcore::shim;

// ---- streams -------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags)
{
    const std::lock_guard lock(state_lock());
    *stream = new CUstream_st{current_device(), (flags & cudaStreamNonBlocking) == 0, nullptr};
    handles().streams.insert(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    const std::lock_guard lock(state_lock());
    if (handles().streams.erase(stream) == 0) return unknown("a stream");
    if (stream->capture) {
        stream->capture->invalid = true;
        stream->capture->streams.erase(stream);
        std::erase(handles().captures, stream->capture);
    }
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    const std::lock_guard lock(state_lock());
    if (stream && !handles().streams.contains(stream)) return unknown("a stream");
    if (stream && stream->capture)
        return refuse(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
    return stream ? cudaSuccess : check_stream(stream);
}
cudaError_t cudaDeviceSynchronize()
{
    const std::lock_guard lock(state_lock());
    return allow_unsafe("cudaDeviceSynchronize");
}

// ---- events --------------------------------------------------------------------------------------------------------
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned)
{
    const std::lock_guard lock(state_lock());
    *event = new CUevent_st;
    (*event)->device = current_device();
    handles().events.insert(*event);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    const std::lock_guard lock(state_lock());
    if (handles().events.erase(event) == 0) return unknown("an event");
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    const std::lock_guard lock(state_lock());
    if (!handles().events.contains(event)) return unknown("an event");
    if (const cudaError_t status = check_stream(stream)) return status;
    if (event->device != current_device())
        return error(cudaErrorInvalidResourceHandle, "event and stream of two devices");
    event->recorded = true;
    event->capture = stream ? stream->capture : nullptr;
    event->behind = {stream};
    event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    const std::lock_guard lock(state_lock());
    if (!handles().events.contains(event)) return unknown("an event");
    if (stream && !handles().streams.contains(stream)) return unknown("a stream");
    if (!event->recorded) return cudaSuccess;
    const bool open = event->capture && std::ranges::count(handles().captures, event->capture) != 0;
    if (stream && stream->capture) {
        Capture& capture = *stream->capture;
        if (event->capture != stream->capture)
            return refuse(capture, cudaErrorStreamCaptureIsolation, "waiting for an event from outside");
        if (stream == capture.origin)
            for (CUstream_st* other : event->behind) capture.unjoined.erase(other);
    } else if (open) {
        if (!stream) return refuse(*event->capture, cudaErrorStreamCaptureImplicit, "use of the default stream");
        stream->capture = event->capture;
        stream->capture->streams.insert(stream);
        stream->capture->unjoined.insert(stream);
    } else if (event->capture) {
        return error(cudaErrorCapturedEvent, "the event belongs to a capture that has ended");
    }
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    const std::lock_guard lock(state_lock());
    if (!handles().events.contains(event)) return unknown("an event");
    if (event->capture) return error(cudaErrorCapturedEvent, "the event was recorded while capturing");
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end)
{
    for (const cudaEvent_t event : {start, end}) {
        if (const cudaError_t status = cudaEventQuery(event)) return status;
        if (!event->recorded) return error(cudaErrorInvalidResourceHandle, "an event that was not recorded");
    }
    *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return cudaSuccess;
}

// ---- graphs --------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    const std::lock_guard lock(state_lock());
    if (!stream) return error(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
    if (const cudaError_t status = check_stream(stream)) return status;
    if (stream->capture) return error(cudaErrorInvalidValue, "the stream is being captured already");
    stream->capture = std::make_shared<Capture>();
    static unsigned long long captures = 0;
    *stream->capture = {++captures, stream, mode, std::this_thread::get_id(), false, {}, {stream}, {}};
    handles().captures.push_back(stream->capture);
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode)
{
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph)
{
    const std::lock_guard lock(state_lock());
    *graph = nullptr;
    if (!stream || !handles().streams.contains(stream)) return unknown("a stream");
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return error(cudaErrorInvalidValue, "the stream is not being captured");
    if (capture->origin != stream ||
        (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()))
        return refuse(*capture, cudaErrorStreamCaptureUnmatched, "end of capture by another stream or thread");
    for (CUstream_st* other : capture->streams) other->capture = nullptr;
    std::erase(handles().captures, capture);
    if (capture->invalid) return error(cudaErrorStreamCaptureInvalidated, "the capture has failed before");
    if (!capture->unjoined.empty()) return error(cudaErrorStreamCaptureUnjoined, "a stream was not waited for");
    *graph = new CUgraph_st{capture->work};
    handles().graphs.insert(*graph);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status)
{
    const std::lock_guard lock(state_lock());
    if (!stream) {
        *status = cudaStreamCaptureStatusNone;
        return check_stream(stream);
    }
    if (!handles().streams.contains(stream)) return unknown("a stream");
    *status = !stream->capture           ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number)
{
    if (const cudaError_t error = cudaStreamIsCapturing(stream, status)) return error;
    const std::lock_guard lock(state_lock());
    if (*status == cudaStreamCaptureStatusActive && number) *number = stream->capture->number;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long)
{
    const std::lock_guard lock(state_lock());
    if (!handles().graphs.contains(graph)) return unknown("a graph");
    *exec = new CUgraphExec_st{graph->work};
    handles().execs.insert(*exec);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    {
        const std::lock_guard lock(state_lock());
        if (!handles().execs.contains(exec)) return unknown("an executable graph");
    }
    return submit(stream, [work = exec->work] {
        for (const auto& step : work) step();
    });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    const std::lock_guard lock(state_lock());
    if (handles().graphs.erase(graph) == 0) return unknown("a graph");
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    const std::lock_guard lock(state_lock());
    if (handles().execs.erase(exec) == 0) return unknown("an executable graph");
    delete exec;
    return cudaSuccess;
}
