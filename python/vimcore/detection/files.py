# SPDX-License-Identifier: Apache-2.0
"""Detectors from files: vimcore's, and the weights of others in detectron2's layout."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .. import _core
from ..nn.heads.saving import fill_from_file
from ..nn.saving import prepared
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import boolean, sides
from ..utils.files import listed
from ..weights.checkpoints import read_checkpoint
from ..weights.detector import detect_file
from ..weights.metadata import CONFIG_KEY, unpack
from ..weights.task import Path
from .networks import CascadeMaskRCNN

_PUBLISHED = {"backbone.simfp_": "pyramid.simfp_"}  # detectron2's prefix, and ours
_PREFIX = "backbone."
_OWN = ("pyramid.", "proposal_generator.", "roi_heads.")


def load(
    path: Path,
    device: str | torch.device = "cpu",
    *,
    img_size: int | Sequence[int] | None = None,
    dynamic_img_size: bool = False,
) -> CascadeMaskRCNN:
    """The detector of a file that `save` wrote, in eval mode; its `task` and `preprocess` are the file's.

    Args:
        img_size: another size in pixels than stored, side or (height, width); the position table is resized.
        dynamic_img_size: images of any size, see `VisionMamba`.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no file of a detector, or its tensors are not those of its architecture.
    """
    dynamic = boolean("[detection] dynamic_img_size", dynamic_img_size)
    config, task, preprocess = detect_file(path)
    model = CascadeMaskRCNN(VisionMamba(**config.to_dict()), len(task.classes), **task.options)
    fill_from_file(model, path)
    model.task, model.preprocess = task, preprocess
    if img_size is not None:
        model.backbone.set_input_size(sides("[detection] img_size", img_size))
    model.backbone.dynamic_img_size = dynamic
    return model.eval().to(device)


def load_checkpoint(
    model: CascadeMaskRCNN,
    path: Path,
    *,
    weights: str = "model",
    pos_embed: str = "correct",
    pos_grid: tuple[int, int] | None = None,
) -> list[str]:
    """Gives a detector the weights of a file of detectron2's layout: every key counts, all or nothing.

    The published training writes {model, optimizer, ...} with backbone.net before Vim's own names, backbone
    before the pyramid's; it has no norm_f, which nothing uses: it becomes 1. Vimcore files and state dicts of
    ours load as well, also from DistributedDataParallel or torch.compile.

    Args:
        weights: "model", or "ema" for averaged weights.
        pos_embed: "correct" or "authors", see `vimcore.io.resize_pos_embed`.
        pos_grid: (rows, columns) of the file's position table where it is not square.

    Returns:
        What a reader should know about what was taken off the names.

    Raises:
        ValueError, vimcore.Error: names missing, unexpected and misshapen keys (12 at most), or says what the
            file is instead; the model is unchanged then.
    """
    if pos_embed not in ("correct", "authors"):
        raise ValueError(f"pos_embed: expected 'correct' or 'authors', got {pos_embed!r}")
    name = os.fsdecode(path)
    state, metadata, notes = read_checkpoint(name, weights, keep=_PREFIX)
    if pos_grid is None and CONFIG_KEY in metadata:
        pos_grid = unpack(metadata, name).config.grid
    named = {published_name(key): value for key, value in state.items()}
    inner = {k.removeprefix(_PREFIX): value for k, value in named.items() if k.startswith(_PREFIX)}
    for key, value in model.backbone.norm_f.named_parameters(prefix="norm_f"):
        if key not in inner:
            inner[key] = torch.full_like(value, float(key.endswith("weight")))
    given = {key: value for key, value in named.items() if not key.startswith(_PREFIX)}
    heads = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith(_PREFIX)}
    faults, write = prepared(model.backbone, inner, old_grid=pos_grid, way=pos_embed)
    faults = [f"of the backbone: {fault}" for fault in faults]
    faults += _core.misfits(
        {key: tuple(value.shape) for key, value in heads.items()},
        {key: tuple(value.shape) for key, value in given.items()},
    )
    faults += [f"not floating point: {key}" for key, value in given.items() if not value.is_floating_point()]
    if faults:
        raise ValueError(f"{name} does not fit this detector:\n  " + listed(faults, "\n  "))
    write()
    with torch.no_grad():
        for key, value in heads.items():
            value.copy_(given[key])
    return notes


def published_name(name: str) -> str:
    """Our name of a tensor: the readers have taken the prefix off Vim's own names, and off theirs alone."""
    for theirs, ours in _PUBLISHED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith((_PREFIX, *_OWN)) else _PREFIX + name
