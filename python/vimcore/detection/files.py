# SPDX-License-Identifier: Apache-2.0
"""Detectors from files: vimcore's, and the weights of others in detectron2's layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import _core
from ..nn.heads.saving import TABLES, fill_from_file
from ..nn.saving import fitted
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import boolean, sides
from ..utils.files import listed
from ..weights.checkpoints import read_checkpoint
from ..weights.detector import detect_file
from ..weights.task import Path
from .networks import CascadeMaskRCNN

_PUBLISHED = {"backbone.simfp_": "pyramid.simfp_"}  # detectron2's prefix, and ours
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


def load_checkpoint(model: CascadeMaskRCNN, path: Path, *, weights: str = "model") -> list[str]:
    """Gives a detector the weights of a file of detectron2's layout: every key counts, all or nothing.

    The published training writes {model, optimizer, ...} with the prefix backbone.net before Vim's own names
    and backbone before the pyramid's; it has no norm_f, which nothing uses: it becomes 1. Vimcore files and
    state dicts of ours load as well. The position table is resized where the grids differ.

    Args:
        weights: "model", or "ema" for averaged weights.

    Returns:
        What a reader should know about what was taken off the names.

    Raises:
        ValueError, vimcore.Error: names missing, unexpected and misshapen keys, or says what the file is
            instead; the model is unchanged then.
    """
    name = os.fsdecode(path)
    state, _, notes = read_checkpoint(name, weights)
    given = fitted_state(model, {published_name(key): value for key, value in state.items()})
    own = {key: value for key, value in model.state_dict().items() if key not in TABLES}
    faults = _core.misfits(
        {key: tuple(value.shape) for key, value in own.items()},
        {key: tuple(value.shape) for key, value in given.items() if key not in TABLES},
    )
    faults += [f"not floating point: {key}" for key, value in given.items() if not value.is_floating_point()]
    if faults:
        raise ValueError(f"{name} does not fit this detector:\n  " + listed(faults, "\n  "))
    tables = {key: value for key, value in model.state_dict().items() if key in TABLES}
    model.load_state_dict({**given, **tables})
    return notes


def published_name(name: str) -> str:
    """Our name of a tensor: the readers have taken the prefix off Vim's own names, and off theirs alone."""
    for theirs, ours in _PUBLISHED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith(("backbone.", *_OWN)) else f"backbone.{name}"


def fitted_state(model: CascadeMaskRCNN, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with a position table of the model's grid, and a last norm that is 1 where it has none."""
    prefix, norm = "backbone.", "backbone.norm_f."
    vim = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    found = {key: value for key, value in state.items() if not key.startswith(prefix)}
    found.update({prefix + key: value for key, value in fitted(model.backbone, vim).items()})
    if not any(key.startswith(norm) for key in state):
        like = model.backbone.norm_f.state_dict(prefix=norm)
        found.update({k: torch.full_like(v, float(k.endswith("weight"))) for k, v in like.items()})
    return found
