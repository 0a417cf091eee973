# SPDX-License-Identifier: Apache-2.0
"""Scores of pixels against torchmetrics, windows over images of any size, and files of answers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from vimcore.tasks.segmentation.answers import Answers, Worst, confusion, figures, read_answers
from vimcore.tasks.segmentation.windows import classes_of, logits_by_windows, starts


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_torchmetrics(classes: int, seed: int) -> None:
    """Pixels to ignore, classes that are absent, found without being there, or there without being found."""
    chance = np.random.default_rng(seed)
    some = chance.choice(classes, max(classes - seed, 1), replace=False)
    truth = chance.choice(some, (3, 20, 30)).astype(np.uint8)
    truth[chance.random(truth.shape) < 0.2] = 255
    found = chance.integers(0, classes, truth.shape).astype(np.uint8)
    if seed == 2 and classes > 2:  # a class that nobody names
        truth[truth == some[0]] = 255
        found[found == some[0]] = (some[0] + 1) % classes
    counts = sum(confusion(t, f, classes) for t, f in zip(truth, found))
    assert counts.sum() == (truth != 255).sum()
    ours = figures(counts)
    pair = torch.from_numpy(found).long(), torch.from_numpy(truth).long()
    if classes > 1:  # torchmetrics wants two
        jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
        matrix = MulticlassConfusionMatrix(classes, ignore_index=255)
        assert (counts == matrix(*pair).numpy()).all()
        assert ours.miou == pytest.approx(float(jaccard(*pair)), abs=1e-6)  # which divides in float32
    slow = []
    for k in range(classes):
        known = truth != 255
        both, either = (
            (known & (truth == k) & (found == k)).sum(),
            (known & ((truth == k) | (found == k))).sum(),
        )
        slow.append(both / either if either else np.nan)
    assert np.allclose(ours.iou, slow, rtol=0, atol=1e-9, equal_nan=True)
    assert ours.miou == pytest.approx(np.nanmean(slow), abs=1e-9)


def test_without_pixels_that_count() -> None:
    nothing = figures(confusion(np.full((4, 4), 255, np.uint8), np.zeros((4, 4), np.uint8), 3))
    assert np.isnan([nothing.miou, nothing.macc, nothing.aacc, *nothing.iou, *nothing.accuracy]).all()


def test_where_windows_begin() -> None:
    for length, expected in ((512, 1), (683, 2), (853, 2), (1365, 4)):
        found = starts(length, 512, 341)
        assert len(found) == expected
        assert found[0] == 0
        assert found[-1] == length - 512
        assert all(b - a <= 341 for a, b in itertools.pairwise(found))
    assert starts(100, 512, 341) == [0]
    assert starts(5, 4, 4) == [0, 1]


class Positions(nn.Module):
    """Says of a pixel what it is, and where in its window it lies."""

    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        self.window, self.seen = window, 0

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[2:]) == self.window
        self.seen += len(images)
        down = torch.arange(self.window[0], dtype=torch.float32)[:, None].expand(self.window)
        return torch.stack([images[:, 0], down.expand_as(images[:, 0])], 1)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (9, 6), (23, 17), (3, 6), (5, 20), (8, 5)])
def test_windows_cover_every_pixel(height: int, width: int) -> None:
    window, stride = (8, 6), (5, 4)
    images = torch.randn(2, 1, height, width)
    model = Positions(window)
    found = logits_by_windows(model, images, window, stride)
    assert found.shape == (2, 2, height, width)
    assert torch.allclose(found[:, 0], images[:, 0])  # the same from each window that sees it
    tops = starts(max(height, 8), 8, 5)
    assert model.seen == 2 * len(tops) * len(starts(max(width, 6), 6, 4))
    for row in range(height):  # the mean of its places in the windows that see it
        places = [row - top for top in tops if 0 <= row - top < 8]
        assert found[0, 1, row, 0] == pytest.approx(np.mean(places))


def test_whole_images_pass_as_they_are() -> None:
    images = torch.randn(1, 1, 7, 9)
    assert torch.equal(logits_by_windows(Positions((7, 9)), images, None, (1, 1))[:, 0], images[:, 0])


@pytest.mark.parametrize("size", [(5, 7), (13, 20), (30, 4), (3, 3)])
def test_classes_at_the_size_of_the_file(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In strips of one row as at once; ties go to the lowest class."""
    logits = torch.randn(4, 5, 7)
    full = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    for strip in (1, 100, 1 << 24):
        monkeypatch.setattr("vimcore.tasks.segmentation.windows.STRIP", strip)
        assert (classes_of(logits, size) == full.numpy()).all()
    assert (classes_of(torch.zeros(3, 4, 4), size) == 0).all()


def some_answers() -> Answers:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    truth = np.array([[0, 1, 2, 255]] * 4, np.uint8)
    counts = np.arange(9).reshape(3, 3)
    worst = [Worst(1, image, truth, truth % 3)]
    return Answers(
        counts, np.array([0.5, np.nan]), np.ones(2), ["a.png", ""], ["x", "y", "z"], image[:3, 0], worst
    )


def test_answers_through_their_file(tmp_path: Path) -> None:
    path, written = tmp_path / "eval.npz", some_answers()
    written.save(path)
    read = read_answers(path)
    assert (read.counts == written.counts).all()
    assert np.array_equal(read.miou, written.miou, equal_nan=True)
    assert (read.names, read.files) == (written.names, written.files)
    assert (read.palette == written.palette).all()
    assert read.worst[0].index == 1
    assert (read.worst[0].image == written.worst[0].image).all()
    assert (read.worst[0].truth == written.worst[0].truth).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": np.array("classify")}, "task"),
        ({"counts": np.zeros((2, 2), np.int64)}, "counts"),
        ({"counts": np.full((3, 3), -1)}, "counts"),
        ({"miou": np.zeros(5)}, "miou"),
        ({"worst": np.arange(9)}, "worst"),
        ({"worst0_truth": np.full((4, 4), 7, np.uint8)}, "class indices"),
        ({"worst0_found": np.zeros((4, 5), np.uint8)}, "as large as the image"),
        ({"palette": None}, "palette"),
    ],
)
def test_damaged_answers_are_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "eval.npz"
    some_answers().save(path)
    with np.load(path) as arrays:
        content = {**arrays, **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=told):
        read_answers(path)
