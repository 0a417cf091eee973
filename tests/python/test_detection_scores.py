# SPDX-License-Identifier: Apache-2.0
"""Average precision of detections, beside pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from vimcore.data.coco import run_lengths
from vimcore.data.objects import Objects, Picture
from vimcore.nn.heads.cascade import Detections
from vimcore.tasks.detection.answers import Shown, quality
from vimcore.tasks.detection.evaluation import NAMES, Row, Truth, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
# A network that learns nothing, fast.
TINY = [
    *("--preset", "digits-objects", "--embed-dim", "16", "--depth", "2", "--epochs", "2", "--ema", "0.9"),
    *("--head-channels", "8", "--head-scales", "1", "0.5", "--head-anchors", "16", "24", "--batch-size", "4"),
    *("--head-box-width", "16", "--head-boxes-sampled", "8", "--head-proposals", "10", "--track", "none"),
]


@dataclass(frozen=True)
class Given(Objects):
    """Pictures that are only their truth."""

    rows: Sequence[list[Row]] = ()
    side: int = 40

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{index}"

    def read(self, index: int, masks: bool, seed: int = 0) -> Picture:
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def truth(self, index: int, masks: bool) -> list[Row]:
        return self.rows[index]

    def subset(self, index: Sequence[int]) -> Objects:
        raise NotImplementedError

    def identity(self) -> str:
        return ""


def rectangle(chance: np.random.Generator, side: int, around: Sequence[float] | None = None) -> list[float]:
    """x, y, width, height, whole numbers within the picture; near another one."""
    if around is None:
        size = chance.integers(2, side - 2, 2)
        return [float(v) for v in (*chance.integers(0, side - size), *size)]
    corners = np.array([around[0], around[1], around[0] + around[2], around[1] + around[3]])
    corners = np.clip(corners + chance.integers(-2, 3, 4), 0, side)
    corners[2:] = np.maximum(corners[2:], corners[:2] + 1)
    return [float(v) for v in (*corners[:2], *(corners[2:] - corners[:2]))]


def mask(box: Sequence[float], side: int) -> dict[str, Any]:
    x, y, w, h = map(int, box)
    found = np.zeros((side, side), bool)
    found[y : y + h, x : x + w] = True
    return run_lengths(found)


@pytest.mark.parametrize(("side", "classes"), [(40, 3), (130, 2), (40, 1)])
def test_average_precision_is_pycocotools(side: int, classes: int) -> None:
    """With crowds, classes without objects, pictures without detections, equal scores, all sizes."""
    chance = np.random.default_rng(side + classes)
    truth: list[list[Row]] = []
    found: dict[int, list[Row]] = {}
    for index in range(25):
        rows, dets = [], []
        for _ in range(int(chance.integers(0, 6))):
            box = rectangle(chance, side)
            label = int(chance.integers(1, max(classes, 2)))  # the last class has no object
            crowd = int(chance.random() < 0.2)
            rows.append(
                {
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * float(chance.uniform(0.5, 1)),
                    "iscrowd": crowd,
                    "segmentation": mask(box, side),
                }
            )
            for _ in range(int(chance.integers(0, 4))):
                near = rectangle(chance, side, box)
                other = int(chance.integers(1, classes + 1)) if chance.random() < 0.3 else label
                score = float(chance.integers(1, 12)) / 12
                dets.append(
                    {"category_id": other, "bbox": near, "score": score, "segmentation": mask(near, side)}
                )
        truth.append(rows)
        found[index] = dets if chance.random() < 0.9 else []
    names = [str(k) for k in range(classes)]
    ours = Truth(Given(names, None, {}, {}, truth, side), masks=True).precision(found)
    images = [{"id": i + 1, "height": side, "width": side} for i in range(len(truth))]
    annotations = [{"image_id": i + 1, **row} for i, rows in enumerate(truth) for row in rows]
    annotations = [{**row, "id": n} for n, row in enumerate(annotations, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
        }
        coco.createIndex()
        for precision, kind in zip(ours, ("bbox", "segm")):
            assert precision is not None
            rows = [{"image_id": i + 1, **row} for i, part in found.items() for row in part]
            if kind == "segm":
                rows = [{k: v for k, v in row.items() if k != "bbox"} for row in rows]
            theirs = COCOeval(coco, coco.loadRes(rows), kind)
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
            wanted = {name: value for name, value in zip(NAMES, theirs.stats) if value >= 0}
            assert dict(precision.values) == pytest.approx(wanted, abs=1e-9)
            assert 0.05 < wanted["ap"] < 0.95
            for k, value in enumerate(precision.per_class):
                part = theirs.eval["precision"][:, :, k, 0, -1]
                assert (np.isnan(value) and (part == -1).all()) or abs(value - part.mean()) < 1e-9


def test_without_objects_there_is_no_precision() -> None:
    with pytest.raises(ValueError, match="none of the pictures to validate on holds an object"):
        Truth(Given(["a"], None, {}, {}, [[], []]), masks=True).precision({0: [], 1: []})
    row = {
        "category_id": 1,
        "bbox": [1, 1, 4, 4],
        "area": 16,
        "iscrowd": 0,
        "segmentation": mask([1, 1, 4, 4], 40),
    }
    box, masks = Truth(Given(["a"], None, {}, {}, [[row]]), masks=True).precision({0: []})
    assert box.values == {"ap": 0, "ap50": 0, "ap75": 0}
    assert masks is not None


def test_rows_of_detections() -> None:
    boxes = torch.tensor([[2.0, 3.0, 12.0, 13.0], [0.0, 0.0, 4.0, 4.0]])
    masks = torch.zeros(2, 28, 28)
    masks[0] = 1
    rows = rows_of(Detections(boxes, torch.tensor([4, 0]), torch.tensor([0.9, 0.1]), masks), (20, 30))
    assert [row["category_id"] for row in rows] == [5, 1]
    assert rows[0]["bbox"] == [2, 3, 10, 10]
    full = np.zeros((20, 30), bool)
    full[3:13, 2:12] = True
    assert rows[0]["segmentation"] == run_lengths(full)
    assert rows[1]["segmentation"] == run_lengths(full & False)
    assert (
        "segmentation" not in rows_of(Detections(boxes, torch.tensor([4, 0]), torch.ones(2), None), (9, 9))[0]
    )


def test_quality() -> None:
    def shown(*boxes: tuple[float, ...], labels: Sequence[int], scores: Sequence[float] = ()) -> Shown:
        count = len(labels)
        values = np.array(scores or [1.0] * count, np.float32)
        return Shown(
            np.array(boxes, np.float32).reshape(-1, 4), np.array(labels), values, np.zeros((0, 9, 9), bool)
        )

    truth = shown((0, 0, 4, 4), (10, 10, 14, 14), labels=[1, 2])
    assert quality(truth, truth) == (1.0, 0, 0)
    assert quality(truth, shown((0, 0, 4, 2), (0, 0, 4, 4), labels=[1, 1], scores=[0.6, 0.9])) == (
        1 / (1 + 0.5 + 0.5),
        1,
        1,
    )
    assert quality(truth, shown((0, 0, 4, 4), labels=[2])) == (0.0, 2, 1)
    assert quality(shown(labels=[]), shown(labels=[])) == (1.0, 0, 0)
