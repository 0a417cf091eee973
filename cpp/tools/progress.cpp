// SPDX-License-Identifier: Apache-2.0
#include "progress.h"

#include <unistd.h>

#include <cstdio>

namespace vim_infer {

using namespace std::chrono_literals;

Progress::Progress(std::size_t total, bool forced)
    : total_(total),
      shown_(forced || (::isatty(STDERR_FILENO) && !::isatty(STDOUT_FILENO))),
      terminal_(::isatty(STDERR_FILENO)),
      next_(start_ + (forced ? 0s : 2s))
{
}

Progress::~Progress() { clear(); }

void Progress::advance(std::size_t done)
{
    const Clock::time_point now = Clock::now();
    if (!shown_ || (now < next_ && (done < total_ || next_ == start_ + 2s))) return;
    next_ = now + (terminal_ ? 200ms : 5000ms);
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
    const double left = rate > 0 ? static_cast<double>(total_ - done) / rate : 0;
    std::fprintf(stderr, "%s%zu/%zu images, %.1f/s, %d:%02d left%s", terminal_ ? "\r\033[K" : "", done, total_, rate,
                 static_cast<int>(left) / 60, static_cast<int>(left) % 60, terminal_ ? "" : "\n");
    std::fflush(stderr);
    drawn_ = terminal_;
}

void Progress::clear()
{
    if (drawn_) std::fputs("\r\033[K", stderr);
    drawn_ = false;
}

}  // namespace vim_infer
