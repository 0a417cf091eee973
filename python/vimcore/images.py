# SPDX-License-Identifier: Apache-2.0
"""Picture files to the network's input. The core decodes; a build without libjpeg or libpng leaves these to
Pillow, which gives the same pixels. Resize, crop and normalisation are the core's in either case."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from . import _core

_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")  # 8 bits a channel, no CMYK: what the core takes


def network_input(data: bytes, name: str, preprocess_json: str) -> NDArray[np.float32]:
    """(C, h, w) float32 of a JPEG, PNG, PPM or PGM file.

    Args:
        data: the file's bytes; `name` is for messages.
        preprocess_json: as in the metadata key vimcore.preprocess.

    Raises:
        vimcore._core.Error: the file is damaged or of a kind that is not supported.
    """
    if _core_decodes(data):
        return _core.preprocess_image(data, name, preprocess_json)
    return _core.preprocess_pixels(decode_with_pillow(data, name), preprocess_json)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a JPEG, PNG, PPM or PGM file; arguments and errors as for `network_input`."""
    return _core.decode_image(data, name) if _core_decodes(data) else decode_with_pillow(data, name)


def _core_decodes(data: bytes) -> bool:
    built = _core.build_info()
    return not any(data.startswith(magic) and not built[kind] for kind, magic in _MAGIC.items())


def decode_with_pillow(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; errors as `_core.decode_image` words them."""
    try:
        from PIL import Image
    except ImportError:
        raise _core.Error(
            f"[decode_image] {name}: vimcore was built without this format; install Pillow, or libjpeg and "
            "libpng with their headers and build again"
        ) from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _MODES:
                raise _core.Error(f"[decode_image] {name}: expected 8-bit grey or RGB, got mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _core.Error(f"[decode_image] {name}: {error}") from error
