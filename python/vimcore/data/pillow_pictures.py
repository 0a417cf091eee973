# SPDX-License-Identifier: Apache-2.0
"""Pictures that Pillow decodes: formats that the core does not have, or was built without. Needs no torch.

The pixels are those of `Image.convert("RGB")`, as torchvision's loaders take them: colours behind an alpha
channel as they are stored, inks and palettes converted, the first frame of several. Two things differ: 16
bits become 8 by value (/ 257, rounded), where Pillow clips grey and cuts colours off, and pictures are turned
as their EXIF orientation says.
"""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..utils.extras import needs
from ..utils.files import printable

# Pillow's names of the formats by ours. It knows others, among them some that start other programs.
FORMATS = {
    "JPEG": ("JPEG", "MPO"),
    "PNG": ("PNG",),
    "PNM": ("PPM",),
    "WebP": ("WEBP",),
    "TIFF": ("TIFF",),
    "BMP": ("BMP",),
    "GIF": ("GIF",),
    "AVIF": ("AVIF",),
}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "CMYK")  # 8 bits a channel
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_BITS_PER_SAMPLE = 258  # tag of TIFF
_LARGEST_SIDE = 65535


class UnsupportedError(ValueError):
    """A sound picture of values or of a size that is not read."""


def decode_with_pillow(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8, upright; errors as `_core.decode_image` words them.

    Raises:
        vimcore.Error: Pillow is missing, or the file is damaged, too large or of another kind.
    """
    name, kind = printable(name), _core.picture_kind(data)
    try:
        from PIL import Image
    except ImportError:
        raise _core.Error(f"[decode_image] {name}: {kind} needs Pillow; {needs('demo')}") from None
    try:
        if kind == "PNG" and data[24:25] == b"\x10":
            return _core.upright(_sixteen_bit_png(data), data)
        with Image.open(io.BytesIO(data), formats=FORMATS.get(kind, ())) as image:
            if max(image.size) > _LARGEST_SIDE:
                raise UnsupportedError(f"a side of {max(image.size)} pixels is longer than {_LARGEST_SIDE}")
            if kind in ("JPEG", "PNG"):
                return _core.upright(pixels_of(image), data)
            if image.mode == "I" and kind == "PNM":  # stretched to 16 bits by Pillow
                return _grey(_eight_bits(np.asarray(image), 65535))
            return _tiff(image, data) if kind == "TIFF" else pixels_of(_turned(image))
    except MemoryError:
        raise
    except UnsupportedError as error:
        raise _core.Error(f"[decode_image] {name}: {kind}: {error}") from None
    except Image.UnidentifiedImageError:
        raise _core.Error(
            f"[decode_image] {name}: a damaged {kind}, or one that Pillow does not read"
        ) from None
    except Image.DecompressionBombError as error:
        raise _core.Error(
            f"[decode_image] {name}: {error}; PIL.Image.MAX_IMAGE_PIXELS sets the limit. As PNG or JPEG it "
            "is read up to 2^30 pixels"
        ) from None
    except Exception as error:  # of any kind: damage ends deep within Pillow
        text = str(error) or type(error).__name__
        raise _core.Error(f"[decode_image] {name}: corrupt or truncated {kind}: {text}") from error


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """(H, W, 3) of a PIL image, as it lies.

    Raises:
        UnsupportedError: its values are neither of 8 nor of 16 bits.
    """
    if image.mode in DEEP:
        return _grey(_eight_bits(np.asarray(image), 65535))
    if image.mode not in MODES:
        raise UnsupportedError(f"expected 8 or 16 bits, grey or colour, got mode {image.mode}")
    return np.asarray(image.convert("RGB"))


def upright_pixels(image: Any) -> NDArray[np.uint8]:
    """(H, W, 3) of a PIL image, turned as its EXIF orientation says; errors as for `pixels_of`."""
    return pixels_of(_turned(image))


def _turned(image: Any) -> Any:
    """As its EXIF says; as it is where that is damaged. Damaged pixels are an error all the same."""
    from PIL import ImageOps

    image.load()
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return ImageOps.exif_transpose(image)
    return image


def _eight_bits(values: NDArray[Any], largest: int) -> NDArray[np.uint8]:
    """Levels 0 ... largest by value, halves up."""
    found: NDArray[np.uint8] = ((values.astype(np.int64) * 510 + largest) // (2 * largest)).astype(np.uint8)
    return found


def _grey(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(levels[..., None], 3, 2)


# ---- 16 bits of several channels, of which Pillow keeps the high bytes: two readings -----------------------


def _sixteen_bit_png(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3), as it lies."""
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
    levels = _eight_bits(values, 65535)
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _raw(data: bytes, raw_mode: str) -> NDArray[np.int64]:
    """The pixels of a PNG whose bytes Pillow takes for this raw mode."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [_asking(tile, raw_mode) for tile in image.tile]
        return np.asarray(image).astype(np.int64)


def _tiff(image: Any, data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) upright: Pillow itself turns TIFFs while it loads them."""
    from PIL import Image

    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
    bits = max(bits) if isinstance(bits, tuple) else int(bits)
    if image.mode in DEEP:
        return _grey(_eight_bits(np.asarray(image), 2**bits - 1))
    if bits <= 8 or image.mode not in MODES:
        return pixels_of(image)
    modes = {_raw_mode(tile) for tile in image.tile}
    order = "L" if all(mode.endswith(";16B") for mode in modes) else "B"
    if not all(mode.endswith((";16L", ";16B", ";16N")) for mode in modes):
        raise UnsupportedError(
            f"channels of {bits} bits in this layout are not supported; convert it to 8 bits"
        )
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as again:
        again.tile = [_asking(tile, _raw_mode(tile)[:-1] + order) for tile in again.tile]
        low = np.asarray(again).astype(np.int64)
    levels = _eight_bits(np.asarray(image).astype(np.int64) << 8 | low, 65535)
    return pixels_of(Image.fromarray(levels, image.mode))


def _raw_mode(tile: Any) -> str:
    """How the decoder of a part of a picture reads its bytes."""
    return str(tile[3] if isinstance(tile[3], str) else tile[3][0])


def _asking(tile: Any, raw_mode: str) -> Any:
    """The same part, its bytes read in another way."""
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)  # Pillow 10
