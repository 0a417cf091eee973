// SPDX-License-Identifier: Apache-2.0
// The parallel loop: through OpenMP (VIMCORE_OPENMP) or through teams of our own.
// A team is a caller and its workers. Its gate holds how many workers may still join the running loop and how many are
// inside. Nobody joins a closed gate and the caller waits until all are out, so the loop's fields are never read late.
#include "threads.h"

#include <pthread.h>
#if defined(VIMCORE_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "vimcore/error.h"

namespace vimcore::cpu {
namespace {

std::atomic<bool> forked{false};  // this process is a child without its parent's workers
std::atomic<int> active{0};       // threads that run loops now
constexpr int max_threads = 1024;
thread_local bool inside = false;  // this thread is in a loop: an inner loop runs serially

void watch_fork()
{
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
}

// Subnormal numbers count as zero while a thread computes. They turn up wherever a state or its gradient decays, are
// far below any tolerance, and cost a hundred cycles each on many machines.
class FlushSubnormals {
public:
#if defined(__SSE2__)
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // results and operands
    ~FlushSubnormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    FlushSubnormals()
    {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(saved_ | (std::uint64_t{1} << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
    FlushSubnormals() {}
    ~FlushSubnormals() {}
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

private:
#if defined(__SSE2__)
    unsigned saved_;
#elif defined(__aarch64__)
    std::uint64_t saved_;
#endif
};

void run_serially(std::int64_t count, void (*body)(void*, std::int64_t), void* context)
{
    const FlushSubnormals flush;
    for (std::int64_t i = 0; i < count; i++) body(context, i);
}

// One loop. Every thread has a part of the indices, the same part of the same range each time, so that what it wrote in
// one loop is in its cache in the next; a thread that is done with its own part helps with the others'. Indices are
// claimed one by one. The first exception ends the loop.
struct Loop {
    static constexpr int max_parts = 64;
    struct alignas(64) Part {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;
    };
    Part parts[max_parts];
    int part_count = 0;
    void (*body)(void*, std::int64_t) = nullptr;
    void* context = nullptr;
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    void start(int threads, std::int64_t count, void (*function)(void*, std::int64_t), void* argument)
    {
        part_count = std::min(threads, max_parts);
        for (int k = 0; k < part_count; k++) {
            parts[k].next.store(count * k / part_count, std::memory_order_relaxed);
            parts[k].end = count * (k + 1) / part_count;
        }
        body = function;
        context = argument;
        failed.store(false, std::memory_order_relaxed);
        error = nullptr;
    }
    void work(int thread) noexcept
    {
        const FlushSubnormals flush;
        const bool outer = std::exchange(inside, true);
        try {
            for (int k = 0; k < part_count; k++) {
                Part& part = parts[(thread + k) % part_count];
                for (std::int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;)
                    body(context, i);
            }
        } catch (...) {
            for (int k = 0; k < part_count; k++) parts[k].next.store(parts[k].end, std::memory_order_relaxed);
            if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
        }
        inside = outer;
    }
};

void pause_cpu()
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int spins = 2000;  // tens of microseconds: about the time between two loops of one forward pass

// Waits until value is no longer `old`.
void wait_changed(std::atomic<std::uint32_t>& value, std::uint32_t old)
{
    for (int i = 0; i < spins; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause_cpu();
    }
    value.wait(old, std::memory_order_acquire);
}

// A caller's loops and those who help with them: call serve() from each helper.
class Team {
public:
    void run(int threads, std::int64_t count, void (*body)(void*, std::int64_t), void* context)
    {
        loop_.start(threads, count, body, context);
        gate_.store(static_cast<std::uint32_t>(threads - 1) * one_place, std::memory_order_release);
        rounds_.fetch_add(1, std::memory_order_release);
        rounds_.notify_all();
        loop_.work(0);
        std::uint32_t gate = gate_.fetch_and(one_place - 1, std::memory_order_acquire) & (one_place - 1);
        for (; gate != 0; gate = gate_.load(std::memory_order_acquire)) wait_changed(gate_, gate);
        if (loop_.error) std::rethrow_exception(std::exchange(loop_.error, nullptr));
    }

    void serve(int thread)  // until dismissed; thread: 1, 2, ...
    {
        std::uint32_t seen = 0;
        while (!dismissed_.load(std::memory_order_acquire)) {
            wait_changed(rounds_, seen);
            seen = rounds_.load(std::memory_order_acquire);
            std::uint32_t gate = gate_.load(std::memory_order_relaxed);
            while (gate >= one_place &&
                   !gate_.compare_exchange_weak(gate, gate - one_place + 1, std::memory_order_acquire,
                                                std::memory_order_relaxed)) {
            }
            if (gate < one_place) continue;
            loop_.work(thread);
            gate_.fetch_sub(1, std::memory_order_release);
            gate_.notify_one();
        }
    }

    void dismiss()  // outside any loop
    {
        dismissed_.store(true, std::memory_order_release);
        rounds_.fetch_add(1, std::memory_order_release);
        rounds_.notify_all();
    }

private:
    static constexpr std::uint32_t one_place = 1u << 16;  // gate: free places * one_place + helpers inside

    std::atomic<bool> dismissed_{false};
    std::atomic<std::uint32_t> gate_{0}, rounds_{0};
    Loop loop_;
};

thread_local Team* current_team = nullptr;  // of the program that this thread runs

#if defined(VIMCORE_OPENMP)

// A loop outside any program.
void run_team(int threads, std::int64_t count, void (*body)(void*, std::int64_t), void* context)
{
    Loop loop;
    loop.start(threads, count, body, context);
#pragma omp parallel num_threads(threads)
    loop.work(omp_get_thread_num());
    if (loop.error) std::rethrow_exception(loop.error);
}

// One parallel region for the whole program. Its loops use our own gate: they never wait for a thread that the system
// has not scheduled, as OpenMP's barriers do.
void run_program(int threads, void (*program)(void*), void* context)
{
    Team team;
    std::exception_ptr error;
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            current_team = &team;
            try {
                program(context);
            } catch (...) {
                error = std::current_exception();
            }
            current_team = nullptr;
            team.dismiss();
        } else {
            team.serve(omp_get_thread_num());
        }
    }
    if (error) std::rethrow_exception(error);
}

#else

// A team with threads of its own.
class OwnTeam {
public:
    bool take() { return !taken_.exchange(true, std::memory_order_acquire); }
    void give_back() { taken_.store(false, std::memory_order_release); }

    Team& with_helpers(int helpers)
    {
        try {
            while (static_cast<int>(workers_.size()) < helpers)
                workers_.emplace_back([this, thread = static_cast<int>(workers_.size()) + 1] { team_.serve(thread); });
        } catch (const std::system_error& error) {
            throw Error("[threads] cannot start number " + std::to_string(workers_.size() + 2) + " of " +
                        std::to_string(helpers + 1) + ": " + error.code().message() + "; ask for fewer threads");
        }
        return team_;
    }

    void stop()  // at exit, outside any loop
    {
        team_.dismiss();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

private:
    std::atomic<bool> taken_{false};
    Team team_;
    std::vector<std::thread> workers_;
};

constexpr int max_teams = 8;  // concurrent callers with workers; further ones run serially

OwnTeam* teams()
{
    // Never destroyed, so that a forked child cannot touch threads that it does not have.
    static OwnTeam* const all = [] {
        static OwnTeam* const made = new OwnTeam[max_teams];
        std::atexit([] {
            if (forked) return;
            for (int i = 0; i < max_teams; i++)
                if (made[i].take()) made[i].stop();  // and keep it: later loops run serially
        });
        return made;
    }();
    return all;
}

void run_team(int threads, std::int64_t count, void (*body)(void*, std::int64_t), void* context)
{
    thread_local int favourite = 0;  // a caller finds its warm workers again
    OwnTeam* const all = teams();
    for (int tried = 0; tried < max_teams; tried++) {
        OwnTeam& team = all[(favourite + tried) % max_teams];
        if (!team.take()) continue;
        favourite = (favourite + tried) % max_teams;
        struct Returned {
            OwnTeam& team;
            ~Returned() { team.give_back(); }
        } returned{team};
        return team.with_helpers(threads - 1).run(threads, count, body, context);
    }
    run_serially(count, body, context);
}

#endif

// How many of the wanted threads a caller may use now: concurrent callers share the cores.
class Share {
public:
    explicit Share(int wanted) : wanted_(wanted)
    {
        static const int cores = core_count();
        threads = std::min(wanted, std::max(cores, wanted) - active.fetch_add(wanted, std::memory_order_relaxed));
    }
    ~Share() { active.fetch_sub(wanted_, std::memory_order_relaxed); }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

    int threads;

private:
    int wanted_;
};

}  // namespace

int core_count()
{
#if defined(__linux__)
    for (int cores = 1024; cores <= (1 << 18); cores *= 4) {
        cpu_set_t* set = CPU_ALLOC(cores);
        if (!set) break;
        const std::size_t bytes = CPU_ALLOC_SIZE(cores);
        const bool known = sched_getaffinity(0, bytes, set) == 0;
        const int count = known ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (count > 0) return count;
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel_run(int threads, std::int64_t count, void (*body)(void* context, std::int64_t index), void* context)
{
    threads = static_cast<int>(std::min<std::int64_t>({threads, count, max_threads}));
    if (threads <= 1 || inside || forked.load(std::memory_order_relaxed)) return run_serially(count, body, context);
    if (current_team) return current_team->run(threads, count, body, context);
    watch_fork();
    const Share share(threads);
    if (share.threads <= 1) return run_serially(count, body, context);
    run_team(share.threads, count, body, context);
}

void program_run(int threads, void (*program)(void* context), void* context)
{
    threads = std::min(threads, max_threads);
    if (threads <= 1 || inside || current_team || forked.load(std::memory_order_relaxed)) return program(context);
#if defined(VIMCORE_OPENMP)
    watch_fork();
    const Share share(threads);
    if (share.threads > 1) return run_program(share.threads, program, context);
#endif
    program(context);
}

}  // namespace vimcore::cpu
