# SPDX-License-Identifier: Apache-2.0
"""The backbone of a run: its size from the settings, its weights drawn or from a file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import image_size, model_options, patch_grid
from ..nn.heads.starting import backbone_weights
from ..nn.models import create_model
from ..nn.saving import fill
from ..nn.vision_mamba import VisionMamba
from ..weights.checkpoints import read_checkpoint
from ..weights.convert import parse_setting
from ..weights.metadata import CONFIG_KEY, unpack
from .settings import Settings

_OPTIONS = ("patch_size", "stride", "embed_dim", "depth", "directions", "class_token", "pool", "frames")
_PATCHES = "patch_embed.proj.weight"
_TIMES = "temporal_pos_embedding"


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


def frames_of(settings: Settings) -> int | None:
    """Frames of the clips that the network takes; None: it takes images."""
    frames: int | None = model_options(settings.model, _options(settings)).get("frames")
    return frames


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
    given = {n: getattr(settings, n, None) for n in _OPTIONS}  # frames: of classification alone
    options: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
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
    grid = labels = None
    if CONFIG_KEY in metadata:
        stored, labels, _ = unpack(metadata, path)
        grid = stored.grid
    notes += _of_frames(model, state) + _adapt_channels(model, state, path)
    head = state.get("head.weight")
    other = head is None or head.shape[0] != len(classes) or (labels is not None and labels != list(classes))
    if other:
        notes.append(f"new head for {len(classes)} classes")
    notes += _resized(model, state, settings)
    fill(model, state, path, old_grid=grid, way=settings.pos_embed, skip_head=other)
    return [f"weights from {path}", *notes]


def start_without_head(model: VisionMamba, settings: Settings) -> list[str]:
    """As `start_from`, of a backbone that another head stands on, from the file of any task.

    See `vimcore.nn.heads.starting.backbone_weights` for what is left aside.
    """
    path = str(settings.init)
    state, grid, notes = backbone_weights(path, model._config, model.state_dict(), settings.init_weights)
    notes += _adapt_channels(model, state, path) + _resized(model, state, settings)
    fill(model, state, path, old_grid=grid, way=settings.pos_embed)
    return [f"weights from {path}", *notes]


def _of_frames(model: VisionMamba, state: dict[str, Tensor]) -> list[str]:
    """Fits weights of a network of images, or of clips of other lengths, to one of clips; the note on it."""
    patches, frames, table = state.get(_PATCHES), model.config["frames"], state.get(_TIMES)
    if frames and table is not None and table.ndim == 3 and table.shape[1] != frames:
        between = interpolate(table.float().transpose(1, 2), frames, mode="linear")  # as the authors do it
        state[_TIMES] = between.transpose(1, 2).contiguous()
        return [f"positions in time resized from {table.shape[1]} to {frames} frames (linear)"]
    if not frames or patches is None or patches.ndim != 4:
        return []
    state[_PATCHES] = patches.unsqueeze(2)
    state.update({n: p.detach().clone() for n, p in model.named_parameters() if n == _TIMES})
    return ["of images: every frame begins as one, without a position of its own"]


def _adapt_channels(model: VisionMamba, state: dict[str, Tensor], path: str) -> list[str]:
    """Fits the patch embedding to the channels of the images; the note on it."""
    patches, channels = state.get(_PATCHES), model.config["in_chans"]
    clips = patches is not None and patches.ndim == 5
    if patches is None or patches.ndim not in (4, 5) or patches.shape[1] == channels:
        return []
    try:
        flat = patches.flatten(2, 3) if clips else patches
        found = adapt_input_conv(channels, flat)
        state[_PATCHES] = found.unsqueeze(2) if clips else found
    except NotImplementedError:
        raise ValueError(
            f"init: {path}: {_PATCHES} takes {patches.shape[1]} channels, the images have {channels}; "
            "only 3 channels can be adapted to others"
        ) from None
    return [f"patch embedding adapted from {patches.shape[1]} to {channels} channels"]


def _resized(model: VisionMamba, state: Mapping[str, Tensor], settings: Settings) -> list[str]:
    """The note on a position table that has to be resized."""
    table = state.get("pos_embed")
    if table is None or not hasattr(model, "pos_embed") or table.shape == model.pos_embed.shape:
        return []
    rows, columns = patch_grid(model.config)
    return [f"position table resized to {rows} x {columns} patches ({settings.pos_embed})"]
