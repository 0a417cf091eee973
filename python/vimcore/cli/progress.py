# SPDX-License-Identifier: Apache-2.0
"""How far a command is, on stderr, as vim-infer shows it: a line that is drawn over on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from ..utils.times import duration

HELP = "show progress also where standard error is no terminal"
FIRST, EVERY, EVERY_LINE = 2.0, 0.2, 5.0  # seconds: what is soon done needs no progress


class Progress:
    """A line on a terminal, unless results go to a terminal, too, and show it themselves.

    Args:
        total: how many there are.
        forced: show it at once, and also where there is no terminal: a new line now and then.
    """

    def __init__(self, total: int, forced: bool = False) -> None:
        self.total, self.forced, self.done = total, forced, 0
        self.terminal = _is_terminal(sys.stderr)
        self.shown = forced or (self.terminal and not _is_terminal(sys.stdout))
        self.begun = time.monotonic()
        self.next = self.begun + (0 if forced else FIRST)
        self.told = forced  # something was, or will be
        self.drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def advance(self, done: int | None = None) -> None:
        """So many are done; None: one more."""
        self.done = self.done + 1 if done is None else done
        now = time.monotonic()
        last = self.done == self.total and self.told
        if not self.shown or not self.done or (now < self.next and not last):
            return
        self.next = now + (EVERY if self.terminal else EVERY_LINE)
        rate = self.done / max(now - self.begun, 1e-9)
        left = duration((self.total - self.done) / rate)
        before, after = ("\r\033[K", "") if self.terminal else ("", "\n")
        text = f"{self.done}/{self.total} images, {rate:.1f}/s, {left} left"
        print(before + text, end=after, file=sys.stderr, flush=True)
        self.drawn, self.told = self.terminal, True

    def clear(self) -> None:
        """Takes the line away, before another is written."""
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.drawn = False


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())
