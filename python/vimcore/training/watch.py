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

from ..picture_files import printable
from .checkpoint import rewrite_lines


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of the process on the CPU, of torch's allocations on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Writes RUN/log.jsonl and, by the process that writes, shows how far the run is.

    Lines of kind "step" and "eval" as the columns of a table; "fault" names a file that was skipped.
    """

    def __init__(self, folder: Path, steps: int, done: int, whole_epoch: bool, writes: bool) -> None:
        self.writes = writes
        self.skipped: set[str] = set()
        self.bar: tqdm[Any] | None = None
        self.board: Any = None
        if not writes:
            return
        path = folder / "log.jsonl"

        def before(line: bytes) -> bool:
            """Whether the line is of what the checkpoint holds."""
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut by a crash
                return False
            if entry["kind"] == "fault":
                self.skipped.add(entry["file"])
            return bool(
                entry["kind"] == "fault"
                or entry["step"] < done
                or (entry["step"] == done and (whole_epoch or entry["kind"] == "step"))
            )

        rewrite_lines(path, before)
        # Names that are no UTF-8 become JSON's \udc80 to \udcff.
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  closed by close()
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.2)

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def record(self, kind: str, **values: Any) -> None:
        """A line of the log; TensorBoard gets the numbers of it."""
        if not self.writes:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no such numbers
        self.file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.board is not None and "step" in values:
            group = f"{kind}/{values['weights']}" if "weights" in values else kind
            for name, value in values.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{group}/{name}", value, values["step"])

    def faults(self, found: dict[str, str]) -> None:
        """Files that could not be read; each is told once."""
        for name, reason in found.items():
            if name not in self.skipped:
                self.skipped.add(name)
                self.say(f"vimcore: skipped {printable(name)}: {reason}")
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
            self.file.close()
