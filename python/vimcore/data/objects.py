# SPDX-License-Identifier: Apache-2.0
"""What pictures with objects have in common, wherever they come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._core import Error
from .coco import Mask, run_lengths
from .picture_files import read_file, reason
from .pictures import decode
from .transforms import UnreadableError


class Picture(NamedTuple):
    """A picture (H, W, 3) uint8 with n objects to learn: boxes (n, 4) float32 x1, y1, x2, y2, labels (n,),
    masks (n, H, W) bool, or None where they were not asked for."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: Mask | None


@dataclass(frozen=True)
class Objects(ABC):
    """Pictures with objects.

    Attributes:
        classes: names.
        ids: of the categories in the COCO file, one for each class; None: there is none.
        dropped: what of the data cannot be learnt from or evaluated, by kind.
        passed_over: files that lay between them, by kind.
    """

    classes: list[str]
    ids: list[int] | None
    dropped: Mapping[str, int]
    passed_over: Mapping[str, int]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Of a picture: its file, where there is one."""

    def number(self, index: int) -> int:
        """The id of a picture in the file of annotations; where there is none, from 1 on."""
        return index + 1

    @abstractmethod
    def read(self, index: int, masks: bool, seed: int = 0) -> Picture:
        """A picture and its objects; crowds are none.

        Args:
            seed: of a scene that is drawn afresh; nothing else depends on it.

        Raises:
            UnreadableError: picture or masks are missing, damaged, or of different size.
        """

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of a picture, as its truth says; UnreadableError: there is none."""

    @abstractmethod
    def truth(self, index: int, masks: bool) -> list[dict[str, Any]]:
        """What evaluation compares with: category_id (index + 1), bbox, area, iscrowd, segmentation.

        Raises:
            UnreadableError: a mask is damaged.
        """

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Objects:
        """Those with these indices, in this order."""

    @abstractmethod
    def identity(self) -> str:
        """Other text for other pictures or objects."""

    def with_objects(self) -> list[int]:
        """Indices of pictures that hold something to learn."""
        return list(range(len(self)))

    def fingerprint(self) -> str:
        """Tells whether a run goes on with the data that it began with."""
        text = "\n".join([*self.classes, self.identity()])
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def decoded(path: str) -> NDArray[np.uint8]:
    """(H, W, 3) of a picture file, the right way up; UnreadableError: it is missing or damaged."""
    try:
        return decode(read_file(path), "")
    except (Error, OSError, ValueError, MemoryError) as error:
        raise UnreadableError(reason(error)) from error


def annotated(label: int, mask: Mask, box: Sequence[float], masks: bool) -> dict[str, Any]:
    """The truth of an object that is all visible in its mask."""
    x1, y1, x2, y2 = (float(side) for side in box)
    found = {"category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
    return {**found, "area": float(mask.sum()), **({"segmentation": run_lengths(mask)} if masks else {})}


def boxes_of(masks: NDArray[Any]) -> NDArray[np.float32]:
    """(n, 4) x1, y1, x2, y2 around masks (n, H, W), none of which is empty; x2 and y2 are beyond them."""
    found = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(found, masks):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found
