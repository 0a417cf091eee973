# SPDX-License-Identifier: Apache-2.0
"""Files of an image tower with a text tower: their tensors, by open_clip's names. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._core import Config, Preprocess
from ..utils.arguments import integer
from ..utils.files import listed
from .dense import Shapes
from .dense_files import check_channels, opened, tensor_faults
from .task import HEADS, MOST_WIDTH, ClipTask, Path

VOCABULARY = 49408  # of the tokenizer, which is CLIP's
TRUNK = "visual.trunk."
_MOST = {"width": MOST_WIDTH, "layers": 256, "heads": MOST_WIDTH, "context": 1 << 13}
_LEAST = {"context": 3}  # beginning, a token, end


def checked_text(options: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a text tower.

    Raises:
        ValueError, TypeError: one is missing, unknown, or out of range.
    """
    found = {}
    if unknown := set(options) - set(_MOST):
        raise ValueError(f"[clip] {min(unknown)!r:.60}: no size of the text tower: {', '.join(_MOST)}")
    for name, most in _MOST.items():
        if name not in options:
            raise ValueError(f"[clip] {name}: missing")
        found[name] = integer(f"[clip] {name}", options[name], _LEAST.get(name, 1))
        if found[name] > most:
            raise ValueError(f"[clip] {name}: expected at most {most}, got {found[name]}")
    if found["width"] % found["heads"]:
        raise ValueError(f"[clip] heads: {found['heads']} do not divide the width {found['width']}")
    return found


def check_tower(config: Config) -> None:
    """ValueError unless a projection can stand on this backbone: one token is read, and it has no head."""
    if config.num_classes:
        raise ValueError(
            f"[clip] backbone: has a head for {config.num_classes} classes, which would not be used; "
            "backbone.reset_classifier(0) takes it off"
        )
    if config.head_per_token:
        raise ValueError(f"[clip] backbone: pool={config.pool!r} gives the projection every token, not one")


def clip_shapes(config: Config, task: ClipTask) -> Shapes:
    """Tensors of both towers by name.

    Args:
        config: of the backbone, without a head.
    """
    text, space = task.options, task.embed_dim
    width = text["width"]
    found = {TRUNK + name: shape for name, shape in config.param_shapes().items()}
    found["visual.head.proj.weight"] = (space, config.embed_dim)
    found["token_embedding.weight"] = (VOCABULARY, width)
    found["positional_embedding"] = (text["context"], width)
    for layer in range(text["layers"]):
        block = f"transformer.resblocks.{layer}."
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            found[block + name] = (width,)
        found[block + "attn.in_proj_weight"] = (3 * width, width)
        found[block + "attn.in_proj_bias"] = (3 * width,)
        for name, out, into in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            found[f"{block}{name}.weight"], found[f"{block}{name}.bias"] = (out, into), (out,)
    found["ln_final.weight"] = found["ln_final.bias"] = (width,)
    found["text_projection"] = (width, space)
    found["logit_scale"] = ()
    if task.head == "siglip":
        found["logit_bias"] = ()
    return found


class ClipFile(NamedTuple):
    """A file whose tensors are those of what it says."""

    config: Config
    task: ClipTask
    preprocess: Preprocess | None


def clip_file(path: Path) -> ClipFile:
    """What the file of two towers holds.

    Raises:
        vimcore.Error: it is missing or damaged.
        ValueError: it is no such file, or does not fit together.
    """
    tensors, (config, labels, preprocess), task = opened(path, ClipTask)
    try:
        if labels is not None:
            raise ValueError("has vimcore.labels, which are a classifier's")
        check_tower(config)
        check_channels(config, preprocess)
        task = ClipTask(task.head, checked_text(task.options), task.embed_dim)
        if faults := tensor_faults(clip_shapes(config, task), tensors):
            raise ValueError("the tensors do not fit the metadata:\n  " + listed(faults, "\n  "))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from None
    return ClipFile(config, task, preprocess)


def clip_parameters(config: Config, task: ClipTask) -> tuple[int, int]:
    """Of the image tower with its projection, and of all else."""
    sizes = {name: math.prod(shape) for name, shape in clip_shapes(config, task).items()}
    image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    return image, sum(sizes.values()) - image


def checked_loss(name: str) -> str:
    """ "clip" or "siglip"; ValueError names another."""
    if name not in HEADS["clip"]:
        raise ValueError(f"[clip] loss: expected one of {', '.join(HEADS['clip'])}, got {name!r:.60}")
    return name
