# SPDX-License-Identifier: Apache-2.0
"""What a vimcore file says about itself: architecture, labels, preprocessing. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import _core
from .._core import Config, Preprocess
from ..utils.arguments import native

CONFIG_KEY = "vimcore.config"
LABELS_KEY = "vimcore.labels"
PREPROCESS_KEY = "vimcore.preprocess"
TASK_KEY = "vimcore.task"
EMBEDDING_KEY = "vimcore.embedding"  # "true": the head gives coordinates of a space, and no logits of classes


def check_labels(labels: Sequence[str], num_classes: int) -> list[str]:
    """The labels as a list; ValueError unless there is one text for each class."""
    if isinstance(labels, (str, bytes)):
        raise ValueError(f"labels: expected a list with one text for each class, got {labels!r:.60}")
    names = list(labels)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"labels: expected texts, got {name!r:.60}")
    if len(names) != num_classes:
        raise ValueError(f"labels: expected {num_classes}, one for each class, got {len(names)}")
    return names


def pack(
    config: Config, labels: Sequence[str] | None, preprocess: Mapping[str, Any] | None
) -> dict[str, str]:
    """Metadata of a file, JSON each, absent parts left out; ValueError: preprocessing out of range."""
    metadata = {CONFIG_KEY: config.to_json()}
    if labels is not None:
        metadata[LABELS_KEY] = json.dumps(list(labels), ensure_ascii=False)
    if preprocess is not None:
        Preprocess(**preprocess)  # what would not be read is not written
        steps = {key: native(f"[preprocess] {key}", value) for key, value in preprocess.items()}
        metadata[PREPROCESS_KEY] = json.dumps(steps)
    return metadata


class Contents(NamedTuple):
    """What a file says about itself; labels and preprocess None where absent."""

    config: Config
    labels: list[str] | None
    preprocess: Preprocess | None


def unpack(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Contents:
    """The metadata of a file.

    Raises:
        ValueError: names the file, and what is missing, of a wrong type or out of range.
    """
    return Contents(*_core.describe(dict(metadata), path))


def task_of_file(path: str | os.PathLike[str]) -> str:
    """The task that a file's network does: "classify" where it says nothing of it.

    Raises:
        vimcore.Error, ValueError: it cannot be read, or names no task.
    """
    text = _core.safetensors_header(str(path))[1].get(TASK_KEY)
    if text is None:
        return "classify"
    try:
        name = json.loads(text)["task"]
    except (KeyError, TypeError, ValueError, RecursionError):
        name = None
    if name not in ("segment", "detect", "clip"):
        raise ValueError(f"{path}: {TASK_KEY}: expected a task, segment, detect or clip, got {text!r:.60}")
    return str(name)
