# SPDX-License-Identifier: Apache-2.0
"""What a network takes of images: channels, size, mean and deviation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from . import transforms
from .classes import Images
from .transforms import Input

_MEASURED = 256  # numpy files looked at for mean and deviation


def channels_of(images: Images, in_chans: int | None) -> int:
    """Channels of the network's input: `in_chans`, or what the images have.

    Raises:
        ValueError: the images cannot have them.
    """
    if images.arrays:
        return in_chans or next(_readable(images)).shape[0]
    channels = in_chans or 3
    if channels not in (1, 3):
        raise ValueError(f"in_chans: expected 1 or 3 for pictures, got {channels}")
    return channels


def input_of(
    images: Images,
    channels: int,
    size: tuple[int, int],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop_pct: float,
) -> Input:
    """Mean and deviation as given, as usual for pictures, or measured.

    Args:
        size: (height, width) in pixels.
        crop_pct: of validation: image size over short side before the crop.
    """
    if mean is None or std is None:
        known = None if images.arrays else transforms.default_statistics(channels)
        statistics = known or _statistics(images)
        mean, std = mean or statistics[0], std or statistics[1]
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise ValueError(f"mean and std: expected {channels} values each, std positive, got {mean} and {std}")
    return Input(channels, size, mean, std, int(min(size) / crop_pct))


def shape_of(of: Input, frames: int) -> tuple[int, ...]:
    """Of the network's input: (C, H, W), or of clips (C, T, H, W)."""
    return (of.channels, frames, *of.size) if frames else (of.channels, *of.size)


def eval_transform(of: Input, images: Images) -> transforms.Transform:
    """From an image or clip as read to the network's input, without chance."""
    if images.frames:
        return transforms.clip_eval(of)
    return transforms.array_eval(of) if images.arrays else transforms.picture_eval(of)


def _readable(images: Images) -> Iterator[Tensor]:
    """Some of the arrays (C, H, W) float32, those that can be read."""
    found = 0
    for index in range(0, len(images), max(len(images) // _MEASURED, 1)):
        with contextlib.suppress(transforms.UnreadableError):  # told when the run meets it
            yield transforms.scaled(images.read(index))
            found += 1
    if not found:
        raise ValueError("none of the images could be read")


def _statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, from 0 to 1 for integer types."""
    total = squares = np.zeros(0)
    count = 0
    for array in _readable(images):
        values = array.double().flatten(1).numpy()
        if count and len(values) != len(total):
            continue  # of another number of channels: skipped and told by the run
        total = values.sum(1) + (total if count else 0)
        squares = (values**2).sum(1) + (squares if count else 0)
        count += values.shape[1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return tuple(round(float(v), 6) for v in mean), tuple(max(round(float(v), 6), 1e-6) for v in std)
