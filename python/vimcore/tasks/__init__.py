# SPDX-License-Identifier: Apache-2.0
"""What is learnt: one task each, by the name that `task` has in the settings of a run.

A task is a folder beside this file: `settings.py` with the settings {Task}Settings, which need no torch, and
`task.py` with the class {Task} (`vimcore.tasks.task.Task`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Settings
    from .task import Task

# Name in settings and flags: folder, class.
TASKS = {
    "classify": ("classification", "Classification"),
    "segment": ("segmentation", "Segmentation"),
    "detect": ("detection", "Detection"),
    "pretrain": ("pretraining", "Pretraining"),
    "clip": ("clip", "Clip"),
}
NAMES = tuple(TASKS)
_OLDER = {"classification": "classify"}  # as runs of version 0.2 have it


def settings_type(values: Mapping[str, Any]) -> type[Settings]:
    """The kind of settings that these values are of; needs no torch.

    Raises:
        ValueError: there is no such task.
    """
    name = values.get("task", NAMES[0])
    name = _OLDER.get(name, name) if isinstance(name, str) else name
    if name not in NAMES:
        raise ValueError(f"task: expected one of {', '.join(NAMES)}, got {name!r}")
    folder, task = TASKS[name]
    kind: type[Settings] = getattr(
        importlib.import_module(f".{folder}.settings", __name__), f"{task}Settings"
    )
    return kind


def read_settings(path: str) -> Settings:
    """The settings of a TOML file, such as RUN/config.toml; what it lacks has its default.

    Raises:
        OSError, ValueError: it cannot be read, or does not hold settings.
    """
    from .settings import read_toml

    kind = settings_type(read_toml(path))
    return kind().merged(read_toml(path, kind))


def create(settings: Settings) -> Task:
    """The task of a run."""
    folder, name = TASKS[settings.task]
    task: Task = getattr(importlib.import_module(f".{folder}.task", __name__), name)(settings)
    return task
