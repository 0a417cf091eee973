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


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first Ctrl-C instead of dying of it."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
