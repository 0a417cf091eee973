# SPDX-License-Identifier: Apache-2.0
"""Networks for segmentation from files: vimcore's own and those of mmsegmentation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..nn.heads.saving import fill_from_file
from ..nn.saving import prepared
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import boolean, sides
from ..utils.files import listed
from ..weights.checkpoints import read_with_meta
from ..weights.dense import NAMES
from ..weights.dense_files import segment_file
from ..weights.metadata import CONFIG_KEY, unpack
from ..weights.task import Path, SegmentTask, named_classes, unpack_task
from .networks import FCN, Segmentation, Segmenter, UperNet

_KINDS: dict[str, type[Segmentation]] = {kind.__name__: kind for kind in (FCN, Segmenter, UperNet)}
_PREFIX = "backbone."


def load(
    path: Path,
    device: str | torch.device = "cpu",
    *,
    img_size: int | Sequence[int] | None = None,
    dynamic_img_size: bool = False,
) -> Segmentation:
    """The network of a file that `save` wrote, in eval mode; its `task` and `preprocess` are the file's.

    Args:
        img_size: another size in pixels than stored, side or (height, width); the position table is resized.
        dynamic_img_size: images of any size, see `VisionMamba`.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no file of a segmentation network, or its tensors are not those of its architecture.
    """
    dynamic = boolean("[segmentation] dynamic_img_size", dynamic_img_size)
    config, task, preprocess = segment_file(path)
    model = create(task.head, VisionMamba(**config.to_dict()), len(task.classes), task.options)
    fill_from_file(model, path)
    model.task, model.preprocess = task, preprocess
    if img_size is not None:
        model.backbone.set_input_size(sides("[segmentation] img_size", img_size))
    model.backbone.dynamic_img_size = dynamic
    return model.eval().to(device)


def load_checkpoint(
    model: Segmentation,
    path: Path,
    *,
    weights: str = "model",
    pos_embed: str = "correct",
    pos_grid: tuple[int, int] | None = None,
) -> list[str]:
    """Loads weights that other programs wrote under the published names: every key counts, all or nothing.

    Those of mmsegmentation (`{meta, state_dict, optimizer}`), what DistributedDataParallel or torch.compile
    made of such names, and vimcore's own. Classes and colours that the file names go to `model.task`. An
    auxiliary head may be missing in the model, which needs none for inference.

    Args:
        weights: "model", or "ema" for the averaged weights of a training checkpoint.
        pos_embed: "correct" or "authors", see `vimcore.io.resize_pos_embed`.
        pos_grid: (rows, columns) of the file's position table where it is not square.

    Returns:
        What a reader should know: what was unwrapped, left aside or resized.

    Raises:
        ValueError: names missing, unexpected and misshapen keys (12 at most), or says what the file is
            instead of weights; the model is unchanged then.
    """
    if pos_embed not in ("correct", "authors"):
        raise ValueError(f"pos_embed: expected 'correct' or 'authors', got {pos_embed!r}")
    name = os.fsdecode(path)
    (state, metadata, notes), meta = read_with_meta(name, weights, keep="backbone.")
    task = unpack_task(metadata, name)
    if pos_grid is None and CONFIG_KEY in metadata:
        pos_grid = unpack(metadata, name).config.grid
    if not any(key.startswith("auxiliary_head.") for key in model.state_dict()):
        state, aside = _parted(state, lambda key: key.startswith("auxiliary_head."))
        notes += ["auxiliary_head left aside"] if aside else []
    own = {_PREFIX + key: value for key, value in model.backbone.state_dict().items()}
    heads, _ = _parted(model.state_dict(keep_vars=True), lambda key: key in own)
    given, inner = _parted(state, lambda key: key.startswith(_PREFIX) and key not in heads)
    for key, value in own.items():
        if key.startswith("backbone.norm_f.") and key not in inner and not model.normed:
            inner[key] = value
    inner = {key.removeprefix(_PREFIX): value for key, value in inner.items()}
    faults, write = prepared(model.backbone, inner, old_grid=pos_grid, way=pos_embed)
    if faults := _head_faults(heads, given) + [_of_backbone(fault) for fault in faults]:
        raise ValueError(f"{name} does not fit this model:\n  " + listed(faults, "\n  "))
    write()
    with torch.no_grad():
        for key, value in heads.items():
            value.copy_(given[key])
    if isinstance(task, SegmentTask):
        model.task = task
    elif named := named_classes(meta, model.num_classes):
        model.task = model.described(*named)
        notes.append("classes and colours from the file's meta")
    elif meta.keys() & {"CLASSES", "dataset_meta"}:
        notes.append(f"the file's meta has no {model.num_classes} names of classes, so none were taken")
    return notes


def _parted(
    state: Mapping[str, Tensor], apart: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that stay, and those apart."""
    stay = {key: value for key, value in state.items() if not apart(key)}
    return stay, {key: value for key, value in state.items() if key not in stay}


def _head_faults(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """How tensors besides the backbone's differ from the wanted ones."""
    faults = _core.misfits(
        {key: tuple(value.shape) for key, value in wanted.items()},
        {key: tuple(value.shape) for key, value in given.items()},
    )
    for key, value in given.items():
        if key in wanted and value.is_floating_point() != wanted[key].is_floating_point():
            faults.append(f"{key}: expected {wanted[key].dtype}, got {value.dtype}")
    return faults


def _of_backbone(fault: str) -> str:
    """A fault of the backbone, with the name that the tensor has in the file."""
    return re.sub(
        r"^((?:missing|misshapen|unexpected|different|not floating point): )?", r"\1backbone.", fault
    )


def create(head: str, backbone: VisionMamba, num_classes: int, options: Mapping[str, Any]) -> Segmentation:
    """The network with this head, as files call it: "fcn", "linear", "uper" or "segmenter"."""
    kind: Any = _KINDS[NAMES[head]]
    of_head = {"convs": 0} if head == "linear" else {}
    network: Segmentation = kind(backbone, num_classes, **{**of_head, **options})
    return network
