# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits in six colours, with captions: pairs of words and pictures that can be held out.

Of the 60 pairs of digit and colour 20 are never trained on: whoever names them has learnt both words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .classes import Images
from .digits import load_digits, picture, split_digits

NAME = "digits-colours"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "purple": (190, 60, 220),
    "white": (245, 245, 245),
}
TEMPLATES = (
    "a handwritten {}",
    "a picture of a {}",
    "the digit {}",
    "a {} written by hand",
    "a {}",
)
NAMES = tuple(f"{colour} {digit}" for digit in DIGITS for colour in COLOURS)  # of the pairs


def is_held_out(digit: int, colour: int) -> bool:
    """Whether this pair is never trained on: two colours of each digit."""
    return (colour - digit) % len(COLOURS) < 2


class Coloured(NamedTuple):
    """Pictures of 32 x 32 with captions; the label of one is that of its pair in `NAMES`."""

    images: Images
    captions: list[tuple[str, ...]]


def coloured_digits(held_out: bool) -> Coloured:
    """The held-out digits in all colours, or the training digits in the colours that they are shown in."""
    digits, labels = load_digits()
    chosen = split_digits(labels)[int(held_out)]
    tints = np.array(list(COLOURS.values()), np.float64) / 255
    pixels: list[NDArray[np.uint8]] = []
    pairs: list[int] = []
    for index in chosen:
        grey = picture(digits[index])[:, :, None].astype(np.float64)
        digit = int(labels[index])
        for colour, tint in enumerate(tints):
            if held_out or not is_held_out(digit, colour):
                pixels.append(np.round(grey * tint).astype(np.uint8))
                pairs.append(digit * len(COLOURS) + colour)
    captions = [tuple(template.format(NAMES[pair]) for template in TEMPLATES) for pair in pairs]
    images = Images([], np.array(pairs, np.int64), list(NAMES), np.stack(pixels))
    return Coloured(images, captions)
