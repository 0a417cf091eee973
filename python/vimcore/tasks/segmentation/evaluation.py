# SPDX-License-Identifier: Apache-2.0
"""How well a network segments: its confusion matrix over images of any size, and image by image."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.pairs import Pairs
from ...data.segments import Segments
from ...utils import distributed
from .answers import Answers, Counts, Worst, confusion, figures
from .windows import Sides, classes_of, logits_by_windows

LARGEST = 512  # pixels of a side of an image that is kept


@dataclass(frozen=True)
class Sight:
    """How a network looks at an image.

    Attributes:
        window, stride: pixels, see `windows.logits_by_windows`; window None: the whole image.
        precision: of autocast; float32: none.
    """

    window: Sides | None
    stride: Sides
    precision: torch.dtype = torch.float32


@dataclass
class Counted:
    """Over the images of this process.

    Attributes:
        counts: pixels, row truth, column found.
        errors: files that could not be read.
    """

    counts: Counts
    images: int = 0
    seconds: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)


def found_masks(
    model: nn.Module, batches: Iterable[Segments], device: torch.device, sight: Sight, counted: Counted
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Index, truth and found classes (H, W) of each image; adds images, time and errors to `counted`.

    Raises:
        ValueError: a mask holds an index that no class has.
    """
    with evaluating(model):
        for batch in batches:
            counted.errors.update(batch.errors)
            if batch.fault:
                raise ValueError(batch.fault)
            for places in _of_one_size(batch.images):
                begin = time.perf_counter()
                images = torch.stack([batch.images[i] for i in places]).to(device, non_blocking=True)
                with torch.autocast(device.type, sight.precision, sight.precision != torch.float32):
                    logits = logits_by_windows(model, images, sight.window, sight.stride)
                for i, own in zip(places, logits):
                    truth = batch.masks[i].numpy()
                    found = classes_of(own, (truth.shape[0], truth.shape[1]))
                    counted.images += 1
                    counted.seconds += time.perf_counter() - begin
                    begin = time.perf_counter()
                    yield batch.indices[i], truth, found


def count(
    model: nn.Module, batches: Iterable[Segments], device: torch.device, sight: Sight, classes: int
) -> Counted:
    """Over the images of all processes; errors and seconds are those of this one's.

    Every process evaluates the network of the first one, statistics of BatchNorm included.

    Raises:
        RuntimeError: none of the images could be read.
    """
    distributed.share_buffers(model)
    counted = Counted(np.zeros((classes, classes), np.int64))
    for _, truth, found in found_masks(model, batches, device, sight, counted):
        counted.counts += confusion(truth, found, classes)
    images, *pixels = distributed.sums([float(counted.images), *counted.counts.ravel().tolist()])
    if not images:
        raise RuntimeError("none of the images to validate on could be read")
    counted.images = int(images)
    counted.counts = np.array(pixels).astype(np.int64).reshape(classes, classes)
    return counted


def answers(
    model: nn.Module,
    batches: Iterable[Segments],
    device: torch.device,
    sight: Sight,
    pairs: Pairs,
    palette: Any,
    worst: int,
) -> tuple[Answers, Counted]:
    """Image by image, by one process; the images of the smallest mIoU are kept.

    Args:
        pairs: that the batches are of, whole and in order.
        worst: how many images to keep.
    """
    classes = len(pairs.classes)
    counted = Counted(np.zeros((classes, classes), np.int64))
    files, miou, right = [], [], []
    kept: list[tuple[float, int, int, NDArray[np.uint8]]] = []  # a heap, the best of the worst first
    for index, truth, found in found_masks(model, batches, device, sight, counted):
        own = confusion(truth, found, classes)
        counted.counts += own
        of_image = figures(own)
        files.append(pairs.images.files[index] if pairs.images.files else "")
        miou.append(of_image.miou)
        right.append(of_image.aacc)
        if not math.isnan(of_image.miou):
            heapq.heappush(kept, (-of_image.miou, 1 - len(files), index, found))
            if len(kept) > worst:
                heapq.heappop(kept)
    if not files:
        raise RuntimeError("none of the images could be read")
    kept.sort(key=lambda one: one[:2], reverse=True)
    shown = [_reduced(pairs, index, -row, found) for _, row, index, found in kept]
    colours = np.array(palette, np.uint8)
    result = Answers(
        counted.counts, np.array(miou), np.array(right), files, list(pairs.classes), colours, shown
    )
    return result, counted


def _reduced(pairs: Pairs, index: int, row: int, found: NDArray[np.uint8]) -> Worst:
    """Of every so many pixels one, so that the image fits into a figure."""
    image, truth = pairs.pair(index)
    step = -(-max(truth.shape) // LARGEST)
    picture = picture_of(image, pairs.images.arrays)
    return Worst(row, *(array[::step, ::step] for array in (picture, truth, found)))


def picture_of(image: NDArray[Any], arrays: bool) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 to look at: of an array (C, H, W) three channels or the first, each over its range."""
    if not arrays:
        return image
    chosen = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, 0)
    low, high = chosen.min((1, 2), keepdims=True), chosen.max((1, 2), keepdims=True)
    scaled = (chosen.astype(np.float64) - low) / np.maximum(high.astype(np.float64) - low, 1e-12)
    return np.ascontiguousarray((255 * scaled).round().astype(np.uint8).transpose(1, 2, 0))


def _of_one_size(images: list[Tensor]) -> list[list[int]]:
    """Places of images that can be stacked, in order."""
    groups: list[list[int]] = []
    for i, image in enumerate(images):
        if groups and images[groups[-1][0]].shape == image.shape:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode and no gradients are kept; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
