// SPDX-License-Identifier: Apache-2.0
// The fake runtime: streams, events, graphs. Work runs as it is queued; while a stream is being captured it is kept
// instead, to be run by every launch of the graph.
// With VIMCORE_SHIM_LATE=SEED work is queued by stream and runs late: when somebody waits for it, and now and then, in
// an order drawn from the seed among what streams and events allow. A wait that is missing then shows as a wrong value.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
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

constexpr auto not_ready = static_cast<cudaError_t>(600);  // cudaErrorNotReady

// Work that has been queued, and what it waits for beside the work before it.
using Done = std::shared_ptr<bool>;
struct Work {
    std::function<void()> run;
    std::vector<Done> after;
    Done done;
};
struct Queue {
    std::deque<Work> work;
    Done last;                  // of all that was queued
    std::vector<Done> awaited;  // by the next work
};

}  // namespace

struct CUstream_st {
    int device = 0;
    bool blocking = true;  // waits for the default stream and the other way round
    std::shared_ptr<Capture> capture;
    Queue queue;
};
struct CUevent_st {
    int device = 0;
    bool recorded = false;
    std::vector<Done> before;          // work that comes before the event
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
    if (const cudaError_t status = check_process()) return status;
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

namespace {

// ---- work that runs late -------------------------------------------------------------------------------------------

std::uint64_t late = [] {
    const char* text = std::getenv("VIMCORE_SHIM_LATE");
    return text ? std::strtoull(text, nullptr, 10) : std::uint64_t{0};
}();

Queue& default_queue()
{
    static Queue& value = *new Queue;
    return value;
}
Queue& queue_of(cudaStream_t stream) { return stream ? stream->queue : default_queue(); }

bool is_done(const Done& done) { return !done || *done; }

// What the next work of a stream waits for in other streams: the default stream and blocking ones wait for each other.
std::vector<Done> others_of(cudaStream_t stream)
{
    std::vector<Done> found;
    if (!stream) {
        for (const CUstream_st* other : handles().streams)
            if (other->blocking && !is_done(other->queue.last)) found.push_back(other->queue.last);
    } else if (stream->blocking && !is_done(default_queue().last)) {
        found.push_back(default_queue().last);
    }
    return found;
}

// All that has been queued before now, as an event sees it.
std::vector<Done> reached(cudaStream_t stream)
{
    const Queue& queue = queue_of(stream);
    std::vector<Done> found = others_of(stream);
    found.insert(found.end(), queue.awaited.begin(), queue.awaited.end());
    if (!is_done(queue.last)) found.push_back(queue.last);
    return found;
}

// One piece of work that can run, of a stream drawn at random. False: there is none. Never under state_lock().
bool run_one()
{
    Work work;
    {
        const std::lock_guard lock(state_lock());
        std::vector<Queue*> ready;
        auto look = [&](Queue& queue) {
            if (!queue.work.empty() && std::ranges::all_of(queue.work.front().after, is_done)) ready.push_back(&queue);
        };
        look(default_queue());
        for (CUstream_st* stream : handles().streams) look(stream->queue);
        if (ready.empty()) return false;
        late = late * 6364136223846793005u + 1442695040888963407u;
        Queue& queue = *ready[(late >> 33) % ready.size()];
        work = std::move(queue.work.front());
        queue.work.pop_front();
    }
    const std::shared_ptr<void> finished(nullptr, [&](void*) {  // also where it throws
        const std::lock_guard lock(state_lock());
        *work.done = true;
    });
    work.run();
    return true;
}

std::mutex& running_lock()
{
    static std::mutex lock;
    return lock;
}

// Runs work until all of these are done.
void run_until(const std::vector<Done>& wanted)
{
    if (late == 0) return;
    const std::lock_guard one_at_a_time(running_lock());
    auto missing = [&] {
        const std::lock_guard lock(state_lock());
        return !std::ranges::all_of(wanted, is_done);
    };
    while (missing())
        if (!run_one()) throw Failure("work waits for work that will never run");
}

}  // namespace

void set_late(std::uint64_t seed)
{
    run_everything();
    late = seed;
}

void run_everything()
{
    if (late == 0) return;
    const std::lock_guard one_at_a_time(running_lock());
    while (run_one()) {
    }
}

// As in CUDA, a thread's mode says which captures forbid it unsafe calls.
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t allow_unsafe(const char* call)
{
    if (const cudaError_t status = check_process()) return status;
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
        if (late != 0) {
            std::vector<Done> after = others_of(stream);
            Queue& queue = queue_of(stream);
            after.insert(after.end(), queue.awaited.begin(), queue.awaited.end());
            queue.awaited.clear();
            queue.last = std::make_shared<bool>(false);
            queue.work.push_back({std::move(work), std::move(after), queue.last});
        }
    }
    if (late == 0) {
        work();
    } else if ((late >> 40) % 4 == 0) {  // now and then something is as fast as its caller
        const std::unique_lock one_at_a_time(running_lock(), std::try_to_lock);
        if (one_at_a_time) run_one();
    }
    return cudaSuccess;
}

}  // namespace vimcore::shim

using namespace vimcore::shim;

// ---- streams -------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags)
{
    const std::lock_guard lock(state_lock());
    *stream = new CUstream_st{current_device(), (flags & cudaStreamNonBlocking) == 0, nullptr, {}};
    handles().streams.insert(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    run_everything();  // a real one goes on without its stream
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
    std::vector<Done> wanted;
    {
        const std::lock_guard lock(state_lock());
        if (stream && !handles().streams.contains(stream)) return unknown("a stream");
        if (stream && stream->capture)
            return refuse(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
        if (const cudaError_t status = stream ? cudaSuccess : check_stream(stream)) return status;
        wanted = reached(stream);
    }
    run_until(wanted);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize()
{
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = allow_unsafe("cudaDeviceSynchronize")) return status;
    }
    run_everything();
    return cudaSuccess;
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
    event->before = reached(stream);
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
    } else {
        for (const Done& done : event->before)
            if (!is_done(done)) queue_of(stream).awaited.push_back(done);
    }
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    const std::lock_guard lock(state_lock());
    if (!handles().events.contains(event)) return unknown("an event");
    if (event->capture) return error(cudaErrorCapturedEvent, "the event was recorded while capturing");
    return std::ranges::all_of(event->before, is_done) ? cudaSuccess : not_ready;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    const cudaError_t status = cudaEventQuery(event);
    if (status != not_ready) return status;
    std::vector<Done> wanted;
    {
        const std::lock_guard lock(state_lock());
        wanted = event->before;
    }
    run_until(wanted);
    return cudaSuccess;
}
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
