# SPDX-License-Identifier: Apache-2.0
"""Images with masks of class indices: ADE20K's folders, image and mask folders, lists, scenes of digits."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.files import listed
from .classes import ARRAY, VALIDATION_NAMES, Images
from .lists import LISTS, read_list
from .masks import IGNORE, MASKS, Mask, check_indices, names_beside, read_mask
from .picture_files import FORMATS_TEXT, SUFFIXES, passed_over_text, walk
from .scenes import CLASSES, NAME, VALIDATION, Scenes
from .transforms import UnreadableError

LAYOUTS = (
    "expected ADE20K's images/training and annotations/training, or train/ and val/ with images/ and masks/ "
    "in each, or images/ and masks/"
)


@dataclass(frozen=True)
class Pairs:
    """Files of images and of masks, or scenes that are drawn.

    Attributes:
        images: those, with labels that mean nothing.
        masks: a file for each image; "": there is none.
        classes: names by index, for masks as read.
        reduce_zero_label: see `masks.read_mask`.
        scenes: draws them; training scenes by seed, held-out ones by index.
    """

    images: Images
    masks: Sequence[str]
    classes: list[str]
    reduce_zero_label: bool = False
    scenes: Scenes | None = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Of an image."""
        return self.images.files[index] if self.images.files else f"scene {index}"

    def pair(self, index: int, seed: int = 0) -> tuple[NDArray[Any], Mask]:
        """Image (H, W, 3) uint8, or (C, H, W) of a numpy file, and class indices (H, W).

        Args:
            seed: of a training scene; nothing else depends on it.

        Raises:
            UnreadableError: one of them is missing or damaged, or their sizes differ.
            ClassIndexError: the mask holds an index that no class has.
        """
        if self.scenes is not None:
            scene = self.scenes.draw(index if self.scenes.held_out else seed)
            return scene.image, scene.mask
        if not self.masks[index]:
            raise UnreadableError("there is no mask of the same name")
        image = self.images.read(index)
        mask = read_mask(self.masks[index], self.reduce_zero_label)
        height, width = image.shape[1:] if self.images.arrays else image.shape[:2]
        if mask.shape != (height, width):
            raise UnreadableError(
                f"{width} x {height} pixels, but its mask {self.masks[index]} has "
                f"{mask.shape[1]} x {mask.shape[0]}"
            )
        check_indices(mask, len(self.classes), self.masks[index])
        return image, mask

    def subset(self, index: NDArray[np.int64]) -> Pairs:
        """Those with these indices, in this order."""
        return replace(self, images=self.images.subset(index), masks=[self.masks[i] for i in index])

    def fingerprint(self) -> str:
        """Tells whether a run goes on with the data that it began with."""
        names = [*map(os.path.basename, self.masks), *self.classes, str(self.reduce_zero_label)]
        found = hashlib.blake2b(self.images.fingerprint().encode(), digest_size=8)
        found.update("\n".join(names).encode(errors="surrogateescape"))
        return found.hexdigest()


@dataclass(frozen=True)
class Reading:
    """How data is understood.

    Attributes:
        classes: their number, where no file names them; None: up to the largest index of the training masks.
        reduce_zero_label: see `masks.read_mask`.
        scenes: of an epoch of digits-scenes.
    """

    classes: int | None = None
    reduce_zero_label: bool = False
    scenes: int = 2000


def training_and_validation(
    data: str, val: str | None, fraction: float, reading: Reading
) -> tuple[Pairs, Pairs, str]:
    """Pairs to learn from, pairs to validate on, and a sentence about where these come from.

    Args:
        fraction: held out where there is no validation data.

    Raises:
        ValueError, OSError: they are not there, or do not fit.
    """
    if data == NAME:
        _refuse_for_scenes(val, reading)
        about = "held-out scenes, always the same"
        return (
            _drawn(reading.scenes, held_out=False),
            _drawn(VALIDATION, held_out=True),
            f"validated on {about}",
        )
    train = _files(data, "training", reading.reduce_zero_label)
    names = _names(data, train, reading)
    train = replace(train, classes=names)
    beside = val or _validation_beside(data)
    if beside is not None:
        valid = _files(beside, "validation", reading.reduce_zero_label)
        return train, replace(valid, classes=names), f"validated on {beside}"
    count = round(len(train) * fraction)
    held = np.zeros(len(train), bool)
    held[((np.arange(count) + 0.5) * len(train) / max(count, 1)).astype(int)] = True  # spread evenly
    if not held.any() or held.all():
        raise ValueError(f"{data}: val_fraction={fraction} holds out {count} of {len(train)} images")
    text = f"validated on every {round(1 / fraction)}th image, held out of {data}"
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held)), text


def validation(data: str, classes: list[str], reduce_zero_label: bool) -> Pairs:
    """The validation part of data, or all of it where it has no parts, for a network of these classes.

    Raises:
        ValueError, OSError: it is not there, or names other classes.
    """
    if data == NAME:
        if list(CLASSES) != classes:
            raise ValueError(f"{NAME} has the classes {listed(CLASSES)}, the network {listed(classes)}")
        return _drawn(VALIDATION, held_out=True)
    path = _validation_beside(data) or data
    found = names_beside(_root(data), reduce_zero_label)
    if found is not None and found != classes:
        raise ValueError(f"{data} has the classes {listed(found)}, the network {listed(classes)}")
    return replace(_files(path, "validation", reduce_zero_label), classes=classes)


def _refuse_for_scenes(val: str | None, reading: Reading) -> None:
    if val not in (None, NAME):
        raise ValueError(f"val: {NAME} has validation scenes of its own, got {val}")
    if reading.reduce_zero_label:
        raise ValueError(f"reduce_zero_label: 0 is a class of {NAME}, the background")
    if reading.classes not in (None, len(CLASSES)):
        raise ValueError(f"classes: {NAME} has {len(CLASSES)}, got {reading.classes}")


def _drawn(count: int, held_out: bool) -> Pairs:
    images = Images([], np.zeros(count, np.int64), list(CLASSES))
    return Pairs(images, [""] * count, list(CLASSES), scenes=Scenes(held_out=held_out))


# ---- files -------------------------------------------------------------------------------------------------


def _files(path: str, part: str, reduce_zero_label: bool) -> Pairs:
    """The training or validation part of a folder, or all of it where it has no parts, or a list."""
    if path.lower().endswith(LISTS):
        folder = os.path.dirname(path)
        rows = read_list(path, "mask")
        images = [os.path.join(folder, image) for image, _ in rows]
        masks = [os.path.join(folder, mask) for _, mask in rows]
        passed_over = Counter[str]()
        if not rows:
            raise ValueError(f"{path}: no rows below the columns' names, so no images")
    else:
        images, masks, passed_over = _matched(*_folders(path, part))
    if len({name.lower().endswith(ARRAY) for name in images}) > 1:
        raise ValueError(f"{path}: expected pictures or .npy files, found both")
    labels = np.zeros(len(images), np.int64)
    return Pairs(Images(images, labels, [], passed_over=passed_over), masks, [], reduce_zero_label)


def _folders(path: str, part: str) -> tuple[str, str]:
    """Those of images and of masks."""
    os.stat(path)  # says what is wrong with it
    if _is_ade(path):
        return os.path.join(path, "images", part), os.path.join(path, "annotations", part)
    if part == "training" and os.path.isdir(os.path.join(path, "train")):
        path = os.path.join(path, "train")
    images, masks = os.path.join(path, "images"), os.path.join(path, "masks")
    if not os.path.isdir(images) or not os.path.isdir(masks):
        raise ValueError(f"{path}: {LAYOUTS}")
    return images, masks


def is_ade20k(data: str) -> bool:
    """Whether data is ADE20K, by its folders or its table of objects; a classes.txt may name others.

    Raises:
        OSError, ValueError: classes.txt cannot be read.
    """
    root = _root(data)
    if not _is_ade(data) and not os.path.isfile(os.path.join(root, "objectInfo150.txt")):
        return False
    return not os.path.isfile(os.path.join(root, "classes.txt")) or len(names_beside(root) or ()) == 150


def _is_ade(path: str) -> bool:
    return all(os.path.isdir(os.path.join(path, name, "training")) for name in ("images", "annotations"))


def _validation_beside(data: str) -> str | None:
    """Where the validation data of a folder lies, if it has some."""
    if _is_ade(data):
        return data if os.path.isdir(os.path.join(data, "images", "validation")) else None
    if not os.path.isdir(os.path.join(data, "train")):
        return None
    beside = [os.path.join(data, name) for name in VALIDATION_NAMES]
    return next((name for name in beside if os.path.isdir(name)), None)


def _matched(images: str, masks: str) -> tuple[list[str], list[str], Counter[str]]:
    """Images and their masks, by name without suffix; what lay between them."""
    passed_over = Counter[str]()
    found = list(walk(images, (*SUFFIXES, ARRAY), passed_over))
    if not found:
        text = f"; {passed_over_text(passed_over)}" if passed_over else ""
        raise ValueError(f"{images}: no images ({FORMATS_TEXT}, .npy){text}")
    of_stem: dict[str, str] = {}
    for mask in walk(masks, MASKS, passed_over):
        if (other := of_stem.setdefault(_stem(mask, masks), mask)) != mask:
            raise ValueError(f"{mask}: {other} has the same name without suffix; keep one of them")
    names = [of_stem.get(_stem(image, images), "") for image in found]
    if not any(names):
        raise ValueError(f"{masks}: no masks (.png, .npy) with the names of the images in {images}")
    taken = set(names)
    if alone := sum(mask not in taken for mask in of_stem.values()):
        passed_over["masks without an image"] = alone
    return found, names, passed_over


def _stem(path: str, folder: str) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _root(data: str) -> str:
    """Where the names of the classes lie."""
    return os.path.dirname(data) or "." if data.lower().endswith(LISTS) else data


def _names(data: str, train: Pairs, reading: Reading) -> list[str]:
    """Of the classes: from a file beside the data, else their numbers."""
    names = names_beside(_root(data), reading.reduce_zero_label)
    if names is None:
        count = reading.classes or _largest(train) + 1
        return [str(i) for i in range(count)]
    if reading.classes not in (None, len(names)):
        raise ValueError(f"classes: {_root(data)} names {len(names)}, got {reading.classes}")
    return names


def _largest(train: Pairs) -> int:
    """The largest index of the masks that can be read."""
    largest = -1
    for mask in filter(None, train.masks):
        with contextlib.suppress(UnreadableError):  # told when the run meets it
            found = read_mask(mask, train.reduce_zero_label).astype(np.int64)
            largest = max(largest, int(found[found != IGNORE].max(initial=-1)))
    if largest < 0:
        raise ValueError("none of the training masks can be read and holds a class")
    return largest
