# SPDX-License-Identifier: Apache-2.0
"""Networks of the published sizes by name."""

from __future__ import annotations

from typing import Any

from ..config import model_options
from .vision_mamba import VisionMamba


def create_model(name: str, **options: Any) -> VisionMamba:
    """A `VisionMamba` of a published size, with random weights.

    Args:
        name: one of `list_models()`.
        options: arguments of `VisionMamba` that replace those of the name. With another patch_size the stride
            follows it, unless it is given.

    Raises:
        ValueError: the name is unknown, an option is out of range, or patch_size is given without stride to a
            name whose patches overlap.
        TypeError: `VisionMamba` has no such option.
    """
    return VisionMamba(**model_options(name, options))
