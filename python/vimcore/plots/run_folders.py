# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of the runs of any task: which files there are, and which figures are drawn of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..train.log import Log, read_log
from .curves import Scored, plot_curves

T = TypeVar("T")
Draw = Callable[[Path], None]


def plot_run_folders(
    runs: Sequence[str],
    out: str | None,
    kind: str,
    scored: Scored,
    read: Callable[[Path], T],
    figures: Callable[[T, str], Iterable[tuple[str, Draw]]],
) -> tuple[list[str], list[str]]:
    """Draws the curves of all runs, and of every run that was evaluated its own figures.

    Args:
        runs: folders, named in figures by their last part, or by their path where two are the same.
        out: folder to write to; default: the run, or the current folder for several.
        kind: "png" or "svg".
        scored: what is drawn of the log.
        read: of RUN/eval.npz; ValueError says what is wrong with it.
        figures: of what was read and the run's name: names without suffix, and what draws them.

    Returns:
        The files written; notes on what could not be drawn.
    """
    names = named_runs(runs)
    folder = Path(out) if out is not None else Path(runs[0] if len(runs) == 1 else ".")
    logs: dict[str, Log] = {}
    evaluated: dict[str, T] = {}
    notes = []
    for run, name in zip(runs, names):
        log, answers = Path(run) / "log.jsonl", Path(run) / "eval.npz"
        if not log.is_file() and not answers.is_file():
            raise ValueError(f"{run}: no run: neither log.jsonl nor eval.npz is there")
        if log.is_file():
            logs[name] = read_log(log)
        if answers.is_file():
            evaluated[name] = read(answers)
        else:
            notes.append(f"{run}: no eval.npz yet, so only its curves are drawn")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    if logs:
        _draw(folder / f"curves.{kind}", written, lambda path: plot_curves(logs, path, scored))
    for name, found in evaluated.items():
        prefix = "" if len(runs) == 1 else name.strip("/").replace("/", "-") + "-"
        for what, plot in figures(found, name):
            _draw(folder / f"{prefix}{what}.{kind}", written, plot)
    return written, notes


def named_runs(runs: Sequence[str]) -> list[str]:
    """Names of folders in figures: the last part, or the path where two are the same.

    Raises:
        ValueError: one is named twice.
    """
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(Path(run)) for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"a run is named twice among {', '.join(runs)}")
    return names


def _draw(path: Path, written: list[str], plot: Draw) -> None:
    """Draws one of several figures; an error names those already written."""
    try:
        plot(path)
    except (OSError, RuntimeError, ValueError) as error:
        text = f"{path}: cannot be drawn: {error}"
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        before = f"; written before it: {', '.join(written)}" if written else ""
        raise RuntimeError(text + before) from error
    written.append(str(path))
