# SPDX-License-Identifier: Apache-2.0
"""Both towers to and from one file, under open_clip's names; the image tower alone as any network's file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from torch import nn

from .. import _core
from .._core import Config, Preprocess
from ..nn.state import plain_array, stored_type, tensors_to_save, unwritable
from ..nn.vision_mamba import VisionMamba
from ..utils.files import listed
from ..weights.checkpoints import tensor
from ..weights.clip import TRUNK, checked_text, clip_file, clip_shapes
from ..weights.metadata import EMBEDDING_KEY, pack
from ..weights.task import ClipTask, Path, pack_task
from ..weights.wrappers import ROPE_TABLES
from .towers import ImageTower, create, image_tower

_TABLES = tuple(TRUNK + name for name in ROPE_TABLES)  # which follow from the configuration


def save(
    model: nn.Module,
    path: Path,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes both towers, their sizes and preprocessing to one safetensors file, all or nothing.

    open_clip reads the tensors under the same names.

    Args:
        model: of `create` or `load`, or open_clip's with an image tower of ours and a text tower like CLIP's.
        preprocess: as `vimcore.io.save_model` takes it; default: the model's.
        dtype: of the weights in the file, see `VisionMamba.save`; of the text tower's those that open_clip
            has in 16 bits, too.

    Raises:
        TypeError, ValueError: the file could not describe the model.
    """
    tower = image_tower(model)  # refuses what no file describes
    task = _described(model, tower.num_classes)
    config = tower._config.replace(num_classes=0)
    if preprocess is None:
        preprocess = _preprocess(model, config)
    state = {name: value for name, value in model.state_dict().items() if name not in _TABLES}
    wanted = clip_shapes(config, task)
    faults = _core.misfits(wanted, {name: tuple(value.shape) for name, value in state.items()})
    faults += [f"{name}: {why}" for name, value in state.items() if (why := unwritable(value))]
    if faults:
        raise ValueError("[clip] save: the file cannot describe this model:\n  " + listed(faults, "\n  "))
    metadata = {**pack(config, None, preprocess), **pack_task(task)}
    _core.write_safetensors(
        path, {name: plain_array(state[name]) for name in wanted}, metadata, stored_type(dtype)
    )


def load(path: Path, device: str | torch.device = "cpu") -> CLIP:
    """The model of a file that `save` wrote, in eval mode.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no file of two towers, or its tensors are not those of its sizes.
    """
    config, task, preprocess = clip_file(path)
    backbone = VisionMamba(**config.to_dict())
    text: Any = task.options
    model = create(backbone, task.embed_dim, loss=task.head, **text)
    own = {name: table for name, table in model.state_dict().items() if name in _TABLES}
    state = {name: tensor(array) for name, array in _core.read_safetensors(path)[0].items()}
    model.load_state_dict({**own, **state})
    model.visual.preprocess = preprocess.to_dict() if preprocess else None
    return model.eval().to(device)


def export_image_tower(
    model: nn.Module,
    path: Path,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes the image tower with its projection as head: a file for `Runtime`, `vim-infer`, C and C++.

    What they call logits are coordinates of the common space, before these are scaled to unit length.

    Args:
        preprocess: as `vimcore.io.save_model` takes it; default: the model's.
        dtype: of the weights in the file, see `VisionMamba.save`.

    Raises:
        TypeError, ValueError: as `save`.
    """
    network = image_tower(model)
    config = network._config
    if preprocess is None:
        preprocess = _preprocess(model, config)
    metadata = {**pack(config, None, preprocess), EMBEDDING_KEY: "true"}
    arrays = tensors_to_save(network, config.param_shapes())
    _core.write_safetensors(path, arrays, metadata, stored_type(dtype))


def _described(model: nn.Module, embed_dim: int) -> ClipTask:
    """What a file says of a model; ValueError where it does something else."""
    name = type(model).__name__
    if not isinstance(model, CLIP):
        raise ValueError(
            f"[clip] save: expected open_clip's CLIP, got {name}, whose text tower has other names"
        )
    blocks: Any = model.transformer.resblocks
    first = blocks[0]
    for what, got, wanted in (
        ("the activation of the text tower", type(first.mlp.gelu).__name__, "GELU"),
        ("how the text tower is read", model.text_pool_type, "argmax"),
        ("the mask of the text tower", "none" if model.attn_mask is None else "causal", "causal"),
        ("the width of its blocks", first.mlp.c_fc.out_features, 4 * first.mlp.c_fc.in_features),
    ):
        if got != wanted:
            raise ValueError(f"[clip] save: {what}: expected {wanted}, got {got}, which no file describes")
    heads = int(first.attn.num_heads)
    sizes = {"width": first.mlp.c_fc.in_features, "layers": len(blocks), "heads": heads}
    text = checked_text({**sizes, "context": model.context_length})
    return ClipTask("clip" if model.logit_bias is None else "siglip", text, embed_dim)


def _preprocess(model: nn.Module, config: Config) -> Mapping[str, Any] | None:
    """The model's: as its file or run had it, else as open_clip's transforms do it."""
    tower: Any = model.visual
    if isinstance(tower, ImageTower):
        default = Preprocess.default(config)
        return tower.preprocess or (default.to_dict() if default else None)
    assert isinstance(tower, TimmModel)
    found: dict[str, Any] = getattr(tower, "preprocess_cfg", {})
    size = config.img_size
    mode, way = found.get("resize_mode", "shortest"), found.get("interpolation", "bicubic")
    if mode != "shortest" or way != "bicubic" or size[0] != size[1] or "mean" not in found:
        raise ValueError(
            f"[clip] preprocess: open_clip's ({found or 'none'}, {size[0]} x {size[1]} pixels) is not that "
            "of files (short side resized, bicubic, centre cropped); give preprocess="
        )
    return {
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        "interpolation": way,
        "resize": size[0],
        "crop": list(size),
    }


def encoder_preprocess(model: nn.Module, path: str | os.PathLike[str]) -> Preprocess:
    """Of the pictures that a loaded model takes; ValueError: its input is no picture."""
    steps = model.visual.preprocess  # type: ignore[union-attr]
    if steps is None:
        raise ValueError(f"{os.fsdecode(path)}: takes no pictures, so none can be searched")
    return Preprocess(**steps)  # type: ignore[arg-type]
