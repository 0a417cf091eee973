# SPDX-License-Identifier: Apache-2.0
"""The backbone of a run: its size from the settings, its weights drawn or from a file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor

from ..config import image_size, model_options, patch_grid
from ..nn.models import create_model
from ..nn.saving import fill
from ..nn.vision_mamba import VisionMamba
from ..weights.checkpoints import read_checkpoint
from ..weights.convert import parse_setting
from ..weights.metadata import CONFIG_KEY, unpack
from .settings import Settings

_OPTIONS = ("patch_size", "stride", "embed_dim", "depth", "directions", "class_token", "pool")
_PATCHES = "patch_embed.proj.weight"


def further_options(texts: Sequence[str]) -> dict[str, Any]:
    """The arguments of `VisionMamba` that --set names.

    Raises:
        ValueError: there is no such argument, it has a flag of its own, or it is named twice.
    """
    known = set(inspect.signature(VisionMamba).parameters)
    flags = {*_OPTIONS, "img_size", "in_chans", "drop_rate", "drop_path_rate", "memory"}
    found: dict[str, Any] = {}
    for key, value in map(parse_setting, texts):
        if key in flags:
            raise ValueError(f"set: {key}: has a setting of its own, --{key.replace('_', '-')}")
        if key == "num_classes":
            raise ValueError("set: num_classes: follows from the data")
        if key not in known:
            further = sorted(known - flags - {"num_classes"})
            close = difflib.get_close_matches(key, further, n=3, cutoff=0.5) or further
            raise ValueError(f"set: {key}: VisionMamba has no such argument; it has {', '.join(close)}")
        if key in found:
            raise ValueError(f"set: {key}: given twice")
        if type(value) in (int, float) and not abs(value) < 1 << 63:
            raise ValueError(f"set: {key}: expected a finite number that 64 bits hold, got {value}")
        found[key] = value
    return found


def size_of(settings: Settings) -> tuple[int, int]:
    """(height, width) in pixels of the network's input."""
    return image_size(model_options(settings.model, _options(settings)))


def create(settings: Settings, channels: int, classes: int) -> VisionMamba:
    """The network with weights that are drawn.

    Raises:
        ValueError: an option is out of range.
    """
    further = further_options(settings.set)
    try:
        return create_model(
            settings.model,
            in_chans=channels,
            num_classes=classes,
            drop_rate=settings.drop_rate,
            drop_path_rate=settings.drop_path_rate,
            memory=settings.memory,
            **_options(settings),
            **further,
        )
    except TypeError as error:
        raise ValueError(f"set: {' '.join(settings.set)}: {str(error).splitlines()[0]}") from None


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {n: getattr(settings, n) for n in _OPTIONS if getattr(settings, n) is not None}
    if settings.img_size is not None:
        options["img_size"] = (settings.img_size[0], settings.img_size[-1])
    return options


def start_from(model: VisionMamba, settings: Settings, classes: Sequence[str]) -> list[str]:
    """Gives the model the weights of `init`, fitted where that is possible; the notes on it.

    A head for other classes than these is not taken.

    Raises:
        OSError, ValueError: they cannot be read, or do not fit.
    """
    path = str(settings.init)
    state, metadata, notes = read_checkpoint(path, settings.init_weights)
    labels = unpack(metadata, path).labels if CONFIG_KEY in metadata else None
    head = state.get("head.weight")
    other = head is None or head.shape[0] != len(classes) or (labels is not None and labels != list(classes))
    if other:
        notes.append(f"new head for {len(classes)} classes")
    notes += fit(model, state, metadata, settings, skip_head=other)
    return [f"weights from {path}", *notes]


def fit(
    model: VisionMamba,
    state: dict[str, Tensor],
    metadata: Mapping[str, str],
    settings: Settings,
    skip_head: bool,
) -> list[str]:
    """Gives the model these weights of `init`, made to suit its channels and grid; the notes on it.

    Args:
        metadata: of the file, which says what grid the weights are for.

    Raises:
        ValueError: they do not fit.
    """
    path, notes = str(settings.init), []
    grid = unpack(metadata, path).config.grid if CONFIG_KEY in metadata else None
    patches = state.get(_PATCHES)
    channels = model.config["in_chans"]
    if patches is not None and patches.ndim == 4 and patches.shape[1] != channels:
        try:
            state[_PATCHES] = adapt_input_conv(channels, patches)
        except NotImplementedError:
            raise ValueError(
                f"init: {path}: {_PATCHES} takes {patches.shape[1]} channels, the images have {channels}; "
                "only 3 channels can be adapted to others"
            ) from None
        notes.append(f"patch embedding adapted from {patches.shape[1]} to {channels} channels")
    table = state.get("pos_embed")
    if table is not None and hasattr(model, "pos_embed") and table.shape != model.pos_embed.shape:
        rows, columns = patch_grid(model.config)
        notes.append(f"position table resized to {rows} x {columns} patches ({settings.pos_embed})")
    fill(model, state, path, old_grid=grid, way=settings.pos_embed, skip_head=skip_head)
    return notes
