# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML: a run or an evaluation in one file that needs nothing else. Needs no torch.

A task has the module of its name here: how its eval.npz is read, which figures matter most, what is shown.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...tasks import read_settings
from ...tasks.settings import Settings
from ...train.log import Log, entry_of, read_log
from ...utils.files import printable, write_text
from ..curves import curve_figures
from ..run_folders import named_runs
from .page import Section, chart, folded, page, table, text

FILE, LOG, CONFIG = "report.html", "log.jsonl", "config.toml"


def report_runs(
    runs: Sequence[str], out: str | None = None, mistakes: int = 24
) -> tuple[list[str], list[str]]:
    """A report of each run.

    Args:
        runs: folders.
        out: folder to write to; default: each run's own.
        mistakes: the worst images at most.

    Returns:
        The files written; notes on what could not be shown.

    Raises:
        ValueError: a folder is no run, or what lies in it is damaged.
    """
    written: list[str] = []
    notes: list[str] = []
    for run, name in zip(runs, named_runs(runs)):
        folder = Path(out) if out is not None else Path(run)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if out is None or len(runs) == 1 else name.strip("/").replace("/", "-") + "-"
        path = folder / (prefix + FILE)
        write_text(path, _of_run(Path(run), name, mistakes, notes))
        written.append(str(path))
    return written, notes


def report_evaluation(
    task: str, answers: Any, weights: str, rows: Sequence[Sequence[str]], path: Path, mistakes: int = 24
) -> None:
    """A report of an evaluation.

    Args:
        answers: of the best weights, as eval.npz has them; None: only the table.
        weights: that these are of.
        rows: of the table of all weights, the first one its head.
    """
    head, *body = rows
    marked = [head[0], *(f">{name}" for name in head[1:])]
    parts = [Section("Weights", table(marked, [[text(cell) for cell in row] for row in body]))]
    tiles: list[tuple[str, str]] = []
    if answers is not None:
        module = importlib.import_module(f".{task}", __name__)
        tiles = module.tiles(answers)
        parts += module.sections(answers, mistakes, {})
    write_text(path, page(f"Evaluation of {printable(weights)}", "Written by vimcore eval.", tiles, parts))


def _of_run(run: Path, name: str, mistakes: int, notes: list[str]) -> str:
    log, answers, config = run / LOG, run / "eval.npz", run / CONFIG
    if not log.is_file() and not answers.is_file():
        raise ValueError(f"{run}: no run: neither log.jsonl nor eval.npz is there")
    settings = read_settings(str(config)) if config.exists() else None
    module = importlib.import_module(f".{settings.task if settings else 'classify'}", __name__)
    read = read_log(log) if log.is_file() else None
    start, faults = _told(log) if read else ({}, {})
    tiles: list[tuple[str, str]] = []
    parts: list[Section] = []
    if read is not None:
        figures = curve_figures({name: read}, module.SCORED)
        shown = "".join(chart(figure, title) for title, figure in figures)
        parts.append(Section("Training", f'<div class="charts">{shown}</div>'))
        tiles.append(("updates", str(int(read.steps["step"].max(initial=0)))))
    if answers.is_file():
        found = module.read(answers)
        tiles = [*module.tiles(found), *tiles]
        samples = start.get("samples")
        parts += module.sections(found, mistakes, samples if isinstance(samples, dict) else {})
    else:
        notes.append(f"{run}: no eval.npz yet, so only its curves and settings are shown")
    if settings is not None:
        parts.append(Section("Settings", _settings(settings)))
    parts += _notes(start, faults)
    return page(f"Training of {name}", _lead(settings, read), tiles, parts)


def _lead(settings: Settings | None, log: Log | None) -> str:
    words = []
    if settings is not None:
        words.append(f"Learning to {settings.task} from {settings.data or 'what the settings say'}")
    if log is not None and len(log.steps["epoch"]):
        words.append(f"after {log.steps['epoch'][-1]:g} epochs")
    return ", ".join(words) + "." if words else ""


def _told(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The first line of a log, and the files that were skipped."""
    start: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            entry = entry_of(line, path, number)
            if entry["kind"] == "start":
                start = entry
            elif entry["kind"] == "fault":
                faults[entry["file"]] = entry["error"]
    return start, faults


def _settings(settings: Settings) -> str:
    """Those that are not as they are without a preset, and all."""
    plain = type(settings)(task=settings.task)
    changed, every = [], []
    for section in settings.SECTIONS:
        for field in fields(settings):
            if field.metadata["section"] != section:
                continue
            value = getattr(settings, field.name)
            about = f"<small>{text(field.metadata['help'])}</small>"
            row = [text(field.name), text(_shown(value)), about]
            every.append([text(section), *row])
            if value != getattr(plain, field.name):
                changed.append(row)
    body = table(["setting", "~value", "~meaning"], changed)
    return body + folded(
        f"all {len(every)} settings", table(["section", "setting", "~value", "~meaning"], every)
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def _notes(start: Mapping[str, Any], faults: Mapping[str, str]) -> list[Section]:
    found = start.get("notes")
    lines = [str(note) for note in found] if isinstance(found, list) else []
    body = "".join(f"<p>{text(line)}</p>" for line in lines)
    if faults:
        rows = [[text(name), text(reason)] for name, reason in faults.items()]
        body += folded(f"{len(faults)} files were skipped", table(["~file", "~reason"], rows))
    return [Section("Notes", body)] if body else []
