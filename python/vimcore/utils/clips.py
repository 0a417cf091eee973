# SPDX-License-Identifier: Apache-2.0
"""Clips in memory: which frames a network sees, and its input of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess


def chosen_frames(length: int, frames: int, draw: Callable[[int], int] | None = None) -> NDArray[np.int64]:
    """Which of `length` frames a network of `frames` sees: all, or the middle of as many equal parts.

    Args:
        draw: gives a number below its argument: the frame of a part instead.

    Raises:
        ValueError: the length is no multiple of `frames`.
    """
    if length == 0 or length % frames:
        raise ValueError(
            f"{length} frames, which {frames} do not divide: expected {frames} or a multiple of them"
        )
    part = length // frames
    within = part // 2 if draw is None else np.array([draw(part) for _ in range(frames)], np.int64)
    return np.arange(frames) * part + within


def checked_clip(clip: Any) -> NDArray[np.uint8]:
    """The clip, if it is one: (T, H, W, C) uint8 of 1 or 3 channels.

    Raises:
        ValueError: says what it is instead.
    """
    shape = clip.shape if isinstance(clip, np.ndarray) else type(clip).__name__
    if not isinstance(clip, np.ndarray) or clip.ndim != 4 or clip.shape[3] not in (1, 3) or 0 in clip.shape:
        raise ValueError(f"expected an array (T, H, W, C) of 1 or 3 channels, got {shape}")
    if clip.dtype != np.uint8:
        raise ValueError(f"expected uint8, got {clip.dtype}")
    return clip


def clip_input(clip: Any, frames: int, preprocess: Preprocess) -> NDArray[np.float32]:
    """The network's input (C, frames, h, w) of a clip (T, H, W, 1 or 3) uint8, see `chosen_frames`.

    Raises:
        ValueError: it is no such array, or its length does not fit.
    """
    clip = checked_clip(clip)
    clip = clip[chosen_frames(len(clip), frames)]
    colour = np.ascontiguousarray(np.broadcast_to(clip, (*clip.shape[:3], 3)))
    return np.stack([_core.preprocess_pixels(frame, preprocess) for frame in colour], 1)
