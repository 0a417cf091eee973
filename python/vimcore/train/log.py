# SPDX-License-Identifier: Apache-2.0
"""log.jsonl, what a run records: read back, and written beside a progress bar. Reading needs numpy alone."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..utils.files import atomic, literal, named, shortened
from ..utils.times import duration

if TYPE_CHECKING:
    from tqdm import tqdm

    from .track import Tracker

_TABLES = {
    "step": ("step", "epoch", "loss", "lr", "images_per_second", "grad_norm"),
    "eval": ("step", "epoch", "loss", "top1", "top5"),
}


@dataclass(frozen=True)
class Log:
    """The lines of log.jsonl of either kind, by step, as columns; what a line lacks is NaN."""

    steps: dict[str, NDArray[np.float64]]
    evals: dict[str, dict[str, NDArray[np.float64]]]  # "raw" and "ema" weights


def entry_of(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of log.jsonl.

    Raises:
        ValueError: it is not JSON, or a field is missing or of another kind; names file, line and field.
    """
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: no entry of a log: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: no entry of a log: expected an object, got {_brief(entry)}")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise ValueError(f"{where}: kind: expected one of {', '.join(_ENTRIES)}, got {_brief(kind)}")
    for field, (wanted, fits) in _ENTRIES[kind].items():
        if field not in entry and field not in _OPTIONAL[kind]:
            raise ValueError(f"{where}: {field}: expected {wanted}, but it is not there")
        if field in entry and not fits(entry[field]):
            raise ValueError(f"{where}: {field}: expected {wanted}, got {_brief(entry[field])}")
    return entry


def _brief(value: Any) -> str:
    return shortened(json.dumps(value), 60)


def _is_real(value: Any) -> bool:
    """A number that float64 can hold, NaN and inf among them."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_finite(value: Any) -> bool:
    return _is_real(value) and math.isfinite(value)


_COUNT = ("a whole number, 1 or more", lambda value: type(value) is int and 1 <= value < 1 << 63)
_TIME = ("a finite number, 0 or more", lambda value: _is_finite(value) and value >= 0)
_ANY = ("a number or null", lambda value: value is None or _is_real(value))
_SHARE = ("a number from 0 to 1", lambda value: _is_finite(value) and 0 <= value <= 1)
_TEXT = ("text", lambda value: isinstance(value, str))
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "start": (),
    "longer": (),
    "step": ("images_per_second", "grad_norm"),
    "eval": ("loss", "top1", "top5"),  # other tasks have other figures
    "fault": (),
}
_ENTRIES: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "start": {},
    "longer": {"step": _COUNT, "epochs": _COUNT, "updates": _COUNT},
    "step": {
        "step": _COUNT,
        "epoch": _TIME,
        "loss": _ANY,
        "lr": _TIME,
        **dict.fromkeys(_OPTIONAL["step"], _ANY),
    },
    "eval": {"step": _COUNT, "epoch": _TIME, "loss": _ANY, "top1": _SHARE, "top5": _SHARE, "weights": _TEXT},
    "fault": {"file": _TEXT, "error": _TEXT},
}


def read_log(path: Path) -> Log:
    """The log of a run, also while it is being written: a last line without an end is left out.

    Raises:
        ValueError: a line is not JSON or holds no numbers where they belong; names file and line.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        entry = entry_of(line, path, number)
        if entry["kind"] in ("step", "eval"):
            key = "step" if entry["kind"] == "step" else entry["weights"]
            found.setdefault(key, {})[entry["step"]] = entry  # of a step done again, the last
    columns = {
        key: _columns([rows[step] for step in sorted(rows)], _TABLES["step" if key == "step" else "eval"])
        for key, rows in found.items()
    }
    steps = columns.pop("step", {name: np.empty(0) for name in _TABLES["step"]})
    return Log(steps, columns)


def _columns(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Of these fields, and of what other numbers the task logs."""
    further = [name for row in rows for name, value in row.items() if _is_real(value)]
    return {
        name: np.array([row[name] if _is_real(row.get(name)) else math.nan for row in rows], np.float64)
        for name in dict.fromkeys([*fields, *further])
    }


# ---- writing -----------------------------------------------------------------------------------------------


class RunLog:
    """Writes RUN/log.jsonl and, by the process that writes, shows how far the run is.

    Lines of kind "step" and "eval" as the columns of a table; "start" holds what the learning rate follows
    from and what was noted about the settings, "longer" the new length of a run that was prolonged after an
    update, "fault" names a file that was skipped.

    Args:
        trackers: that get the numbers as well.
        steps, done: updates of the whole run, and of what the checkpoint holds.
        whole_epoch: whether the checkpoint was written after the scores of its last epoch.
        resumed: whether there is a checkpoint; without, a log that lies there is of a run that ended before.

    Raises:
        ValueError: a line of the log is no entry of one.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        done: int,
        *,
        whole_epoch: bool,
        writes: bool,
        resumed: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.writes = writes
        self.skipped: set[str] = set()
        self.bar: tqdm[Any] | None = None
        self.trackers = trackers
        self.path = path = folder / "log.jsonl"
        self.begins = not resumed or not path.exists()
        self.steps, self.done = steps, done
        self.made, self.begun = 0, time.monotonic()  # updates by this process, and since when
        self.announced = steps  # the length that the log speaks of
        if not writes:
            return

        def before(number: int, line: bytes) -> bool:
            """Whether the line is of what the checkpoint holds."""
            if not resumed:
                return False
            entry = entry_of(line, path, number)
            if entry["kind"] == "fault":
                self.skipped.add(entry["file"])
            self.announced = entry.get("updates", self.announced)
            if "step" not in entry or entry["step"] < done:
                return True
            return bool(entry["step"] == done and (whole_epoch or entry["kind"] != "eval"))

        _rewrite(path, before)
        # A name that is not UTF-8 stands there as JSON's escapes.
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  see close()
        if resumed and self.begins:
            self.say(f"vimcore: {path}: not there; a new one begins after update {done}")
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.2)

    def say(self, text: str) -> None:
        """Lines on stderr, above the bar; names in them are shown by `literal`."""
        if self.writes and sys.stderr is not None:  # closed by `2>&-`: tqdm would take stdout
            from tqdm import tqdm

            tqdm.write("\n".join(map(literal, text.split("\n"))), file=sys.stderr)
            sys.stderr.flush()

    def record(self, kind: str, **values: Any) -> None:
        """A line of the log; trackers get the numbers of it."""
        if not self.writes:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no such numbers
        with named(self.path):
            self.file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.trackers and kind in ("step", "eval"):
            group = f"{kind}/{values['weights']}" if "weights" in values else kind
            numbers = {
                f"{group}/{name}": value
                for name, value in values.items()
                if name not in ("step", "epoch") and isinstance(value, (int, float))
            }
            for tracker in self.trackers:
                tracker.log(numbers, values["step"])

    def start(self, **values: Any) -> None:
        """The first line of the log, or that the run became longer."""
        if self.begins:
            self.record("start", **values)
        elif self.announced != self.steps:
            self.say(f"the run becomes longer: {self.steps} updates, not {self.announced}")
            self.record("longer", step=self.done, epochs=values["epochs"], updates=self.steps)

    def errors(self, found: dict[str, str]) -> None:
        """Files that could not be read; each is told once."""
        for name, reason in found.items():
            if name not in self.skipped:
                self.skipped.add(name)
                self.say(f"vimcore: skipped {literal(name)}: {literal(reason)}")
                self.record("fault", file=name, error=reason)

    def step(
        self, epoch: int, epochs: int, loss: float, lr: float, rate: float, memory: int, tell: bool
    ) -> None:
        """One update was made, at `rate` images a second; `tell`: worth a line where there is no terminal."""
        self.made += 1
        numbers = f"loss {loss:.3f}, lr {lr:.2e}, {rate:.1f} images/s, {memory / 2**30:.2f} GiB"
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(1)
        elif tell:
            update, seconds = self.done + self.made, time.monotonic() - self.begun
            left = duration(seconds / self.made * (self.steps - update))
            self.say(f"epoch {epoch}/{epochs}, update {update}/{self.steps}: {numbers}, {left} left")

    def close(self) -> None:
        """Closes what is open."""
        if self.bar is not None:
            self.bar.close()
        for tracker in self.trackers:
            tracker.finish()
        if self.writes:
            with named(self.path):
                self.file.close()


def _rewrite(path: Path, keep: Callable[[int, bytes], bool]) -> None:
    """Drops the lines of a file that `keep(number, line)` refuses, and a last one without an end."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        with atomic(path) as file:
            file.writelines(
                line for number, line in enumerate(lines, 1) if line.endswith(b"\n") and keep(number, line)
            )
