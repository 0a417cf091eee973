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


def resumed(kind: type[S], folder: Path, changes: dict[str, Any]) -> S:
    """The settings of a run that goes on; ValueError for changes that would make it another run.

    Args:
        kind: of the run's task.
    """
    fixed = sorted(set(changes) - set(MACHINE))
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: cannot change when a run goes on; {', '.join(MACHINE)} can")
    path = str(folder / CONFIG)
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
    return settings.merged(changes)


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
