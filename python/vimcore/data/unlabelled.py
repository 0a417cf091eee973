# SPDX-License-Identifier: Apache-2.0
"""Images whose labels do not matter: any folder of them."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from . import classes
from .classes import ARRAY, Images
from .digits import split_digits
from .lists import LISTS
from .picture_files import FORMATS_TEXT, SUFFIXES, passed_over_text, walk
from .sources import is_source

CLASS = "image"  # of images without labels


def open_unlabelled(path: str, split: str = "train") -> Images:
    """Pictures or .npy files at any depth below a folder; also all that `classes.open_images` takes.

    A list needs no labels.

    Raises:
        ValueError, OSError: there are none, or kinds are mixed.
    """
    if path == "digits" or is_source(path) or path.lower().endswith(LISTS):
        return classes.open_images(path, split, without_labels=CLASS)
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such folder")
    passed_over = Counter[str]()
    files = list(walk(path, (*SUFFIXES, ARRAY), passed_over))
    if not files:
        more = f"; {passed_over_text(passed_over)}" if passed_over else ""
        raise ValueError(f"{path}: no images ({FORMATS_TEXT}, .npy){more}")
    if len({name.lower().endswith(ARRAY) for name in files}) > 1:
        raise ValueError(f"{path}: expected pictures or .npy files, found both")
    return Images(files, np.zeros(len(files), np.int64), [CLASS], passed_over=passed_over)


def training_and_validation(data: str, val: str | None, fraction: float) -> tuple[Images, Images, str]:
    """Images to learn from, images to validate on, and a sentence about where these come from."""
    if os.path.isdir(os.path.join(data, "train")):
        beside = [os.path.join(data, name) for name in classes.VALIDATION_NAMES]
        val = val or next((name for name in beside if os.path.isdir(name)), None)
        data = os.path.join(data, "train")
    train = open_unlabelled(data)
    if val is not None:
        return train, open_unlabelled(val, "validation"), f"validated on {val}"
    if data == "digits":
        learn, held_out = split_digits(train.labels)
        return train.subset(learn), train.subset(held_out), "validated on the held-out fifth"
    count = round(len(train) * fraction)
    held = np.zeros(len(train), bool)
    held[((np.arange(count) + 0.5) * len(train) / max(count, 1)).astype(int)] = True
    if not held.any() or held.all():
        raise ValueError(
            f"{data}: val_fraction={fraction} holds out {int(held.sum())} of {len(train)} images"
        )
    text = f"validated on every {round(1 / fraction)}th image, held out of {data}"
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held)), text
