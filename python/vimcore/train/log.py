# SPDX-License-Identifier: Apache-2.0
"""What a run shows and records: a progress bar, JSON lines, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..utils.files import literal, named
from .checkpoint import rewrite_lines
from .run_files import entry_of


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of the process on the CPU, of torch's allocations on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Writes RUN/log.jsonl and, by the process that writes, shows how far the run is.

    Lines of kind "step" and "eval" as the columns of a table; "start" holds what the learning rate follows
    from and what was noted about the settings, "fault" names a file that was skipped.

    Args:
        steps, done: updates of the whole run, and of what the checkpoint holds.
        whole_epoch: whether the checkpoint was written after the scores of its last epoch.
        resumed: whether there is a checkpoint; without, a log that lies there is of a run that ended before.

    Raises:
        ValueError: a line of the log is no entry of one.
    """

    def __init__(
        self, folder: Path, steps: int, done: int, whole_epoch: bool, writes: bool, resumed: bool
    ) -> None:
        self.writes = writes
        self.skipped: set[str] = set()
        self.bar: tqdm[Any] | None = None
        self.board: Any = None
        self.path = path = folder / "log.jsonl"
        self.begins = not resumed or not path.exists()
        if not writes:
            return

        def before(number: int, line: bytes) -> bool:
            """Whether the line is of what the checkpoint holds."""
            if not resumed:
                return False
            entry = entry_of(line, path, number)
            if entry["kind"] == "fault":
                self.skipped.add(entry["file"])
            if "step" not in entry or entry["step"] < done:
                return True
            return bool(entry["step"] == done and (whole_epoch or entry["kind"] == "step"))

        rewrite_lines(path, before)
        # A name that is not UTF-8 stands there as JSON's escapes.
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  see close()
        if resumed and self.begins:
            self.say(f"vimcore: {path}: not there; a new one begins after update {done}")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        if sys.stderr is not None and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.2)

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self.writes and sys.stderr is not None:  # closed by `2>&-`: tqdm would take stdout
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def record(self, kind: str, **values: Any) -> None:
        """A line of the log; TensorBoard gets the numbers of it."""
        if not self.writes:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no such numbers
        with named(self.path):
            self.file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.board is not None and "step" in values:
            group = f"{kind}/{values['weights']}" if "weights" in values else kind
            for name, value in values.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{group}/{name}", value, values["step"])

    def start(self, **values: Any) -> None:
        """The first line of the log."""
        if self.begins:
            self.record("start", **values)

    def faults(self, found: dict[str, str]) -> None:
        """Files that could not be read; each is told once."""
        for name, reason in found.items():
            if name not in self.skipped:
                self.skipped.add(name)
                self.say(f"vimcore: skipped {literal(name)}: {literal(reason)}")
                self.record("fault", file=name, error=reason)

    def step(self, epoch: int, epochs: int, loss: float, lr: float, rate: float, memory: int) -> None:
        """One update was made, at `rate` images a second."""
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            numbers = f"loss {loss:.3f}, lr {lr:.2e}, {rate:.1f} images/s, {memory / 2**30:.2f} GiB"
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(1)

    def close(self) -> None:
        """Closes what is open."""
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.writes:
            with named(self.path):
                self.file.close()
