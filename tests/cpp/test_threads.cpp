// SPDX-License-Identifier: Apache-2.0
// The parallel loop: every index once, within another loop, from several callers, after an exception and after fork.
#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

using namespace vimcore::cpu;

namespace {

// Every index once, whatever the number of threads.
bool covers(int threads, std::int64_t count)
{
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
    parallel_for(threads, count, [&](std::int64_t i) { seen[static_cast<std::size_t>(i)]++; });
    for (const auto& times : seen)
        if (times != 1) return false;
    return true;
}

void test_threads()
{
    CHECK(core_count() >= 1);
    for (int threads : {0, 1, 2, 3, 8})
        for (std::int64_t count : {0, 1, 2, 7, 1000}) CHECK(covers(threads, count));
    for (int i = 0; i < 2000; i++) CHECK(covers(3, 5));

    std::atomic<int> total{0};  // a loop in a loop
    parallel_for(4, 6, [&](std::int64_t) { parallel_for(4, 10, [&](std::int64_t) { total++; }); });
    CHECK(total == 60);

    std::vector<std::thread> callers;  // wishes differ, so that some get workers beside each other and some do not
    std::atomic<int> good{0};
    for (int i = 0; i < 10; i++)
        callers.emplace_back([&good, i] {
            for (int repeat = 0; repeat < 200; repeat++) good += covers(2 + 3 * i, 33);
        });
    for (std::thread& caller : callers) caller.join();
    CHECK(good == 2000);

    CHECK_THROWS(parallel_for(4, 100,
                              [](std::int64_t i) {
                                  if (i == 50) throw std::runtime_error("50");
                              }),
                 std::runtime_error);
    CHECK(covers(4, 100));

    const pid_t child = fork();
    if (child == 0) _exit(covers(4, 100) ? 0 : 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(covers(4, 100));
}

}  // namespace

int main()
{
    test_threads();
    return check_failures();
}
