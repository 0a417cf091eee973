# SPDX-License-Identifier: Apache-2.0
"""Picture files to the network's input. The core decodes; a build without libjpeg or libpng leaves these to
Pillow, which gives the same pixels. What follows is the core's in either case: orientation, resize, crop,
normalisation."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess
from ..utils.files import printable

_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr", "CMYK")  # 8 bits a channel


def network_input(data: bytes, name: str, preprocess: Preprocess) -> NDArray[np.float32]:
    """(C, h, w) float32 of a JPEG, PNG, PPM or PGM file.

    Args:
        data: the file's bytes; `name` is for messages.
        preprocess: as of the metadata key vimcore.preprocess.

    Raises:
        vimcore._core.Error: the file is damaged or of a kind that is not supported.
    """
    if _core_decodes(data):
        return _core.preprocess_image(data, printable(name), preprocess)
    return _core.preprocess_pixels(decode_with_pillow(data, name), preprocess)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a picture file, the right way up; arguments and errors as for `network_input`."""
    if _core_decodes(data):
        return _core.decode_image(data, printable(name))
    return decode_with_pillow(data, name)


def _core_decodes(data: bytes) -> bool:
    built = _core.build_info()
    return not any(data.startswith(magic) and not built[kind] for kind, magic in _MAGIC.items())


def decode_with_pillow(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; errors as `_core.decode_image` words them."""
    name = printable(name)
    try:
        from PIL import Image
    except ImportError:
        raise _core.Error(
            f"[decode_image] {name}: vimcore was built without this format; install Pillow, or libjpeg and "
            "libpng with their headers and build again"
        ) from None
    try:
        if data.startswith(_MAGIC["png"]) and data[24:25] == b"\x10":
            return _core.upright(_sixteen_bit_png(data), data)
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in MODES:
                raise _core.Error(f"[decode_image] {name}: expected 8-bit grey or RGB, got mode {image.mode}")
            return _core.upright(np.asarray(image.convert("RGB")), data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _core.Error(f"[decode_image] {name}: {error}") from error


def _sixteen_bit_png(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3): value / 257, rounded. Pillow keeps only the high bytes of colours: two readings."""
    colour = data[25]  # 0: grey, 2: RGB, 4: grey and alpha, 6: RGB and alpha
    if colour == 0:
        values = _raw(data, "I;16B")[..., None]
    elif colour == 4:
        both = _raw(data, "RGBA")  # high and low byte of grey, of alpha
        values = both[..., :1] << 8 | both[..., 1:2]
    else:
        mode = "RGB" if colour == 2 else "RGBA"
        high, low = (_raw(data, f"{mode};16{order}") for order in "BL")
        values = (high << 8 | low)[..., :3]
    rounded = ((values * 255 + 32895) >> 16).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(rounded, (*rounded.shape[:2], 3)))


def _raw(data: bytes, raw_mode: str) -> NDArray[np.int64]:
    """The pixels of a PNG whose bytes Pillow takes for this raw mode."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image).astype(np.int64)
