# SPDX-License-Identifier: Apache-2.0
"""Clips on the disk: folders of pictures, one a frame, or .npy files (T, H, W, C) uint8. Needs no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .._core import Error
from ..utils.clips import checked_clip, chosen_frames
from .picture_files import SUFFIXES, read_file, reason, walk
from .pictures import decode

ARRAY = ".npy"


def find_clips(path: str, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Folders that hold pictures and .npy files, at any depth from `path` on; a file as given."""
    if not os.path.isdir(path):
        yield path
        return
    last = None
    for name in walk(path, (*SUFFIXES, ARRAY), passed_over):
        folder = os.path.dirname(name)
        if name.lower().endswith(ARRAY) or os.path.isdir(name):  # a folder here is one that cannot be read
            yield name
        elif folder != last:
            last = folder
            yield folder


def frame_names(folder: str) -> list[str]:
    """The pictures right in a folder, in the order of time: that of the numbers in their names."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    return [os.path.join(folder, name) for name in sorted(names, key=_in_time)]


def _in_time(name: str) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """Runs of digits by their value, so that frame 10 comes after frame 9."""
    parts: list[tuple[int, int, bytes]] = []
    text = ""
    for character in name + "\0":
        if character.isascii() and character.isdigit():
            text += character
            continue
        if text:
            parts.append((0, int(text), b""))
            text = ""
        parts.append((1, 0, os.fsencode(character)))
    return parts, os.fsencode(name)


def frames_of_clip(name: str, frames: int, draw: Callable[[int], int] | None = None) -> NDArray[np.int64]:
    """Which of a clip's frames the network sees: all, or one of each of `frames` equal parts.

    Args:
        draw: which one, see `chosen_frames`; None: the middle.

    Raises:
        ValueError: the clip's length is no multiple of `frames`, or it is none.
        OSError: it cannot be read.
    """
    if os.path.isdir(name):
        length = len(frame_names(name))
    elif name.lower().endswith(ARRAY):
        length = _array(name).shape[0]
    else:
        raise ValueError(f"{name}: a clip is a folder of pictures or a .npy file (T, H, W, C)")
    try:
        return chosen_frames(length, frames, draw)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_clip(name: str, frames: int, draw: Callable[[int], int] | None = None) -> NDArray[np.uint8]:
    """(frames, H, W, 3) uint8, the frames as `frames_of_clip` chooses them.

    Raises:
        ValueError, OSError: the clip cannot be read, its frames differ in size, or its length does not fit.
    """
    wanted = frames_of_clip(name, frames, draw)
    if not os.path.isdir(name):
        clip = np.ascontiguousarray(_array(name)[wanted])
        return np.broadcast_to(clip, (*clip.shape[:3], 3))
    pictures = frame_names(name)
    found = [_frame(pictures[i]) for i in wanted]
    sizes = {frame.shape[:2] for frame in found}
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ValueError(f"frames of different sizes: {listed}")
    return np.stack(found)


def _frame(name: str) -> NDArray[np.uint8]:
    """A picture; the error tells which frame it was."""
    try:
        return decode(read_file(name), "")
    except (Error, OSError, ValueError) as error:
        raise ValueError(f"{os.path.basename(name)}: {reason(error)}") from error


def _array(name: str) -> NDArray[np.uint8]:
    """The array of a .npy file, not read before it is looked at."""
    try:
        return checked_clip(np.load(name, mmap_mode="r", allow_pickle=False))
    except (EOFError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
