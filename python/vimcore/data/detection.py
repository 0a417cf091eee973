# SPDX-License-Identifier: Apache-2.0
"""Pictures with objects to the network's input, and batches of them.

For training large-scale jitter as in ViTDet: a mirror image or not, any size from a tenth to twice the
network's, a window of it. Pictures are enlarged and reduced by Pillow's bilinear filter, as in detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .classes import GIVE_UP
from .objects import Objects, Picture, boxes_of
from .sampling import Key
from .transforms import Input, UnreadableError

Chance = np.random.Generator
Target = dict[str, Tensor]  # torchvision's


@dataclass(frozen=True)
class Jitter:
    """What chance does to training pictures; the defaults are ViTDet's.

    Attributes:
        scale: smallest and largest size, in the network's; None: as in evaluation.
        hflip: probability.
    """

    scale: tuple[float, float] | None = (0.1, 2.0)
    hflip: float = 0.5


@dataclass
class Detected:
    """Pictures with objects.

    Attributes:
        images: (C, h, w) float32 each, normalised, of any size up to the network's.
        targets: torchvision's dictionaries; for evaluation empty.
        sizes: (height, width) of each picture before.
        indices: places in the data set.
        errors: files that could not be read, and why.
        fault: what stops the run; "": nothing. The processes that load only report it.
    """

    images: list[Tensor]
    targets: list[Target]
    sizes: list[tuple[int, int]]
    indices: list[int]
    errors: dict[str, str] = field(default_factory=dict)
    fault: str = ""


class Framing:
    """From pictures to tensors.

    Args:
        of: what the network takes: channels (1: grey), size, mean and deviation.
        resize: (short, long) in pixels that the sides of a picture are fitted into in evaluation.
    """

    def __init__(self, of: Input, resize: tuple[int, int], jitter: Jitter, masks: bool) -> None:
        self.of, self.resize, self.jitter, self.masks = of, resize, jitter, masks
        self.mean = torch.tensor(of.mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(of.std, dtype=torch.float32)[:, None, None]

    def evaluation(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(C, h, w) of a picture (H, W, 3), without chance."""
        size = fitted(pixels.shape, self.resize)
        return self._tensor(enlarged(pixels, size, (0, 0, *size)))

    def training(self, picture: Picture, chance: Chance) -> tuple[Tensor, Target]:
        """(C, h, w), and the objects in it: torchvision's target, labels from 1 on.

        What the window leaves of objects makes their boxes anew; those of which it leaves nothing go.
        """
        pixels, boxes, labels, masks = picture
        height, width = pixels.shape[:2]
        if chance.random() < self.jitter.hflip:
            pixels = pixels[:, ::-1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
            masks = None if masks is None else masks[:, :, ::-1]
        if self.jitter.scale is None:
            size = fitted(pixels.shape, self.resize)
        else:
            size = scaled_into(pixels.shape, self.of.size, float(chance.uniform(*self.jitter.scale)))
        top, left = (round(max(have - most, 0) * chance.random()) for have, most in zip(size, self.of.size))
        bottom, right = (min(have, most) for have, most in zip(size, self.of.size))
        window = top, left, top + bottom, left + right
        image = self._tensor(enlarged(pixels, size, window))
        scales = np.array([size[1] / width, size[0] / height] * 2, np.float32)
        boxes = boxes * scales - np.array([left, top] * 2, np.float32)
        boxes = np.clip(boxes, 0, np.array([right, bottom] * 2, np.float32))
        if masks is None:
            kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        else:
            masks = resampled(masks, size, window)
            kept = np.flatnonzero(masks.any((1, 2)))
            masks = masks[kept]
        boxes = boxes[kept] if masks is None else boxes_of(masks)
        target = {
            "boxes": torch.from_numpy(np.ascontiguousarray(boxes, np.float32)),
            "labels": torch.from_numpy(labels[kept]) + 1,
        }
        if masks is not None:
            target["masks"] = torch.from_numpy(np.ascontiguousarray(masks))
        return image, target

    def _tensor(self, pixels: NDArray[np.uint8]) -> Tensor:
        if self.of.channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C"))
        return (values / 255 - self.mean) / self.std


def fitted(shape: Sequence[int], resize: tuple[int, int]) -> tuple[int, int]:
    """(height, width) scaled so that the shorter side is `resize[0]`, the longer one at most `resize[1]`."""
    scale = min(resize[0] / min(shape[:2]), resize[1] / max(shape[:2]))
    return max(int(shape[0] * scale + 0.5), 1), max(int(shape[1] * scale + 0.5), 1)


def scaled_into(shape: Sequence[int], size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(height, width) scaled to fit into `size` times the factor."""
    scale = min(size[0] * factor / shape[0], size[1] * factor / shape[1])
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)


def enlarged(
    pixels: NDArray[np.uint8], size: tuple[int, int], window: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """The window (top, left, bottom, right) of a picture (H, W, 3) resized to `size`."""
    top, left, bottom, right = window
    height, width = pixels.shape[:2]
    if size == (height, width):
        return pixels[top:bottom, left:right]
    box = tuple(
        at * old / new
        for at, old, new in zip((left, top, right, bottom), (width, height) * 2, size[::-1] * 2)
    )
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box))


def resampled(masks: NDArray[Any], size: tuple[int, int], window: tuple[int, int, int, int]) -> NDArray[Any]:
    """The same of masks (n, H, W): of each pixel the one that holds its centre."""
    top, left, bottom, right = window
    rows, columns = (
        np.minimum(((np.arange(a, b) + 0.5) * (old / new)).astype(np.int64), old - 1)
        for a, b, old, new in zip((top, left), (bottom, right), masks.shape[1:], size)
    )
    return masks[:, rows[:, None], columns]


# ---- batches -----------------------------------------------------------------------------------------------


class Training(Dataset[Detected]):
    """Jittered pictures by (index, seed); one that cannot be read is replaced by the next one that can."""

    def __init__(self, objects: Objects, framing: Framing) -> None:
        self.objects, self.framing = objects, framing

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, key: Key) -> Detected:
        index, seed = key
        found = Detected([], [], [], [])
        for i in range(min(GIVE_UP, len(self.objects))):
            at = (index + i) % len(self.objects)
            try:
                picture = self.objects.read(at, self.framing.masks, seed)
            except UnreadableError as error:
                found.errors[self.objects.name(at)] = str(error)
                continue
            image, target = self.framing.training(picture, np.random.default_rng(seed))
            size = picture.pixels.shape[:2]
            return Detected([image], [target], [(size[0], size[1])], [at], found.errors)
        name, reason = next(reversed(found.errors.items()))
        found.fault = f"{len(found.errors)} pictures in a row cannot be used, the last: {name}: {reason}"
        return found


class Validation(Dataset[Detected]):
    """Pictures by index, without targets; of one that cannot be read there is only the reason."""

    def __init__(self, objects: Objects, framing: Framing) -> None:
        self.objects, self.framing = objects, framing

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Detected:
        try:
            pixels = self.objects.read(index, masks=False).pixels
        except UnreadableError as error:
            return Detected([], [], [], [], {self.objects.name(index): str(error)})
        return Detected(
            [self.framing.evaluation(pixels)], [{}], [(pixels.shape[0], pixels.shape[1])], [index]
        )


def collate(samples: Sequence[Detected]) -> Detected:
    """One batch of samples."""
    return Detected(
        [image for sample in samples for image in sample.images],
        [target for sample in samples for target in sample.targets],
        [size for sample in samples for size in sample.sizes],
        [index for sample in samples for index in sample.indices],
        {name: reason for sample in samples for name, reason in sample.errors.items()},
        next((sample.fault for sample in samples if sample.fault), ""),
    )
