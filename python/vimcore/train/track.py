# SPDX-License-Identifier: Apache-2.0
"""Trackers beside log.jsonl: TensorBoard by torch, all others by accelerate.

A resumed run goes on in its own run of wandb and mlflow, whose names are kept in trackers.json; in other
trackers it opens a new one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..utils.extras import needs
from ..utils.files import write_text

TENSORBOARD = "tensorboard"
RUNS = "trackers.json"  # tracker to its name of the run
# Where a tracker has that name, and the arguments by which it goes on.
_GOES_ON: dict[str, tuple[Callable[[Any], str], Callable[[str], dict[str, str]]]] = {
    "wandb": (lambda run: run.id, lambda name: {"id": name, "resume": "allow"}),
    "mlflow": (lambda run: run.info.run_id, lambda name: {"run_id": name}),
}


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """The numbers of an update, by name."""

    def finish(self) -> None:
        """All were logged."""


def chosen(names: Sequence[str] | None) -> list[str]:
    """The trackers of a run: those named, or TensorBoard where it is installed.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    installed = importlib.util.find_spec(TENSORBOARD) is not None
    if names is None:
        return [TENSORBOARD] if installed else []
    if list(names) == ["none"]:
        return []
    for name in names:
        if name == TENSORBOARD:
            if not installed:
                raise ValueError(f"track: {name} is not installed; {needs('track')}")
            continue
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError(f"track: {name} needs accelerate; {needs('track')}")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
        if name not in known:
            raise ValueError(f"track: expected none or some of {', '.join(known)}, got {name!r}")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"track: the package of {name} is not installed: pip install {name}")
    return list(dict.fromkeys(names))


def open_trackers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], done: int
) -> list[Tracker]:
    """Trackers of a run, by the process that writes.

    Args:
        names: as `chosen` gives them.
        settings: of the run, recorded with it.
        done: updates that were made; what was logged after them is not part of the run.
    """
    return [
        _TensorBoard(folder / TENSORBOARD, done)
        if name == TENSORBOARD
        else _Accelerate(name, folder, settings, done > 0)
        for name in names
    ]


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class _Accelerate:
    """Projects are named after the folder of the run."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # its log messages ask for it
        kind = next(of for known, of in LOGGER_TYPE_TO_CLASS.items() if str(known) == name)
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        runs = _runs(folder) if resumed else {}
        goes_on = name in runs and name in _GOES_ON
        if goes_on:
            place |= _GOES_ON[name][1](runs[name])
        self.tracker = kind(folder.resolve().name, **place)
        try:
            if hasattr(self.tracker, "start"):  # later versions
                self.tracker.start()
        except Exception as error:  # of any package
            again = f"; without {folder / RUNS} a new run is opened there" if goes_on else ""
            raise RuntimeError(f"track: {name}: {error}{again}; --track none does without") from error
        if name in _GOES_ON:
            runs = {**_runs(folder), name: _GOES_ON[name][0](self.tracker.tracker)}
            write_text(folder / RUNS, json.dumps(runs) + "\n")
        if goes_on:  # it has its settings, and mlflow lets none change
            return
        plain = (bool, int, float, str)
        config = {k: v if isinstance(v, plain) else str(v) for k, v in settings.items() if v is not None}
        self.tracker.store_init_configuration(config)

    def log(self, values: dict[str, float], step: int) -> None:
        self.tracker.log(values, step=step)

    def finish(self) -> None:
        self.tracker.finish()


def _runs(folder: Path) -> dict[str, str]:
    """The names in trackers.json; none where there is no such file, or another one."""
    try:
        found = json.loads((folder / RUNS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
