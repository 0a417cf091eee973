# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C end a run after a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class Stopped(Exception):
    """SIGTERM or Ctrl-C: everything is in the checkpoint. `status` is the shell's for the signal."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after update {step}; "
            f"go on with: vimcore train --resume {folder}"
        )
        self.status = 128 + number


class Interrupted(Stopped):
    """SIGTERM or Ctrl-C while nothing was computed: raised at once, as the wait might never end."""

    def __init__(self, number: int) -> None:
        Exception.__init__(self, f"stopped by {signal.Signals(number).name} before the first update")
        self.number, self.status = number, 128 + number


class Received(list[int]):
    """The signals that came, in order."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone, self.waiting = alone, False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises Interrupted. Not where several processes must agree on when to stop."""
        self.waiting = self.alone
        try:
            if self and self.waiting:
                raise Interrupted(self[0])
            yield
        finally:
            self.waiting = False


@contextlib.contextmanager
def signals(alone: bool = True) -> Iterator[Received]:
    """Collects SIGTERM and the first Ctrl-C instead of dying of it."""
    received = Received(alone)

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if received.waiting:
            raise Interrupted(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
