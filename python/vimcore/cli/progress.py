# SPDX-License-Identifier: Apache-2.0
"""How far a command is, on stderr: as vim-infer shows it, where a terminal can draw a line over again."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from ..utils.times import duration

_FIRST, _EVERY = 1.0, 0.2  # seconds: what is done at once needs no progress


class Progress:
    """A line on a terminal, unless results go to a terminal, too, and show it themselves.

    Args:
        total: how many there are.
        what: their name.
    """

    def __init__(self, total: int, what: str = "images") -> None:
        self.total, self.what, self.done = total, what, 0
        self.shown = _is_terminal(sys.stderr) and not _is_terminal(sys.stdout)
        self.begun = time.monotonic()
        self.next = self.begun + _FIRST
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
        if not self.shown or now < self.next or not self.done:
            return
        self.next = now + _EVERY
        rate = self.done / (now - self.begun)
        left = duration((self.total - self.done) / rate)
        text = f"{self.done}/{self.total} {self.what}, {rate:.1f}/s, {left} left"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self.drawn = True

    def clear(self) -> None:
        """Takes the line away, before another is written."""
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.drawn = False


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())
