# SPDX-License-Identifier: Apache-2.0
"""The pictures with objects that a run names: COCO files, folders with instance masks, scenes of digits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..utils.files import listed
from .coco_objects import open_coco
from .instance_masks import names_listed, open_masked
from .objects import Objects, Picture, annotated
from .scenes import DIGITS, NAME, SIDE, VALIDATION, Scenes

VALIDATION_NAMES = ("val", "valid", "validation")
LAYOUTS = (
    "expected a COCO file (.json), COCO's folder with annotations/instances_train*.json, train/ and val/ "
    f"with images/ and masks/ in each, or {NAME}"
)


@dataclass(frozen=True)
class SceneObjects(Objects):
    """Scenes of digits: training ones drawn afresh by seed, held-out ones always the same."""

    count: int = 0
    scenes: Scenes = field(default_factory=Scenes)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene {index}"

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.side, self.scenes.side

    def read(self, index: int, masks: bool, seed: int = 0) -> Picture:
        scene = self.scenes.draw(index if self.scenes.held_out else seed)
        return Picture(
            scene.image, scene.boxes.astype(np.float32), scene.digits, scene.masks if masks else None
        )

    def truth(self, index: int, masks: bool) -> list[dict[str, Any]]:
        scene = self.scenes.draw(index)
        rows = zip(scene.digits, scene.masks, scene.boxes)
        return [annotated(int(digit), mask, box.tolist(), masks) for digit, mask, box in rows]

    def subset(self, index: Sequence[int]) -> SceneObjects:
        raise ValueError(f"{NAME} has validation scenes of its own")

    def identity(self) -> str:
        return f"{NAME} {self.scenes.side} {self.scenes.held_out} {self.count}"


# ---- what a run names --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How data is understood.

    Attributes:
        images, val_images: folders with the pictures of COCO files; None: see `coco.folder_of`.
        scenes: of an epoch of digits-scenes.
    """

    images: str | None = None
    val_images: str | None = None
    scenes: int = 2000


def training_and_validation(
    data: str, val: str | None, fraction: float, reading: Reading
) -> tuple[Objects, Objects, str]:
    """Pictures to learn from, pictures to validate on, and a sentence about where these come from.

    Pictures without objects are not learnt from.

    Args:
        fraction: held out where there is no validation data.

    Raises:
        ValueError, OSError: they are not there, or do not fit.
    """
    if data == NAME:
        if val is not None:
            raise ValueError(f"val: {NAME} has validation scenes of its own")
        text = "validated on held-out scenes, always the same"
        return scenes(reading.scenes, held_out=False), scenes(VALIDATION, held_out=True), text
    path, beside = _parts(data)
    if path is None:
        raise ValueError(f"{data}: no instances_train*.json in annotations/ to learn from")
    train = _open(path, reading.images)
    if (where := val or beside) is not None:
        valid = validation(
            where, train.classes, train.ids, reading.val_images or (reading.images if val is None else None)
        )
        text = f"validated on {where}"
    else:
        count = round(len(train) * fraction)
        held = set(((np.arange(count) + 0.5) * len(train) / max(count, 1)).astype(int).tolist())
        if not held or len(held) == len(train):
            raise ValueError(f"{data}: val_fraction={fraction} holds out {len(held)} of {len(train)} images")
        valid = train.subset(sorted(held))
        train = train.subset([i for i in range(len(train)) if i not in held])
        text = f"validated on every {round(1 / fraction)}th image, held out of {data}"
    chosen = train.with_objects()
    if not chosen:
        raise ValueError(f"{data}: no picture holds an object to learn")
    empty = len(train) - len(chosen)
    train = train.subset(chosen)
    return train, valid, text + (f"; {empty} pictures without objects are not learnt from" if empty else "")


def validation(data: str, classes: list[str], ids: list[int] | None, images: str | None = None) -> Objects:
    """The validation part of data, or all of it where it has no parts, for a network of these classes.

    Raises:
        ValueError, OSError: it is not there, or has other classes.
    """
    if data == NAME:
        found: Objects = scenes(VALIDATION, held_out=True)
    else:
        path, beside = _parts(data)
        found = _open(beside or path or data, images, classes)
    if found.classes != classes or (ids is not None and found.ids is not None and found.ids != ids):
        raise ValueError(
            f"{data} has the classes {listed(found.classes)}, the network {listed(classes)}"
            + ("" if found.classes != classes else f"; of ids {found.ids} and {ids}")
        )
    return found


def scenes(count: int, held_out: bool) -> SceneObjects:
    """So many scenes of digits."""
    return SceneObjects(list(DIGITS), None, {}, {}, count, Scenes(SIDE, held_out=held_out))


def _parts(data: str) -> tuple[str | None, str | None]:
    """Where the training data lies, and validation data beside it; one of them at least."""
    if data.lower().endswith(".json"):
        return data, None
    annotations = os.path.join(data, "annotations")
    if os.path.isdir(annotations):
        names = sorted(os.listdir(annotations))
        train, val = (
            [n for n in names if n.startswith(f"instances_{part}") and n.endswith(".json")]
            for part in ("train", "val")
        )
        if max(len(train), len(val)) != 1:
            raise ValueError(
                f"{data}: expected one instances_train*.json and one instances_val*.json in annotations/, "
                f"got {listed(train + val) or 'none'}; name the file itself"
            )
        first, second = (os.path.join(annotations, part[0]) if part else None for part in (train, val))
        return first, second
    if os.path.isdir(os.path.join(data, "train")):
        beside = [os.path.join(data, name) for name in VALIDATION_NAMES]
        return os.path.join(data, "train"), next((name for name in beside if os.path.isdir(name)), None)
    return data, None


def _open(path: str, images: str | None, classes: Sequence[str] | None = None) -> Objects:
    if path.lower().endswith(".json"):
        return open_coco(path, images)
    if os.path.isdir(os.path.join(path, "images")) and os.path.isdir(os.path.join(path, "masks")):
        if images is not None:
            raise ValueError(f"images: {path} has its pictures in images/")
        return open_masked(path, None if names_listed(path) else classes)
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file or folder; {LAYOUTS}")
    raise ValueError(f"{path}: {LAYOUTS}{_coco_in(path)}")


def _coco_in(path: str) -> str:
    """A hint at the files in a folder that may be COCO's; nothing where there are none."""
    if not os.path.isdir(path):
        return ""
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(".json"))
    if not names:
        return ""
    return f"; {listed(names, most=4)} in it: if this is COCO's, name it, as {os.path.join(path, names[0])}"
