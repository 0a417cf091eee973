# SPDX-License-Identifier: Apache-2.0
"""What is learnt: one task each, by the name that `task` has in the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Settings
    from .task import Task

NAMES = ("classification",)


def settings_type(values: Mapping[str, Any]) -> type[Settings]:
    """The kind of settings that these values are of; needs no torch.

    Raises:
        ValueError: there is no such task.
    """
    name = values.get("task", NAMES[0])
    if name not in NAMES:
        raise ValueError(f"task: expected one of {', '.join(NAMES)}, got {name!r}")
    from .classification.settings import ClassificationSettings

    return ClassificationSettings


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
    from .classification.settings import ClassificationSettings
    from .classification.task import Classification

    assert isinstance(settings, ClassificationSettings)
    return Classification(settings)
