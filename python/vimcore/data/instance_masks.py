# SPDX-License-Identifier: Apache-2.0
"""Pictures with instance masks: PNGs whose values say class and number of the object at each pixel."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .coco import Mask
from .masks import read_names
from .objects import Objects, Picture, annotated, boxes_of, decoded
from .picture_files import FORMATS_TEXT, SUFFIXES, read_file, reason, walk
from .transforms import UnreadableError

CLASS = 1000  # a value of an instance mask is class * CLASS + instance


@dataclass(frozen=True)
class MaskedObjects(Objects):
    """Pictures with a PNG each whose values are class * 1000 + instance, 0: no object."""

    files: Sequence[str] = ()
    masks: Sequence[str] = ()
    found: Sequence[tuple[tuple[int, int], tuple[int, ...]]] = ()  # size and values of each mask
    faults: Mapping[int, str] = field(default_factory=dict)  # masks that cannot be used

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> tuple[int, int]:
        if index in self.faults:
            raise UnreadableError(self.faults[index])
        return self.found[index][0]

    def _objects(self, index: int) -> tuple[NDArray[np.int64], Mask]:
        """Labels and masks."""
        height, width = self.size(index)
        values, mask = self.found[index][1], read_instances(self.masks[index])
        every = [mask == value for value in values]
        return np.array(values, np.int64) // CLASS, np.array(every, bool).reshape(-1, height, width)

    def read(self, index: int, masks: bool, seed: int = 0) -> Picture:
        height, width = self.size(index)
        pixels = decoded(self.files[index])
        if pixels.shape[:2] != (height, width):
            raise UnreadableError(
                f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its mask {self.masks[index]} has "
                f"{width} x {height}"
            )
        labels, drawn = self._objects(index)
        return Picture(pixels, boxes_of(drawn), labels, drawn if masks else None)

    def truth(self, index: int, masks: bool) -> list[dict[str, Any]]:
        labels, drawn = self._objects(index)
        return [annotated(int(k), mask, box, masks) for k, mask, box in zip(labels, drawn, boxes_of(drawn))]

    def with_objects(self) -> list[int]:
        return [i for i in range(len(self)) if i in self.faults or self.found[i][1]]

    def subset(self, index: Sequence[int]) -> MaskedObjects:
        place = {old: new for new, old in enumerate(index)}
        return MaskedObjects(
            self.classes,
            self.ids,
            self.dropped,
            self.passed_over,
            [self.files[i] for i in index],
            [self.masks[i] for i in index],
            [self.found[i] for i in index],
            {place[i]: text for i, text in self.faults.items() if i in place},
        )

    def identity(self) -> str:
        names = map(os.path.basename, self.files)
        return "\n".join(f"{name} {size} {values}" for name, (size, values) in zip(names, self.found))


def read_instances(path: str) -> NDArray[np.int64]:
    """(H, W) values of a grey PNG of 8 or 16 bits; UnreadableError: it is missing, damaged, or another."""
    try:
        data = read_file(path)
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG" or image.mode not in ("I;16", "I;16B", "I", "L", "P"):
                raise UnreadableError(
                    f"mask {path}: expected a grey PNG of 8 or 16 bits, "
                    f"got {image.format} of mode {image.mode}"
                )
            return np.asarray(image).astype(np.int64)
    except UnreadableError:
        raise
    except (EOFError, OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"mask {path}: {reason(error)}") from error


def open_masked(path: str, classes: Sequence[str] | None = None) -> MaskedObjects:
    """The pictures of path/images with the masks of the same names in path/masks, all of which are read once.

    Args:
        classes: names; None: those of classes.txt in the folder or above it, or numbers up to the largest.

    Raises:
        OSError, ValueError: there are none, or a mask has a class without a name.
    """
    passed = Counter[str]()
    files = list(walk(os.path.join(path, "images"), SUFFIXES, passed))
    masks = [_mask_beside(path, file) for file in files]
    if not files:
        raise ValueError(f"{path}: no pictures in images/ ({FORMATS_TEXT})")
    found: list[tuple[tuple[int, int], tuple[int, ...]]] = []
    faults: dict[int, str] = {}
    for i, mask in enumerate(masks):
        try:
            read = read_instances(mask)
            found.append(((read.shape[0], read.shape[1]), tuple(map(int, np.unique(read[read > 0])))))
        except UnreadableError as error:
            found.append(((0, 0), ()))
            faults[i] = str(error)
    if classes is None:
        listing = names_listed(path)
        most = max((values[-1] // CLASS for _, values in found if values), default=0)
        names = read_names(listing) if listing else None
        classes = names or [str(number) for number in range(most + 1)]
    for mask, (_, values) in zip(masks, found):
        if values and values[-1] // CLASS >= len(classes):
            raise ValueError(
                f"{mask}: holds value {values[-1]}, class {values[-1] // CLASS}, expected classes 0 to "
                f"{len(classes) - 1}: a value is class * {CLASS} + instance"
            )
    return MaskedObjects(list(classes), None, {}, dict(passed), files, masks, found, faults)


def _mask_beside(path: str, file: str) -> str:
    relative = os.path.relpath(file, os.path.join(path, "images"))
    return os.path.join(path, "masks", os.path.splitext(relative)[0] + ".png")


def names_listed(path: str) -> str | None:
    """The classes.txt of a folder, or of the one above it."""
    folders = (path, os.path.dirname(os.path.normpath(path)))
    files = (os.path.join(folder, "classes.txt") for folder in folders)
    return next((file for file in files if os.path.isfile(file)), None)
