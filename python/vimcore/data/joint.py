# SPDX-License-Identifier: Apache-2.0
"""Images together with their masks, as read from files, to the network's input: mmsegmentation's steps.

All chance comes from one generator, which the seed of a sample makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .masks import IGNORE, Mask
from .transforms import Input, UnreadableError, scaled

Pixels = NDArray[np.uint8]
Chance = np.random.Generator
TRIES = 10  # further crops, until one is not almost all of one class
HUES = 180  # steps of a whole turn of colours, as OpenCV counts them


@dataclass(frozen=True)
class JointAugment:
    """What chance does to images and masks. The defaults are mmsegmentation's for ADE20K.

    Attributes:
        resize: (short, long) in pixels that the sides are fitted into, before the scale; None: as they are.
        scale: smallest and largest factor.
        hflip: probability.
        most_of_one: share of a crop that one class should not reach; 1: any crop will do.
        photometric: distort brightness, contrast, saturation and hue of colour pictures.
    """

    resize: tuple[int, int] | None = (512, 2048)
    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    most_of_one: float = 0.75
    photometric: bool = True


class Joint:
    """From (H, W, 3) uint8 of pictures or (C, H, W) of arrays, with masks (H, W), to tensors.

    Args:
        of: what the network takes; pictures become grey where that is one channel.
        arrays: the images are arrays.
    """

    def __init__(self, of: Input, arrays: bool, augment: JointAugment) -> None:
        self.of, self.arrays, self.augment = of, arrays, augment
        self.mean = torch.tensor(of.mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(of.std, dtype=torch.float32)[:, None, None]

    def training(self, image: NDArray[Any], mask: Mask, chance: Chance) -> tuple[Tensor, Tensor]:
        """(C, h, w) normalised, and (h, w) uint8, of the network's image size.

        What is smaller is filled up at the right and bottom: the image with its mean, the mask with 255.
        """
        a, values = self.augment, self._channels(image)
        size = fitted(mask.shape, a.resize, float(chance.uniform(*a.scale)))
        values, mask = self._resized(values, size), resize_mask(mask, size)
        top, left = limited_crop(mask, self.of.size, a.most_of_one, chance)
        rows, columns = slice(top, top + self.of.size[0]), slice(left, left + self.of.size[1])
        values, mask = values[:, rows, columns], mask[rows, columns]
        if chance.random() < a.hflip:
            values, mask = values.flip(2), mask[:, ::-1]
        if a.photometric and not self.arrays and self.of.channels == 3:
            pixels = photometric(values.permute(1, 2, 0).to(torch.uint8).numpy(), chance)
            values = torch.from_numpy(pixels).permute(2, 0, 1).float()
        values = self._normalised(values)
        below, beside = self.of.size[0] - mask.shape[0], self.of.size[1] - mask.shape[1]
        if below or beside:
            values = F.pad(values, (0, beside, 0, below))
            mask = np.pad(mask, ((0, below), (0, beside)), constant_values=IGNORE)
        return values.contiguous(), torch.from_numpy(np.ascontiguousarray(mask))

    def evaluation(self, image: NDArray[Any]) -> Tensor:
        """(C, h, w) normalised, fitted into `resize`; without chance."""
        values = self._channels(image)
        size = fitted(tuple(values.shape[1:]), self.augment.resize)
        return self._normalised(self._resized(values, size))

    def _channels(self, image: NDArray[Any]) -> Tensor:
        """(C, H, W) float32: 0 to 255 of pictures, of arrays as `transforms.scaled`."""
        channels = self.of.channels
        if self.arrays:
            if image.shape[0] != channels:
                raise UnreadableError(f"expected {channels} channels (C, H, W), got {image.shape}")
            return scaled(image)
        if channels == 1:
            image = np.array(Image.fromarray(image).convert("L"))[:, :, None]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()

    def _resized(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(values.shape[1:]) == size:
            return values
        found = resize_bilinear(values, size)
        return found if self.arrays else (found + 0.5).floor()  # to 8 bits, as OpenCV rounds

    def _normalised(self, values: Tensor) -> Tensor:
        return ((values if self.arrays else values / 255) - self.mean) / self.std


def fitted(size: Sequence[int], resize: tuple[int, int] | None, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) scaled so that the sides fit into (short, long), each times the factor, and no more.

    Without `resize` the sides are multiplied.
    """
    height, width = size
    if resize is None:
        scale = factor
    else:
        short, long = int(resize[0] * factor), int(resize[1] * factor)
        scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_bilinear(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) to (C, *size), between centres of pixels, without antialiasing, as OpenCV does it."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """(H, W) to `size`: of each pixel the one at or before it, as OpenCV does it."""
    if mask.shape == size:
        return mask
    rows, columns = (
        np.minimum((np.arange(n) * (old / n)).astype(np.int64), old - 1) for n, old in zip(size, mask.shape)
    )
    return mask[rows[:, None], columns]


def limited_crop(mask: Mask, size: tuple[int, int], most_of_one: float, chance: Chance) -> tuple[int, int]:
    """Top and left of a window: one with two classes or more, none of which has its `most_of_one`.

    Pixels to be ignored do not count. After ten further draws the last one stands, whatever it holds.
    """
    room = [max(have - want, 0) for have, want in zip(mask.shape, size)]

    def drawn() -> tuple[int, int]:
        return int(chance.integers(room[0] + 1)), int(chance.integers(room[1] + 1))

    top, left = drawn()
    for _ in range(TRIES if most_of_one < 1 else 0):
        counts = np.bincount(mask[top : top + size[0], left : left + size[1]].ravel(), minlength=256)
        counts[IGNORE] = 0
        if np.count_nonzero(counts) > 1 and counts.max() < most_of_one * counts.sum():
            break
        top, left = drawn()
    return top, left


# ---- colours -----------------------------------------------------------------------------------------------


def photometric(pixels: Pixels, chance: Chance) -> Pixels:
    """Brightness, contrast, saturation and hue of (H, W, 3) distorted, each by a toss; 8 bits after each."""
    if chance.random() < 0.5:
        pixels = _linear(pixels, 1.0, chance.uniform(-32, 32))
    contrast_first = chance.random() < 0.5
    if contrast_first:
        pixels = _contrast(pixels, chance)
    if chance.random() < 0.5:
        pixels = with_colours(pixels, saturation=chance.uniform(0.5, 1.5))
    if chance.random() < 0.5:
        pixels = with_colours(pixels, turn=int(chance.integers(-18, 18)) / HUES)
    return pixels if contrast_first else _contrast(pixels, chance)


def _contrast(pixels: Pixels, chance: Chance) -> Pixels:
    return _linear(pixels, chance.uniform(0.5, 1.5), 0.0) if chance.random() < 0.5 else pixels


def _linear(pixels: Pixels, factor: float, offset: float) -> Pixels:
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return table[pixels]


def with_colours(pixels: Pixels, saturation: float = 1.0, turn: float = 0.0) -> Pixels:
    """(H, W, 3) with the saturation times a factor, the hue turned by a share of the whole circle (HSV)."""
    rgb = pixels.astype(np.float32)
    value = rgb.max(2)
    chroma = value - rgb.min(2)
    red, green, blue = (rgb[:, :, i] for i in range(3))
    safe = np.where(chroma > 0, chroma, 1)
    sixths = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + np.float32(6 * turn)
    chroma = np.minimum(chroma * np.float32(saturation), value)
    found = np.empty_like(rgb)
    for channel, place in enumerate((5, 3, 1)):  # value minus chroma, by how far the hue is from the channel
        distance = (place + sixths) % 6
        found[:, :, channel] = value - chroma * np.clip(np.minimum(distance, 4 - distance), 0, 1)
    return (found + 0.5).astype(np.uint8)
