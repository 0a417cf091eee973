# SPDX-License-Identifier: Apache-2.0
"""Picture files to the network's input. The core decodes JPEG, PNG, PPM and PGM; other formats, and what
a build lacks, is left to Pillow, which gives the same pixels. What follows is the core's in either case:
resize, crop, normalisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess
from ..utils.files import printable
from .pillow_pictures import FORMATS, decode_with_pillow


def network_input(data: bytes, name: str, preprocess: Preprocess) -> NDArray[np.float32]:
    """(C, h, w) float32 of a picture file.

    Args:
        data: the file's bytes; `name` is for messages.
        preprocess: as of the metadata key vimcore.preprocess.

    Raises:
        vimcore._core.Error: the file is damaged or of a kind that is not supported, or Pillow is missing.
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
    """Whether the core decodes it, or says why nobody does."""
    kind = _core.picture_kind(data)
    if kind in ("JPEG", "PNG"):
        return bool(_core.build_info()[kind.lower()])
    return kind == "PPM/PGM" or kind not in FORMATS
