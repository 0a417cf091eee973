# SPDX-License-Identifier: Apache-2.0
"""Measurements by many runs of `vimcore train`: each figure is kept when it is found."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def kept(file: Path, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Cell:
    """The cell that the file holds, if it has this key; else a new one, which the file then holds."""
    from vimcore.utils.files import write_text

    if file.exists():
        known: Cell = json.loads(file.read_text(encoding="utf-8"))
        if {name: known.get(name) for name in key} == key:
            return known
    cell = {**key, **make()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(cell) + "\n")
    shown = f"loss {cell['loss']:.4f}" if "loss" in cell else f"{100 * cell['accuracy']:.1f} %"
    seconds = cell["cpu_seconds"]
    used = "" if seconds is None else f", {seconds:.1f} CPU s"
    print(f"{time.strftime('%H:%M:%S')} {file.stem}: {shown}{used}", file=sys.stderr, flush=True)
    return cell


def train(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The summary of `vimcore train`, begun or gone on with; what it tells goes to FOLDER.txt.

    `cpu_seconds` are added, over all its parts; None: one of them was killed.

    Raises:
        RuntimeError: it failed, or was stopped; or what was begun had other arguments.
    """
    from vimcore.cli import main as vimcore

    begun, told = (folder / "checkpoint.pt").exists(), folder.with_suffix(".txt")
    spent, asked, wanted = folder / "seconds", folder / "arguments", " ".join(arguments)
    if begun and asked.read_text(encoding="utf-8") != wanted:
        raise RuntimeError(
            f"{folder}: holds a run of other arguments; remove it, or name another folder of runs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(wanted, encoding="utf-8")
    what = ["--resume", str(folder)] if begun else [*arguments, "--out", str(folder)]
    before = float(spent.read_text(encoding="utf-8")) if begun and spent.exists() else 0.0
    known, found, used = spent.exists() or not begun, io.StringIO(), time.process_time()
    spent.unlink(missing_ok=True)
    try:
        with (
            open(told, "w", encoding="utf-8") as text,
            contextlib.redirect_stderr(text),
            contextlib.redirect_stdout(found),
        ):
            status = vimcore(["train", *what, "--json"])
    finally:
        seconds = round(before + time.process_time() - used, 2)
        if known:
            spent.write_text(f"{seconds}\n", encoding="utf-8")
    if status:
        raise RuntimeError(f"{folder}: status {status}; {told} says why")
    return {**json.loads(found.getvalue()), "cpu_seconds": seconds if known else None}


def side_by_side(work: Callable[[Any], list[Cell]], parts: Sequence[Any], jobs: int) -> list[Cell]:
    """The cells of all parts, in their order, found by so many processes; an error ends it."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        futures = [pool.submit(work, part) for part in parts]
        try:
            return [cell for future in futures for cell in future.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def untrained(path: Path, preset: str, **settings: Any) -> None:
    """The weights that pretraining by this preset starts from."""
    from vimcore import tasks
    from vimcore.data.sampling import derive_seed, seed_all
    from vimcore.train.presets import recipe

    of_run, _ = recipe(tasks.settings_type({"task": "pretrain"}), preset, settings)
    task = tasks.create(of_run)
    task.data()
    seed_all(derive_seed("weights", of_run.seed))
    task.save(task.build()[0], path)


def origin(packages: Sequence[str]) -> dict[str, Any]:
    """Date, machine and versions."""
    from vimcore import build_info
    from vimcore.utils.machine import cpu_name, version_of

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{cpu_name()}, {os.cpu_count()} threads",
        "isa": build_info()["isa"],
        "versions": {name: version_of(name) for name in ("vimcore", "torch", "numpy", "timm", *packages)},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every such measurement."""
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="keeps what is done")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="of everything (default: 0,1,2)")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument("--epochs", type=int, help="of pretraining (default: the presets')")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def write(folder: Path | None, name: str, report: Mapping[str, Any], text: str) -> None:
    """The text to stdout; both into the folder, if there is one."""
    print(text, end="")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
