# SPDX-License-Identifier: Apache-2.0
"""Pictures as people have them: files, bytes, Pillow's images, arrays; one or a list. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess
from ..utils.files import printable
from .picture_files import read_file, reason
from .pictures import decode, network_input
from .pillow_pictures import upright_pixels

KINDS = "a path, bytes of a file, a PIL image, a uint8 array (H, W, 3 or 4) or (H, W), or a list of these"
_SIDE = 128  # pixels of a thumbnail


@dataclass(frozen=True)
class Given:
    """One picture that a user gave, not decoded yet.

    Attributes:
        name: a path, or "image N".
        value: of one of KINDS.
    """

    name: str
    value: Any


def given(what: str, x: Any) -> tuple[list[Given], bool]:
    """The pictures, and whether it was a single one.

    Args:
        what: function, for messages.

    Raises:
        TypeError: x is something else.
    """
    if _is_one(x):
        return [Given(_name(x, 0), x)], True
    if isinstance(x, np.ndarray):
        if x.ndim != 4:
            raise TypeError(_expected(what, x))
        return [Given(f"image {i}", one) for i, one in enumerate(x)], False
    if isinstance(x, (str, bytes)) or not isinstance(x, Iterable):
        raise TypeError(_expected(what, x))
    found = []
    for i, one in enumerate(x):
        if not _is_one(one):
            raise TypeError(f"{_expected(what, one)} at place {i}")
        found.append(Given(_name(one, i), one))
    return found, False


def input_of(picture: Given, steps: Preprocess) -> NDArray[np.float32]:
    """(C, h, w): the network's input.

    Raises:
        ValueError: names the picture and what is wrong with it.
    """
    try:
        data = _bytes(picture.value)
        if data is not None:
            return network_input(data, "", steps)
        return _core.preprocess_pixels(_pixels(picture.value), steps)
    except (_core.Error, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{printable(picture.name)}: {reason(error)}") from error


def thumbnail(picture: Given, side: int = _SIDE) -> NDArray[np.uint8] | None:
    """(h, w, 3), of at most `side` pixels a side; None: it cannot be read any more."""
    try:
        data = _bytes(picture.value)
        pixels = _pixels(picture.value) if data is None else decode(data, "")
    except (_core.Error, OSError, ValueError, MemoryError):
        return None
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    return _core.resize_bicubic(pixels, max(round(height * scale), 1), max(round(width * scale), 1))


def _bytes(value: Any) -> bytes | None:
    """Of a file; None: it is no file."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return read_file(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else None


def _pixels(value: Any) -> NDArray[np.uint8]:
    """(H, W, 3) of an array, alpha dropped, or a PIL image, turned as its EXIF orientation says."""
    if not isinstance(value, np.ndarray):
        value = upright_pixels(value)
    if value.dtype != np.uint8:
        raise ValueError(
            f"expected uint8 pixels, got {value.dtype}; normalised float32 images (B, C, H, W) go to the "
            "runtime as they are: runtime(images)"
        )
    if value.ndim == 2 or value.shape[2:] == (1,):
        value = np.repeat(value.reshape(*value.shape[:2], 1), 3, 2)
    if value.ndim != 3 or value.shape[2] not in (3, 4) or not value.size:
        raise ValueError(f"expected pixels (H, W, 3), (H, W, 4) or (H, W), got {value.shape}")
    return np.ascontiguousarray(value[..., :3])


def _is_one(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return x.ndim in (2, 3)
    return isinstance(x, (str, bytes, bytearray, memoryview, os.PathLike)) or _is_pil(x)


def _is_pil(x: Any) -> bool:
    return any(kind.__module__ == "PIL.Image" for kind in type(x).__mro__)  # without importing it


def _name(x: Any, place: int) -> str:
    if isinstance(x, (str, os.PathLike)):
        return os.fsdecode(x)
    return os.fsdecode(getattr(x, "filename", "") or f"image {place}")


def _expected(what: str, x: Any) -> str:
    shape = f" {x.shape}" if isinstance(x, np.ndarray) else ""
    return f"{what}: expected {KINDS}, got {type(x).__name__}{shape}"
