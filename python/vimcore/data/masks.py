# SPDX-License-Identifier: Apache-2.0
"""Masks of class indices: read from PNG and .npy files, written as palette PNGs."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..weights.task import MOST_CLASSES
from .picture_files import read_file, reason
from .transforms import UnreadableError

IGNORE = 255  # the truth of a pixel that does not count
MASKS = (".png", ".npy")  # suffixes
Mask = NDArray[np.uint8]
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # colour types of PNG


class ClassIndexError(ValueError):
    """A mask holds an index that no class has."""


def read_mask(path: str, reduce_zero_label: bool = False) -> Mask:
    """(H, W) class indices of an index PNG (grey or palette, up to 8 bits) or of integers in a .npy file.

    Args:
        reduce_zero_label: 0 means "no class" and becomes 255, k becomes k - 1, 255 stays.

    Raises:
        UnreadableError: it is missing, damaged, or no mask.
    """
    try:
        data = read_file(path)
        mask = _array(data) if path.lower().endswith(".npy") else _index_png(data)
    except UnreadableError as error:
        raise UnreadableError(f"mask {path}: {error}") from None
    except (EOFError, OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"mask {path}: {reason(error)}") from error
    if reduce_zero_label:
        mask = np.where(mask == IGNORE, IGNORE, mask - np.uint8(1)).astype(np.uint8)
    return mask


def _index_png(data: bytes) -> Mask:
    if not data.startswith(_PNG):
        raise UnreadableError("expected a PNG file of class indices, which other formats do not keep exactly")
    if len(data) < 26:
        raise UnreadableError("the file ends within its header")
    bits, colour = data[24], data[25]
    if colour not in (_GREY, _PALETTE) or bits > 8:
        kind = {0: "grey", 2: "RGB", 4: "grey with alpha", 6: "RGBA"}.get(colour, f"colour type {colour}")
        raise UnreadableError(
            f"expected class indices as grey or palette of up to 8 bits, got {kind} of {bits} bits; save the "
            "index of each pixel, not its colour"
        )
    with Image.open(io.BytesIO(data)) as image:
        mask = np.asarray(image).astype(np.uint8)
    if colour == _GREY and bits in (2, 4):  # Pillow stretches these to 255
        mask //= np.uint8(255 // (2**bits - 1))
    return mask


def _array(data: bytes) -> Mask:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iub":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UnreadableError(f"expected integers (H, W), got {found}")
    if array.size and not 0 <= array.min() <= array.max() <= IGNORE:
        low, high = int(array.min()), int(array.max())
        raise UnreadableError(f"expected class indices from 0 to 255, got {low} to {high}")
    return array.astype(np.uint8)


def check_indices(mask: Mask, classes: int, path: str) -> None:
    """Every pixel has a class, or is to be ignored.

    Raises:
        ClassIndexError: names file and value.
    """
    strange = np.unique(mask[(mask >= classes) & (mask != IGNORE)])
    if len(strange):
        raise ClassIndexError(
            f"{path}: holds class index {', '.join(map(str, strange[:8]))}, expected 0 to {classes - 1}, or "
            f"{IGNORE} for pixels to be ignored: there are {classes} classes"
        )


def read_names(path: str) -> list[str]:
    """Names of the classes, one a line, the first for index 0.

    Raises:
        OSError, ValueError: it cannot be read, is empty, or names more than indices can tell apart.
    """
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8, a class name a line") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        raise ValueError(f"{path}: expected a class name in every line, got {len(names)} with an empty one")
    if len(names) > MOST_CLASSES:
        raise ValueError(f"{path}: expected at most {MOST_CLASSES} classes, got {len(names)}")
    return names


def mask_png(mask: Mask, palette: Sequence[Sequence[int]]) -> bytes:
    """An 8-bit palette PNG of class indices (H, W)."""
    image = Image.fromarray(mask)
    colours = [value for colour in palette for value in colour]
    image.putpalette(colours + [0] * (768 - len(colours)))  # with fewer, Pillow takes fewer bits
    memory = io.BytesIO()
    image.save(memory, "PNG", optimize=True)
    return memory.getvalue()


def overlay_jpeg(image: NDArray[np.uint8], mask: Mask, palette: Sequence[Sequence[int]]) -> bytes:
    """A JPEG of half the image (H, W, 3) and half the colours of its classes."""
    memory = io.BytesIO()
    Image.fromarray(blended(image, mask, palette)).save(memory, "JPEG", quality=90)
    return memory.getvalue()


def blended(image: NDArray[np.uint8], mask: Mask, palette: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Half the image (H, W, 3), half the colours of its classes; the sums are halved and rounded down."""
    colours = np.zeros((256, 3), np.uint16)
    colours[: len(palette)] = palette
    mixed: NDArray[np.uint8] = ((image.astype(np.uint16) + colours[mask]) >> 1).astype(np.uint8)
    return mixed


def names_beside(folder: str, reduce_zero_label: bool = False) -> list[str] | None:
    """The classes of `classes.txt` in a folder, or of ADE20K's `objectInfo150.txt`; None: neither is there.

    Args:
        reduce_zero_label: of the masks; index 0 of ADE20K is "other" without it.

    Raises:
        OSError, ValueError: the file cannot be read, or is another.
    """
    path = os.path.join(folder, "classes.txt")
    if os.path.isfile(path):
        return read_names(path)
    path = os.path.join(folder, "objectInfo150.txt")
    if not os.path.isfile(path):
        return None
    rows = [line.split("\t") for line in read_names(path)]
    if len(rows[0]) < 2 or rows[0][-1].strip() != "Name" or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{path}: expected ADE20K's table of objects, columns apart by tabs, the last: Name")
    names = [row[-1].split(",")[0].strip() for row in rows[1:]]
    return names if reduce_zero_label else ["other", *names]
