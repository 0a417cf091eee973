# SPDX-License-Identifier: Apache-2.0
"""What a detector finds on pictures, and how good that is: COCO's average precision by faster-coco-eval."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.coco import run_lengths
from ...data.detection import Detected
from ...data.objects import Objects
from ...data.transforms import UnreadableError
from ...detection import CascadeMaskRCNN
from ...nn.heads.cascade import Detections
from ...nn.heads.masks import pasted
from ...utils import distributed
from ...utils.extras import required

Row = dict[str, Any]  # of COCO's results: category_id (class + 1), bbox, score, segmentation
AREAS = ("", "_small", "_medium", "_large")
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Found:
    """Of the pictures that could be read: rows by index; files that could not, and why."""

    rows: dict[int, list[Row]]
    errors: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Precision:
    """COCO's figures, of boxes or of masks.

    Attributes:
        values: by NAMES; those of sizes that no object has are not among them.
        per_class: mean over the thresholds, nan of a class without objects.
    """

    values: Mapping[str, float]
    per_class: Sequence[float]


def rows_of(found: Detections, size: tuple[int, int]) -> list[Row]:
    """COCO's results of one picture (height, width), without the picture's id."""
    rows: list[Row] = []
    boxes, scores, classes = (
        found.boxes.double().tolist(),
        found.scores.double().tolist(),
        found.classes.tolist(),
    )
    for (x1, y1, x2, y2), score, label in zip(boxes, scores, classes):
        box = [x1, y1, x2 - x1, y2 - y1]
        rows.append({"category_id": label + 1, "bbox": box, "score": score})
    if found.masks is not None:
        for row, (lines, columns, part) in zip(rows, pasted(found.masks, found.boxes, size)):
            row["segmentation"] = run_lengths(_whole(lines, columns, part >= 0.5, size))
    return rows


def _whole(lines: slice, columns: slice, part: Tensor, size: tuple[int, int]) -> Any:
    mask = np.zeros(size, bool, order="F")
    mask[lines, columns] = part.cpu().numpy()
    return mask


def detect(
    model: nn.Module, batches: Iterable[Detected], device: torch.device, precision: torch.dtype
) -> Found:
    """What the model finds on this process's share, in eval mode; its mode is restored afterwards."""
    assert isinstance(model, CascadeMaskRCNN)
    rows: dict[int, list[Row]] = {}
    errors: dict[str, str] = {}
    begin, was_training = time.perf_counter(), model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                errors.update(batch.errors)
                if not batch.images:
                    continue
                images = [image.to(device, non_blocking=True) for image in batch.images]
                with torch.autocast(device.type, precision, precision != torch.float32):
                    found = model.detections(images, batch.sizes)
                for index, size, of in zip(batch.indices, batch.sizes, found):
                    rows[index] = rows_of(of, size)
    finally:
        model.train(was_training)
    return Found(rows, errors, time.perf_counter() - begin)


class Truth:
    """What is on the pictures, looked up once.

    Args:
        masks: also those.
    """

    def __init__(self, objects: Objects, masks: bool) -> None:
        self.objects, self.masks = objects, masks
        self.of: dict[int, tuple[tuple[int, int], list[Row]]] = {}
        self.errors: dict[str, str] = {}
        for index in range(len(objects)):
            try:
                self.of[index] = objects.size(index), objects.truth(index, masks)
            except UnreadableError as error:
                self.errors[objects.name(index)] = str(error)

    def precision(self, rows: Mapping[int, Sequence[Row]]) -> tuple[Precision, Precision | None]:
        """Of boxes, and of masks, over the pictures that have rows, maybe none.

        Raises:
            ValueError: there is no object on them.
        """
        seen = sorted(set(rows) & set(self.of))
        images = [{"id": i + 1, "height": self.of[i][0][0], "width": self.of[i][0][1]} for i in seen]
        annotations = [{"image_id": i + 1, **row} for i in seen for row in self.of[i][1]]
        if all(row["iscrowd"] for row in annotations):
            raise ValueError("none of the pictures to validate on holds an object")
        for number, row in enumerate(annotations, 1):
            row["id"] = number
        names = self.objects.classes
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
        }
        found = [{"image_id": i + 1, **row} for i in seen for row in rows[i]]
        box = _precision(content, found, "bbox", len(names))
        return box, _precision(content, found, "segm", len(names)) if self.masks else None


def _precision(content: dict[str, Any], found: list[Row], kind: str, classes: int) -> Precision:
    with required("evaluation of detectors", "dense"):
        from faster_coco_eval import COCO, COCOeval_faster
    if not found:
        return Precision(dict.fromkeys(NAMES[:3], 0.0), [0.0] * classes)
    if kind == "segm":  # the area of a result is that of its mask, unless it has a box
        found = [{name: value for name, value in row.items() if name != "bbox"} for row in found]
    truth = COCO(content)
    of = COCOeval_faster(truth, truth.loadRes(found), kind, print_function=_silent)
    of.evaluate()
    of.accumulate()
    of.summarize()
    stats = [float(value) for value in of.stats[: len(NAMES)]]
    precision = of.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes, of all sizes
    shares = [part[part > -1] for part in np.moveaxis(precision, 2, 0)]
    per_class = [float(part.mean()) if part.size else float("nan") for part in shares]
    return Precision({n: value for n, value in zip(NAMES, stats) if value >= 0}, per_class)


def _silent(*_: object) -> None:
    """Takes the place of `print`."""


def gathered(found: Found) -> dict[int, list[Row]]:
    """The rows of all processes."""
    return {index: rows for part in distributed.gather(found.rows) for index, rows in part.items()}
