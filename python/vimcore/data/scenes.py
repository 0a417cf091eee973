# SPDX-License-Identifier: Apache-2.0
"""`digits-scenes`: handwritten digits before coloured backgrounds, with exact masks and boxes, drawn by seed.

A scene needs no file and takes about a millisecond, so that a run never sees one twice. Training scenes are
composed of the training part of the digits, validation scenes of the held-out fifth. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .digits import load_digits, split_digits

NAME = "digits-scenes"
DIGITS = tuple(map(str, range(10)))  # classes of instances
CLASSES = ("background", *DIGITS)  # classes of the semantic mask
PALETTE = (  # of CLASSES, [red, green, blue]
    (24, 26, 40),
    (31, 119, 220),
    (255, 127, 14),
    (44, 180, 84),
    (226, 48, 60),
    (150, 92, 214),
    (160, 110, 70),
    (240, 110, 190),
    (245, 245, 245),
    (215, 200, 30),
    (20, 200, 215),
)
IGNORE = 255
SIDE = 48  # pixels
VALIDATION = 200  # scenes

FULL_INK = 16  # value of the darkest pixel of a digit
INK = 0.45  # share of full ink from which a pixel belongs to a digit
TURN = 15.0  # degrees, either way
CONTRAST = 0.35  # between digit and background, in one channel at least, values 0 to 1
MOST_HIDDEN = 0.25  # of an earlier digit, by a later one
LEAST_VISIBLE = 0.5  # of a digit that counts
LEAST_PIXELS = 24  # of a digit that counts
TRIES = 50  # places for a digit; where none of them will do, it is left out

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """A picture with its truth; n digits count.

    Attributes:
        image: (S, S, 3) uint8.
        mask: (S, S) uint8 index into CLASSES: 0 background, 1 + digit; 255: a digit of which too little is
            visible, to be ignored.
        boxes: (n, 4) int64 left, top, right, bottom of the visible pixels in pixels; right and bottom are
            the first column and row beyond them.
        digits: (n,) int64, 0 to 9.
        masks: (n, S, S) bool, the visible pixels of each.
    """

    image: Pixels
    mask: Pixels
    boxes: NDArray[np.int64]
    digits: NDArray[np.int64]
    masks: Mask


class Scenes:
    """Draws scenes.

    Args:
        side: S, pixels.
        count: fewest and most digits of a scene.
        size: smallest and largest side of a digit's picture, in shares of S.
        held_out: of the held-out fifth of the digits, else of the training part.

    Raises:
        ValueError: names what is out of range.
    """

    def __init__(
        self,
        side: int = SIDE,
        count: tuple[int, int] = (1, 3),
        size: tuple[float, float] = (0.40, 0.65),
        held_out: bool = False,
    ) -> None:
        if side < 16:
            raise ValueError(f"side: expected 16 pixels or more, got {side}")
        if not 0 <= count[0] <= count[1]:
            raise ValueError(f"count: expected 0 <= fewest <= most, got {count}")
        if not 0 < size[0] <= size[1] <= 0.75:  # turned, it still has to fit
            raise ValueError(f"size: expected 0 < smallest <= largest <= 0.75, got {size}")
        self.side, self.count, self.size, self.held_out = side, count, size, held_out
        images, labels = load_digits()
        part = split_digits(labels)[1 if held_out else 0]
        self.pictures = (images[part].astype(np.float32) * (255 / FULL_INK)).round().astype(np.uint8)
        self.labels = labels[part]
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
        self.y, self.x = y, x

    def draw(self, seed: int) -> Scene:
        """The scene of this seed (0 or more), always the same; training and held-out ones differ."""
        chance = np.random.default_rng((int(self.held_out), seed))
        paint = self._background(chance)
        owner = np.full((self.side, self.side), -1, np.int64)  # which digit a pixel shows
        labels: list[int] = []
        areas: list[int] = []
        for _ in range(int(chance.integers(self.count[0], self.count[1] + 1))):
            which = int(chance.integers(len(self.labels)))
            ink = self._ink(chance, which)
            place = self._place(chance, ink, owner, areas)
            if place is None:
                continue
            rows, columns = (slice(at, at + n) for at, n in zip(place, ink.shape))
            colour = _contrasting(chance, paint[rows, columns][ink].mean(0))
            paint[rows, columns][ink] = colour
            owner[rows, columns][ink] = len(labels)
            labels.append(int(self.labels[which]))
            areas.append(int(ink.sum()))
        noise = chance.normal(0, 0.03, paint.shape)
        image = np.clip(np.round((paint + noise) * 255), 0, 255).astype(np.uint8)
        return _scene(image, owner, labels, areas)

    def _background(self, chance: np.random.Generator) -> NDArray[np.float32]:
        """Clouds of colour with a grating across them; (S, S, 3), values from 0 to 1."""
        mean, spread = chance.uniform(0.2, 0.8, 3), chance.uniform(-0.15, 0.15, (5, 5, 3))
        clouds = Image.fromarray(np.round(255 * (mean + spread)).astype(np.uint8))
        smooth = clouds.resize((self.side, self.side), Image.Resampling.BICUBIC)
        angle, phase = chance.uniform(0, math.pi), chance.uniform(0, 2 * math.pi)
        waves = 2 * math.pi * chance.uniform(2, 10)  # along the side
        wave = np.sin(waves * (math.cos(angle) * self.x + math.sin(angle) * self.y) + phase)
        strength = chance.uniform(-0.08, 0.08, 3).astype(np.float32)
        paint: NDArray[np.float32] = np.asarray(smooth, np.float32) / 255 + strength * wave[:, :, None]
        return paint

    def _ink(self, chance: np.random.Generator, which: int) -> Mask:
        """The pixels of a digit, enlarged and turned, in their bounding box."""
        side = round(chance.uniform(*self.size) * self.side)
        large = Image.fromarray(self.pictures[which]).resize((side, side), Image.Resampling.BICUBIC)
        turned = large.rotate(chance.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
        ink = np.asarray(turned) >= INK * 255
        rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def _place(
        self, chance: np.random.Generator, ink: Mask, owner: NDArray[np.int64], areas: list[int]
    ) -> tuple[int, int] | None:
        """Top and left where the digit leaves enough of each earlier one to be seen."""
        height, width = ink.shape
        for _ in range(TRIES):
            top = int(chance.integers(self.side - height + 1))
            left = int(chance.integers(self.side - width + 1))
            below = owner[top : top + height, left : left + width][ink]
            hidden = np.bincount(below[below >= 0], minlength=len(areas))
            if all(count <= MOST_HIDDEN * area for count, area in zip(hidden, areas)):
                return top, left
        return None


def _contrasting(chance: np.random.Generator, background: NDArray[np.float32]) -> NDArray[np.float64]:
    """A colour that differs from the background's mean."""
    while True:
        colour = chance.uniform(0, 1, 3)
        if np.abs(colour - background).max() >= CONTRAST:
            return colour


def _scene(image: Pixels, owner: NDArray[np.int64], labels: list[int], areas: list[int]) -> Scene:
    mask = np.zeros(owner.shape, np.uint8)
    boxes, digits, masks = [], [], []
    for i, (label, area) in enumerate(zip(labels, areas)):
        visible = owner == i
        count = int(visible.sum())
        if count < LEAST_VISIBLE * area or count < LEAST_PIXELS:
            mask[visible] = IGNORE
            continue
        mask[visible] = 1 + label
        rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        digits.append(label)
        masks.append(visible)
    return Scene(
        image,
        mask,
        np.array(boxes, np.int64).reshape(-1, 4),
        np.array(digits, np.int64),
        np.array(masks, bool).reshape(-1, *owner.shape),
    )
