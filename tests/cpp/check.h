// SPDX-License-Identifier: Apache-2.0
// Checks that print where they failed and are counted; main ends with `return check_failures();`.
#pragma once

#include <cmath>
#include <cstdio>

inline int check_failed = 0, check_done = 0;

inline void check_report(bool passed, const char* file, int line, const char* what)
{
    check_done++;
    if (passed) return;
    if (++check_failed <= 50) std::printf("%s:%d: failed: %s\n", file, line, what);
}

inline void check_close(double a, double b, double tolerance, const char* file, int line, const char* what)
{
    check_done++;
    if (std::abs(a - b) <= tolerance) return;  // false for NaN
    if (++check_failed <= 50)
        std::printf("%s:%d: failed: %s: %.9g and %.9g differ by more than %.3g\n", file, line, what, a, b, tolerance);
}

inline int check_failures()
{
    std::printf("%d checks, %d failed\n", check_done, check_failed);
    return check_failed > 0 || check_done == 0;
}

#define CHECK(condition) check_report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_CLOSE(a, b, tolerance) check_close(a, b, tolerance, __FILE__, __LINE__, #a " ~ " #b)
#define CHECK_THROWS(expression, type)                 \
    do {                                               \
        bool thrown = false;                           \
        try {                                          \
            (void)(expression);                        \
        } catch (const type&) {                        \
            thrown = true;                             \
        }                                              \
        CHECK(thrown && #expression " throws " #type); \
    } while (0)
