# SPDX-License-Identifier: Apache-2.0
"""What a vimcore file says about itself: architecture, labels, preprocessing. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _core
from ..config import image_size
from ..utils.arguments import native

CONFIG_KEY = "vimcore.config"
LABELS_KEY = "vimcore.labels"
PREPROCESS_KEY = "vimcore.preprocess"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def default_preprocess(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """ImageNet evaluation: short side to size / 0.875, centre crop, ImageNet statistics (one channel: 0.5).

    None for networks whose images do not come from picture files (neither 1 nor 3 channels).
    """
    channels = int(config.get("in_chans", 3))
    if channels not in (1, 3):
        return None
    height, width = image_size(config)
    return {
        "resize": int(min(height, width) / 0.875),
        "crop": [height, width],
        "mean": list(IMAGENET_MEAN) if channels == 3 else [0.5],
        "std": list(IMAGENET_STD) if channels == 3 else [0.5],
        "interpolation": "bicubic",
    }


def rescaled_preprocess(steps: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The same steps for another crop (height, width): the short side before it keeps its proportion."""
    old = steps["crop"]
    if list(old) == list(size):
        return dict(steps)
    return {**steps, "resize": round(steps["resize"] * min(size) / min(old)), "crop": list(size)}


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
    config_json: str, labels: Sequence[str] | None, preprocess: Mapping[str, Any] | None
) -> dict[str, str]:
    """Metadata of a file, JSON each, absent parts left out; ValueError: preprocessing out of range."""
    metadata = {CONFIG_KEY: config_json}
    if labels is not None:
        metadata[LABELS_KEY] = json.dumps(list(labels), ensure_ascii=False)
    if preprocess is not None:
        steps = {key: native(f"[preprocess] {key}", value) for key, value in preprocess.items()}
        metadata[PREPROCESS_KEY] = json.dumps(steps)
        _core.preprocess_normalize(metadata[PREPROCESS_KEY])  # what would not be read is not written
    return metadata


def unpack(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[dict[str, Any], list[str] | None, dict[str, Any] | None]:
    """(config, labels, preprocess) of a file's metadata, complete; labels and preprocess None where absent.

    Raises:
        ValueError: names the file, and what is missing, of a wrong type or out of range.
    """
    config, labels, preprocess = _core.describe(dict(metadata), path)
    return json.loads(config), labels, None if preprocess is None else json.loads(preprocess)
