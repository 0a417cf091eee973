# SPDX-License-Identifier: Apache-2.0
"""Pictures of a folder with the annotations of a COCO file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.files import listed
from . import coco
from .coco import Mask, mask_of, read_coco, run_lengths
from .objects import Objects, Picture, decoded
from .transforms import UnreadableError


@dataclass(frozen=True)
class CocoObjects(Objects):
    """Pictures of a folder, with COCO's annotations."""

    images: Sequence[coco.CocoImage] = ()
    folder: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self.images[index].file)

    def number(self, index: int) -> int:
        return self.images[index].number

    def size(self, index: int) -> tuple[int, int]:
        return self.images[index].height, self.images[index].width

    def read(self, index: int, masks: bool, seed: int = 0) -> Picture:
        height, width = self.size(index)
        pixels = decoded(self.name(index))
        if pixels.shape[:2] != (height, width):
            raise UnreadableError(
                f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its annotations are for "
                f"{width} x {height}"
            )
        some = [(a, box) for a, box in self._learnt(index) if box is not None]
        drawn = [_mask(a, height, width) for a, _ in some] if masks else []
        return Picture(
            pixels,
            np.array([box for _, box in some], np.float32).reshape(-1, 4),
            np.array([a.label for a, _ in some], np.int64),
            np.array(drawn, bool).reshape(-1, height, width) if masks else None,
        )

    def _learnt(self, index: int) -> list[tuple[coco.Annotation, coco.Box | None]]:
        image = self.images[index]
        return [(a, a.corners(image.height, image.width)) for a in image.annotations if not a.crowd]

    def truth(self, index: int, masks: bool) -> list[dict[str, Any]]:
        height, width = self.size(index)
        rows = []
        for a in self.images[index].annotations:
            row: dict[str, Any] = {"category_id": a.label + 1, "bbox": list(a.box), "area": a.area}
            row["iscrowd"] = int(a.crowd)
            if masks:
                row["segmentation"] = run_lengths(_mask(a, height, width))
            rows.append(row)
        return rows

    def with_objects(self) -> list[int]:
        return [i for i in range(len(self)) if any(box is not None for _, box in self._learnt(i))]

    def subset(self, index: Sequence[int]) -> CocoObjects:
        return CocoObjects(
            self.classes,
            self.ids,
            self.dropped,
            self.passed_over,
            [self.images[i] for i in index],
            self.folder,
        )

    def identity(self) -> str:
        return "\n".join(
            f"{image.file} {[(a.label, a.box) for a in image.annotations]}" for image in self.images
        )


def _mask(annotation: coco.Annotation, height: int, width: int) -> Mask:
    if annotation.segmentation is None:
        raise UnreadableError(
            f"annotation {annotation.number} has no segmentation; --no-masks learns boxes alone"
        )
    try:
        return mask_of(annotation.segmentation, height, width)
    except UnreadableError as error:
        raise UnreadableError(f"annotation {annotation.number}: {error}") from None


def open_coco(path: str, folder: str | None) -> CocoObjects:
    """The pictures of a file of annotations; those that are not there are counted.

    Args:
        folder: with the pictures, None: see `coco.folder_of`.

    Raises:
        OSError, ValueError: the file cannot be read, or none of its pictures is there.
    """
    found = read_coco(path)
    where = coco.folder_of(found, folder)
    here = [os.path.isfile(os.path.join(where, image.file)) for image in found.images]
    images = [image for image, is_here in zip(found.images, here) if is_here]
    dropped = dict(found.dropped)
    if missing := [image.file for image, is_here in zip(found.images, here) if not is_here]:
        dropped[f"image that is not in {where} ({listed(missing, most=3)})"] = len(missing)
    return CocoObjects(found.classes, found.ids, dropped, {}, images, where)
