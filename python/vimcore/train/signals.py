# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C end a run after a checkpoint, also where it waits for images that do not come."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

PATIENCE = 5.0  # seconds that a read may still take after a signal
APART = 0.5  # seconds: signals closer than that are one, told twice (by a shell and by torchrun)
T = TypeVar("T")


class Stopped(Exception):
    """SIGTERM or Ctrl-C: everything is in the checkpoint. `status` is the shell's for the signal.

    Args:
        folder: of the run; None: it has no checkpoint yet.
        when: in words.
    """

    def __init__(self, number: int, folder: Path | None, when: str) -> None:
        then = "nothing was learnt" if folder is None else f"go on with: vimcore train --resume {folder}"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}; {then}")
        self.status = 128 + number


class Stuck(BaseException):
    """A signal came, and a read does not end. Not an Exception: what reads images must not catch it."""


class Signals:
    """Signals that came. What is being computed ends first; a wait for images, or the set-up, does not."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.first = 0.0  # when
        self.process = os.getpid()
        self.waiting, self.setting_up, self.over = False, True, False

    @property
    def place(self) -> str:
        """Where a wait, or the set-up, was broken off, in words."""
        if self.setting_up:
            return "before the first update"
        return "while it waited for images that did not come"

    def end(self) -> None:
        """Nothing more is broken off: the run is ending."""
        self.over = True
        self._waited()

    def _waited(self) -> None:
        self.waiting = False
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def number(self) -> int:
        """The first signal; 0: none."""
        return self.received[0] if self.received else 0

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        if os.getpid() != self.process:
            return  # a process that loads images: it ends with the one that it loads for
        again = bool(self.received) and time.monotonic() - self.first >= APART
        if not self.received:
            self.first = time.monotonic()
        self.received.append(number)
        if self.over or not (self.waiting or self.setting_up):
            if again and number == signal.SIGINT:
                raise KeyboardInterrupt
        elif again or self.setting_up:
            raise Stuck
        else:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def expire(self, *_: object) -> None:
        """The handler of the timer."""
        if self.waiting and not self.over and os.getpid() == self.process:
            raise Stuck

    def waited(self, values: Iterable[T]) -> Iterator[T]:
        """The values; while one is awaited, a signal ends the wait: at once if it is the second."""
        iterator = iter(values)
        while True:
            with self._wait():
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value

    @contextlib.contextmanager
    def _wait(self) -> Iterator[None]:
        self.waiting = True
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            yield
        finally:
            self._waited()


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Collects SIGTERM and Ctrl-C instead of dying of them; until `setting_up` is made false, they end it."""
    found = Signals()
    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, found.note)
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, found.expire)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
