# SPDX-License-Identifier: Apache-2.0
"""Configurations: the published sizes by name, and sizes that follow from a configuration. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

WIDTHS = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}  # embed_dim of the published sizes
_STRIDES = {"patch16": 16, "patch16_stride8": 8}
_MODELS: dict[str, dict[str, Any]] = {
    f"{size}_{patches}_224": {
        "img_size": 224,
        "patch_size": 16,
        "stride": stride,
        "embed_dim": width,
        "depth": 24,
    }
    for patches, stride in _STRIDES.items()
    for size, width in WIDTHS.items()
}
_MAMBAR = {
    "tiny": (192, 24, 12, 1),
    "small": (384, 24, 12, 2),
    "base": (768, 24, 12, 4),
    "large": (1024, 48, 16, 8),
}
_VIDEOMAMBA = {"tiny": (192, 24), "small": (384, 24), "middle": (576, 32)}
_MODELS |= {  # Mamba-R, arXiv 2405.14858
    f"mambar_{size}_patch16_224": {
        "img_size": 224,
        "patch_size": 16,
        "stride": 16,
        "embed_dim": width,
        "depth": depth,
        "class_token": "registers",
        "registers": registers,
        "neck_reduction": reduction,
    }
    for size, (width, depth, registers, reduction) in _MAMBAR.items()
}
_MODELS |= {  # VideoMamba, arXiv 2403.06977
    f"videomamba_{size}_patch16_224": {
        "img_size": 224,
        "patch_size": 16,
        "stride": 16,
        "embed_dim": width,
        "depth": depth,
        "average_directions": False,
        "class_token": "head",
        "frames": 16,
        "num_classes": 400,
    }
    for size, (width, depth) in _VIDEOMAMBA.items()
}


def list_models() -> list[str]:
    """Names for `create_model`."""
    return list(_MODELS)


def model_options(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `VisionMamba` that make the model `name`, some of them changed.

    Patches of another size follow each other without gaps and overlap, as those of the name do.

    Raises:
        ValueError: the name is unknown, or its patches overlap and only their size is changed.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5) or list(_MODELS)
        raise ValueError(f"[create_model] name: unknown model {name!r}; close to it: {', '.join(close)}")
    options, changes = dict(_MODELS[name]), dict(changes or {})
    if changes.get("patch_size", options["patch_size"]) != options["patch_size"] and "stride" not in changes:
        if options["stride"] != options["patch_size"]:
            raise ValueError(
                f"[create_model] patch_size: patches of {name} overlap (patch_size {options['patch_size']}, "
                f"stride {options['stride']}); give stride too"
            )
        options["stride"] = None  # as patch_size
    return {**options, **changes}


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of a configuration, whose ``img_size`` is one number or two."""
    size = config["img_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def patch_grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of patches of a configuration."""
    height, width = image_size(config)
    patch, stride = int(config["patch_size"]), int(config.get("stride") or config["patch_size"])
    return (height - patch) // stride + 1, (width - patch) // stride + 1
