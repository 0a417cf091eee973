// SPDX-License-Identifier: Apache-2.0
// How far a long run is, on standard error: a line that is drawn over on a terminal, else a new line now and then.
#pragma once

#include <chrono>
#include <cstddef>

namespace vim_infer {

class Progress {
public:
    // Shown on a terminal, unless the results go to one too and show it themselves; or where `forced`.
    Progress(std::size_t total, bool forced);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    void advance(std::size_t done);
    void clear();  // before another line is written to the terminal

private:
    using Clock = std::chrono::steady_clock;
    std::size_t total_;
    bool shown_, terminal_, drawn_ = false;
    Clock::time_point start_ = Clock::now(), next_;
};

}  // namespace vim_infer
