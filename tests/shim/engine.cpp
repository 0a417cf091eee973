// SPDX-License-Identifier: Apache-2.0
// The scheduler: a queue of threads that can go on, some fibers to run them on, and the places where threads wait for
// each other. A fiber whose thread ends takes the next one that has not begun, so kernels without barriers never
// switch.
#include "engine.h"

#include <atomic>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "fiber.h"
#include "race.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

namespace vimcore::shim {
namespace {

enum class Wait : std::uint8_t { none, block, group, warp, shuffle, product, ended };

struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
};

struct Thread {
    uint3 index{};
    Fiber* fiber = nullptr;  // none before it begins and after it ends
    Wait wait = Wait::none;
    int barrier = 0;
    Where where;
    std::vector<Copy> copies;
    std::vector<std::size_t> groups;  // number of copies in each committed group
    std::size_t open = 0;             // copies since the last commit
};

struct Barrier {
    int count = 0;
    std::vector<int> waiting;
};

struct Warp {
    int lanes = 0, arrived = 0, generation = 0;
    Wait kind = Wait::none;  // of the lanes that have arrived
    int mask = 0;
    Where where;
    float values[2][32][warp_values];
};

struct Engine {
    const Launch* launch = nullptr;
    std::uint64_t seed = 1, random = 0, launches = 0;

    Fiber main;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;

    int count = 0, current = 0, live = 0, policy = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<int> ready;  // circular
    unsigned head = 0, tail = 0;

    std::unique_ptr<std::byte, void (*)(void*)> memory{nullptr, std::free};
    Races races;
    std::exception_ptr exception;  // ends the launch

    Engine()
    {
        if (const char* text = std::getenv("VIMCORE_SHIM_SEED")) seed = std::strtoull(text, nullptr, 10);
    }
};
Engine engine;
constexpr unsigned ready_size = 2048;

std::uint64_t draw()
{
    std::uint64_t x = engine.random += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// The numbers below n in an order drawn at random: i -> (first + i step) mod n.
struct Order {
    std::uint64_t n, first = 0, step = 1;
    explicit Order(std::uint64_t size) : n(size)
    {
        if (engine.seed == 0) return;
        first = draw() % n;
        do step = draw() % n + 1;
        while (std::gcd(step, n) != 1);
    }
    std::uint64_t operator[](std::uint64_t i) const
    {
        return static_cast<std::uint64_t>((first + static_cast<unsigned __int128>(i) * step) % n);
    }
};

std::string text(const uint3& i) { return join("(", i.x, ", ", i.y, ", ", i.z, ")"); }

std::string describe(int thread)
{
    const Thread& t = engine.threads[thread];
    switch (t.wait) {
        case Wait::block:
            return join("waits at sync_block (", at(t.where), ")");
        case Wait::group:
            return join("waits at sync_group ", t.barrier, " (", at(t.where), ")");
        case Wait::warp:
            return join("waits at sync_warp (", at(t.where), ")");
        case Wait::shuffle:
            return join("waits at shuffle_xor (", at(t.where), ")");
        case Wait::product:
            return join("waits at multiply_add (", at(t.where), ")");
        case Wait::ended:
            return "has ended";
        case Wait::none:
            break;
    }
    return "goes on";
}

// No thread can go on, but some wait.
void report_deadlock()
{
    int waiting = 0;
    while (engine.threads[waiting].wait == Wait::ended) waiting++;
    const Thread& t = engine.threads[waiting];
    const bool whole_block = t.wait == Wait::block || t.wait == Wait::group;
    int arrived = 0, other = -1;
    for (int i = 0; i < engine.count; i++) {
        if (!whole_block && i / 32 != waiting / 32) continue;
        const Thread& o = engine.threads[i];
        if (o.wait == t.wait && o.barrier == t.barrier)
            arrived++;
        else if (other < 0)
            other = i;
    }
    std::string message =
        join("divergent barrier: thread ", text(t.index), " ", describe(waiting), " with ", arrived, " threads");
    if (t.wait == Wait::group) message += join(" of ", engine.barriers[t.barrier].count);
    if (other >= 0) message += join(", thread ", text(engine.threads[other].index), " ", describe(other));
    message += join("; kernel ", engine.launch->kernel, ", block ", text(blockIdx));
    engine.exception = std::make_exception_ptr(Failure(message));
}

bool some_ready() { return engine.head != engine.tail; }
void push_back(int thread) { engine.ready[engine.tail++ % ready_size] = thread; }
void push_front(int thread) { engine.ready[--engine.head % ready_size] = thread; }

void make_ready(int thread, bool front)
{
    engine.threads[thread].wait = Wait::none;
    front ? push_front(thread) : push_back(thread);
}
bool draw_front() { return engine.policy == 0 || (engine.policy == 1 && (draw() & 1)); }

void set_current(int thread)
{
    engine.current = thread;
    threadIdx = engine.threads[thread].index;
}

void entry();

Fiber& idle_fiber()
{
    if (engine.idle.empty()) {
        engine.fibers.push_back(std::make_unique<Fiber>());
        prepare(*engine.fibers.back(), static_cast<int>(engine.fibers.size()) - 1, entry);
        engine.idle.push_back(engine.fibers.back().get());
    }
    Fiber& fiber = *engine.idle.back();
    engine.idle.pop_back();
    return fiber;
}

// Leaves `self` for the next thread that can go on; for the main stack where there is none or something failed.
void leave(Fiber& self)
{
    if (!engine.exception && !some_ready() && engine.live > 0) report_deadlock();
    if (engine.exception || engine.live == 0) {
        switch_fiber(self, engine.main);
        return;
    }
    const int next = engine.ready[engine.head++ % ready_size];
    set_current(next);
    Thread& thread = engine.threads[next];
    if (!thread.fiber) thread.fiber = &idle_fiber();
    if (thread.fiber != &self) switch_fiber(self, *thread.fiber);
}

void end_thread()
{
    Thread& thread = engine.threads[engine.current];
    if (!thread.copies.empty()) fail("the thread ends with copies that it has not waited for (cp_async_wait)");
    thread.groups.clear();
    thread.wait = Wait::ended;
    engine.live--;
}

#if VIMCORE_SHIM_HARSH
// Rubbish where a thread's local variables will lie: NaN, or -1.
[[gnu::noinline]] void fill_stack()
{
    unsigned char rubbish[16 * 1024];
    std::memset(rubbish, 0xff, sizeof rubbish);
    asm volatile("" : : "r"(rubbish) : "memory");
}
#else
void fill_stack() {}
#endif

// What a fiber does: threads, one after the other.
void entry()
{
    entered();
    for (;;) {
        Fiber& self = *engine.threads[engine.current].fiber;
        try {
            fill_stack();
            engine.launch->thread();
            end_thread();
        } catch (...) {
            engine.exception = std::current_exception();
        }
        engine.threads[engine.current].fiber = nullptr;
        engine.idle.push_back(&self);
        leave(self);  // may come straight back: the fiber on top of the idle ones is this one
    }
}

void wait_here(Wait wait, int barrier, const Where& where)
{
    Thread& thread = engine.threads[engine.current];
    thread.wait = wait;
    thread.barrier = barrier;
    thread.where = where;
    leave(*thread.fiber);
}

bool same(const Where& a, const Where& b)
{
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

void run_block(const Order& order)
{
    const Launch& launch = *engine.launch;
    void* memory = nullptr;  // exactly as large as asked for, so that AddressSanitizer sees its ends
    if (posix_memalign(&memory, 128, launch.shared)) throw std::bad_alloc();
    engine.memory.reset(static_cast<std::byte*>(memory));
    fill_poison(memory, launch.shared);
    engine.races.start_block((engine.count + 31) / 32);
    engine.head = engine.tail = ready_size;
    engine.live = engine.count;
    engine.policy = engine.seed == 0 ? 2 : static_cast<int>(draw() % 3);
    for (Warp& warp : engine.warps) warp.arrived = 0;
    for (Barrier& barrier : engine.barriers) barrier.waiting.clear();
    for (int i = 0; i < engine.count; i++) make_ready(static_cast<int>(order[i]), false);
    leave(engine.main);
}

// Forgets all threads as they are: their stacks will not be gone back to.
void discard()
{
    for (std::size_t i = 0; i < engine.fibers.size(); i++) prepare(*engine.fibers[i], static_cast<int>(i), entry);
    engine.idle.clear();
    for (auto& fiber : engine.fibers) engine.idle.push_back(fiber.get());
    engine.threads.clear();
    engine.races = Races{};
}

[[noreturn]] void fail_access(const Races::Conflict& conflict, std::size_t offset, std::size_t bytes, const char* what)
{
    const std::string place = join(what, " of ", bytes, " bytes at byte ", offset, " of shared memory");
    const std::string other = "thread " + text(engine.threads[conflict.thread].index);
    if (conflict.pending)
        fail(join("copy under way: ", place, ", to which a copy of ", other, " has not been waited for"));
    fail(join("race: ", place, conflict.write ? ", written by " : ", read by ", other, " with no barrier between"));
}

std::size_t offset_of(const void* address)
{
    return static_cast<std::size_t>(static_cast<const std::byte*>(address) - engine.memory.get());
}

}  // namespace

void set_seed(std::uint64_t seed) { engine.seed = seed; }
bool race_checks = [] {
    const char* text = std::getenv("VIMCORE_SHIM_RACE");
    return !text || std::atoi(text) != 0;
}();
void set_race_checks(bool on) { race_checks = on; }

std::uint64_t ulp_seed = [] {
    const char* text = std::getenv("VIMCORE_SHIM_ULP");
    return text ? std::strtoull(text, nullptr, 10) : std::uint64_t{0};
}();
float off_by_ulps(float argument, float exact)
{
    if (!std::isnormal(exact)) return exact;
    std::uint64_t x = std::bit_cast<std::uint32_t>(argument) + ulp_seed * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    const auto ulps = static_cast<std::int32_t>((x >> 40) % 3);  // 0, 1, 2
    const bool down = ulp_seed % 3 == 2 || (ulp_seed % 3 == 0 && (x & 1) != 0);
    const float y = std::bit_cast<float>(std::bit_cast<std::int32_t>(exact) + (down ? -ulps : ulps));
    return std::isnormal(y) ? y : exact;
}

std::string at(const Where& where)
{
    const char* name = std::strrchr(where.file_name(), '/');
    return join(name ? name + 1 : where.file_name(), ":", where.line());
}

void fill_poison(void* memory, std::size_t bytes)
{
    auto* to = static_cast<unsigned char*>(memory);
    std::size_t i = 0;
    for (; i + 4 <= bytes; i += 4) std::memcpy(to + i, poison, 4);
    for (; i < bytes; i++) to[i] = poison[i % 4];
}

static std::atomic<bool> runs = true;
void set_running(bool on) { runs = on; }
bool running() { return runs; }

void fail(const std::string& what)
{
    throw Failure(
        join(what, "; kernel ", engine.launch->kernel, ", block ", text(blockIdx), ", thread ", text(threadIdx)));
}

void run(const Launch& launch)
{
    if (!runs) return;
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    std::fenv_t environment;
    std::fegetenv(&environment);
    std::fesetenv(FE_DFL_ENV);  // kernels do not flush subnormals, whatever the host thread does

    engine.launch = &launch;
    engine.random = engine.seed * 0x2545f4914f6cdd1du + engine.launches++;
    engine.count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    engine.ready.resize(ready_size);
    engine.threads.resize(engine.count);
    engine.warps.resize((engine.count + 31) / 32);
    for (int i = 0; i < engine.count; i++) {
        const unsigned x = i % launch.block.x, y = i / launch.block.x % launch.block.y;
        engine.threads[i].index = {x, y, i / launch.block.x / launch.block.y};
        engine.warps[i / 32].lanes = i % 32 + 1;
    }
    engine.races.start_launch(launch.shared);
    blockDim = launch.block;
    gridDim = launch.grid;
    const std::uint64_t blocks = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    const Order order(blocks);
    for (std::uint64_t i = 0; i < blocks && !engine.exception; i++) {
        const std::uint64_t b = order[i];
        blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                    static_cast<unsigned>(b / gridDim.x / gridDim.y)};
        run_block(Order(engine.count));
    }
    engine.memory.reset();
    std::fesetenv(&environment);
    if (!engine.exception) return;
    discard();
    std::rethrow_exception(std::exchange(engine.exception, nullptr));
}

// The last to arrive lets the others go.
static void meet(Barrier& barrier, Wait kind, int id, int count, const Where& where)
{
    const int self = engine.current;
    for (const int other : barrier.waiting) {
        if (kind == Wait::group && other / 32 != self / 32) continue;
        if (!same(engine.threads[other].where, where))
            fail(join("divergent barrier: at ", at(where), ", while thread ", text(engine.threads[other].index), " ",
                      describe(other)));
        break;  // the others were compared with this one
    }
    barrier.count = count;
    barrier.waiting.push_back(self);
    if (static_cast<int>(barrier.waiting.size()) < count) {
        wait_here(kind, id, where);
        return;
    }
    if (kind == Wait::block) {
        engine.races.order_all();
    } else {
        int lanes[32] = {};
        std::uint32_t warps = 0;
        for (const int thread : barrier.waiting) {
            lanes[thread / 32]++;
            warps |= 1u << (thread / 32);
        }
        for (int w = 0; w < 32; w++)
            if (lanes[w] != 0 && lanes[w] != 32)
                fail(join("sync_group: barrier ", id, " has ", lanes[w], " lanes of warp ", w, " (", at(where), ")"));
        engine.races.order(warps);
    }
    barrier.waiting.pop_back();
    const std::size_t others = barrier.waiting.size(), first = engine.seed == 0 || others == 0 ? 0 : draw() % others;
    const bool front = draw_front();
    for (std::size_t i = first; i < others; i++) make_ready(barrier.waiting[i], front);
    for (std::size_t i = 0; i < first; i++) make_ready(barrier.waiting[i], front);
    barrier.waiting.clear();
}

void block_barrier(const Where& where) { meet(engine.barriers[0], Wait::block, 0, engine.count, where); }

void group_barrier(int id, int count, const Where& where)
{
    if (id < 1 || id > 15) fail(join("sync_group: barrier ", id, " is not one of 1..15 (", at(where), ")"));
    if (count <= 0 || count % 32 != 0 || count > engine.count)
        fail(join("sync_group: ", count, " threads are not whole warps of a block of ", engine.count, " (", at(where),
                  ")"));
    Barrier& barrier = engine.barriers[id];
    if (!barrier.waiting.empty() && barrier.count != count)
        fail(join("sync_group: barrier ", id, " of ", count, " threads (", at(where), "), others wait at it for ",
                  barrier.count));
    meet(barrier, Wait::group, id, count, where);
}

static const char* name_of(Wait kind)
{
    return kind == Wait::warp ? "sync_warp" : kind == Wait::shuffle ? "shuffle_xor" : "multiply_add";
}

// Waits for all lanes of the warp; returns which of the two sets of values was theirs.
static int meet_warp(Wait kind, int mask, const float* values, int count, const Where& where)
{
    const int self = engine.current, lane = self % 32, first = self - lane;
    Warp& warp = engine.warps[self / 32];
    const char* name = name_of(kind);
    if (warp.lanes != 32)
        fail(join(name, ": the block ends within this warp, which has ", warp.lanes, " lanes (", at(where), ")"));
    if (warp.arrived > 0 && (warp.kind != kind || warp.mask != mask || !same(warp.where, where)))
        fail(join("divergent warp: ", name, " at ", at(where), " with mask ", mask, ", while other lanes wait at ",
                  name_of(warp.kind), " at ", at(warp.where), " with mask ", warp.mask));
    warp.kind = kind;
    warp.where = where;
    const int set = warp.generation & 1;
    warp.mask = mask;
    for (int i = 0; i < count; i++) warp.values[set][lane][i] = values[i];
    if (++warp.arrived < 32) {
        wait_here(kind, 0, where);
        return set;
    }
    warp.arrived = 0;
    warp.generation++;
    if (kind == Wait::warp) engine.races.order(1u << (self / 32));
    const bool front = draw_front();
    const int shuffled = engine.seed == 0 ? 0 : static_cast<int>(draw() % 32);
    for (int i = 0; i < 32; i++)
        if (const int other = first + (i ^ shuffled); other != self) make_ready(other, front);
    return set;
}

void warp_barrier(const Where& where) { meet_warp(Wait::warp, 0, nullptr, 0, where); }

float shuffle_xor(float value, int mask, const Where& where)
{
    if (mask < 0 || mask > 31) fail(join("shuffle_xor: mask ", mask, " (", at(where), ")"));
    const int set = meet_warp(Wait::shuffle, mask, &value, 1, where);
    return engine.warps[engine.current / 32].values[set][(engine.current % 32) ^ mask][0];
}

const float (*exchange(const float (&values)[warp_values], const Where& where)) [warp_values] {
    const int set = meet_warp(Wait::product, 0, values, warp_values, where);
    return engine.warps[engine.current / 32].values[set];
} int lane()
{
    return engine.current % 32;
}

std::byte* shared_memory(int offset, std::int64_t bytes, const Where& where)
{
    if (offset < 0 || offset % 16 != 0)
        fail(join("shared memory: offset ", offset, " is not a multiple of 16 (", at(where), ")"));
    if (bytes < 0 || offset + bytes > static_cast<std::int64_t>(engine.launch->shared))
        fail(join("shared memory: bytes ", offset, " to ", offset + bytes, " of ", engine.launch->shared, " (",
                  at(where), ")"));
    return engine.memory.get() + offset;
}

void check_read(const void* address, std::size_t bytes)
{
    const std::size_t offset = offset_of(address);
    const Races::Conflict conflict = engine.races.read(engine.current, offset, bytes);
    if (conflict.found) [[unlikely]]
        fail_access(conflict, offset, bytes, "read");
}

void check_write(const void* address, std::size_t bytes)
{
    const std::size_t offset = offset_of(address);
    const Races::Conflict conflict = engine.races.write(engine.current, offset, bytes);
    if (conflict.found) [[unlikely]]
        fail_access(conflict, offset, bytes, "write");
}

void start_copy(void* to, const void* from, std::size_t bytes)
{
    Thread& thread = engine.threads[engine.current];
    write_shared(to, bytes);
    fill_poison(to, bytes);
    if (race_checks) engine.races.start_copy(offset_of(to), bytes);
    thread.copies.push_back({to, from, bytes});
    thread.open++;
}

void commit_copies()
{
    Thread& thread = engine.threads[engine.current];
    thread.groups.push_back(thread.open);
    thread.open = 0;
}

void wait_copies(std::size_t pending)
{
    Thread& thread = engine.threads[engine.current];
    if (thread.groups.size() <= pending) return;
    std::size_t copies = 0;
    const auto done = static_cast<std::ptrdiff_t>(thread.groups.size() - pending);
    for (std::ptrdiff_t i = 0; i < done; i++) copies += thread.groups[i];
    for (std::size_t i = 0; i < copies; i++) {
        const Copy& copy = thread.copies[i];
        if (copy.from)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
        if (race_checks) engine.races.finish_copy(engine.current, offset_of(copy.to), copy.bytes);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(copies));
    thread.groups.erase(thread.groups.begin(), thread.groups.begin() + done);
}

void fail_index(int index, int elements, int count)
{
    fail(join("shared memory: index ", index, " (", elements, " elements) of ", count));
}

void fail_alignment(std::size_t bytes, const char* what, const Where& where)
{
    fail(join(what, ": address is not a multiple of ", bytes, " (", at(where), ")"));
}

}  // namespace vimcore::shim
