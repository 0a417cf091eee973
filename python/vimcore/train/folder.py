# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: names of its files, its settings, its weights. Needs no torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..tasks.settings import Settings, read_toml
from ..utils.files import listed
from .lock import remove_leftovers

CONFIG, CHECKPOINT, LOG, HEALTH = "config.toml", "checkpoint.pt", "log.jsonl", "health.txt"
BEST, LAST, LAST_EMA = "best.safetensors", "last.safetensors", "last_ema.safetensors"
# What may be another when a run goes on: none of it changes the result, or only how long the run is watched.
MACHINE = ("device", "threads", "workers", "checkpoint_every", "eval_every", "log_every", "track")
S = TypeVar("S", bound=Settings)


def config_of(folder: Path) -> str:
    """Path of the settings of a run.

    Raises:
        ValueError: it is a file, or no run; says what to name.
    """
    path = folder / CONFIG
    if folder.is_file():
        raise ValueError(f"{folder}: a file; name the folder of the run: {folder.parent}")
    if folder.is_dir() and not path.exists():
        runs = sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG}"))
        of_these = f"; runs in it: {listed(runs, most=4)}" if runs else ""
        raise ValueError(f"{folder}: no run of `vimcore train`, as there is no {CONFIG}{of_these}")
    return str(path)


def resumed(kind: type[S], folder: Path, changes: dict[str, Any]) -> S:
    """The settings of a run that goes on; ValueError for changes that would make it another run.

    The run may become longer. Its learning rate is then, from where it goes on, that of a run which had the
    new length from the start: that of a cosine which had ended rises again.

    Args:
        kind: of the run's task.
    """
    path = config_of(folder)
    found = read_toml(path, kind)
    try:
        settings = kind().merged(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    missing = [
        field.name
        for field in fields(settings)
        if field.name not in found
        and getattr(settings, field.name) is not None
        and not field.metadata["later"]
    ]
    if missing:  # the value that it has by default may not be the one that the run began with
        raise ValueError(f"{path}: not there, though the run began with them: {listed(missing)}")
    asked = settings.merged(changes)
    _refuse_another_run(folder, settings, asked)
    return asked


def _refuse_another_run(folder: Path, before: Settings, asked: Settings) -> None:
    """ValueError names the settings that cannot change."""
    length = "epochs" if before.updates is None else "updates"
    old, new = getattr(before, length), getattr(asked, length)
    changed = [
        field.name
        for field in fields(before)
        if getattr(before, field.name) != getattr(asked, field.name) and field.name not in (*MACHINE, length)
    ]
    if changed:
        shown = ", ".join(f"{n} (is {getattr(before, n)}, got {getattr(asked, n)})" for n in changed)
        raise ValueError(
            f"{shown}: cannot change when a run goes on; {', '.join(MACHINE)} can, and {length} can grow; "
            f"for a run with other settings that starts from these weights: --init {folder / LAST}"
        )
    if new is None or new < old:
        raise ValueError(f"{length}: the run has {old}, and when it goes on it can have more, got {new}")


def weights_of(path: str) -> tuple[list[Path], Path | None]:
    """Files of weights and the settings of their run, if there are any: of a run folder, or one file.

    Raises:
        ValueError: the folder has none.
    """
    folder = Path(path)
    config = (folder if folder.is_dir() else folder.parent) / CONFIG
    if not folder.is_dir():
        return [folder], config if config.exists() else None
    found = [folder / name for name in (LAST, LAST_EMA, BEST) if (folder / name).exists()]
    if not found:
        raise ValueError(f"{path}: no weights of a run ({BEST}, {LAST}, {LAST_EMA})")
    return found, config if config.exists() else None


def leftovers(folder: Path) -> list[str]:
    """Takes away what a killed run left half written, and says so."""
    names = remove_leftovers(folder, (CONFIG, CHECKPOINT, LOG, HEALTH))
    return [f"removed half-written files of a killed process: {', '.join(names)}"] if names else []
