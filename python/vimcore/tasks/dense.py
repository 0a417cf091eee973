# SPDX-License-Identifier: Apache-2.0
"""Weights for networks that have a backbone and a head: from files of classifiers, and from their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import _core
from ..nn.vision_mamba import VisionMamba
from ..positions import class_rows
from ..utils.files import listed
from ..weights.checkpoints import read_checkpoint
from ..weights.metadata import CONFIG_KEY, unpack
from ..weights.task import unpack_task
from . import backbone
from .settings import Settings

_PREFIX = "backbone."
# Vim's own tensors; necks stand beside them under the same prefix.
_VIM = re.compile(r"(layers|patch_embed|pos_embed|cls_token\w*|norm_f|head|rope)(\.|$)")
_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")


def start_from(model: Any, settings: Settings, classes: Sequence[str]) -> list[str]:
    """Gives a model the weights of `init`; the notes on it.

    Its backbone gets those of a classifier or of a backbone; its neck and heads those of a file of the same
    task with the same head and classes.

    Args:
        model: has `backbone`, and `head` and `options` as its files have them.

    Raises:
        OSError, ValueError: they cannot be read, or do not fit.
    """
    path = str(settings.init)
    state, metadata, notes = read_checkpoint(path, settings.init_weights)
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = name.removeprefix(_PREFIX)
        (own if _VIM.match(plain) else rest)[plain if _VIM.match(plain) else name] = value
    task = unpack_task(metadata, path)
    if task is not None and list(task.classes) == list(classes) and _is_like(model, task):
        _fill_heads(model, rest, path)
        notes.append("head included")
    else:
        what = f"{len(rest)} tensors of another head left out, " if rest else ""
        notes.append(f"{what}new head for {len(classes)} classes")
    own = {name: value for name, value in own.items() if not name.startswith("head.")}
    network: VisionMamba = model.backbone
    if own.keys() & set(_TOKENS) and network.config["class_token"] == "none":
        own = _without_tokens(own, metadata, path)
        notes.append("class token left out")
    for name, value in network.norm_f.named_parameters(prefix="norm_f"):
        if name not in own and not value.requires_grad:  # detectron2's files lack it; nothing depends on it
            own[name] = value.detach().clone()
    notes += backbone.fit(network, own, metadata, settings, skip_head=True)
    return [f"weights from {path}", *notes]


def _is_like(model: Any, task: Any) -> bool:
    return bool(task.head == model.head and dict(task.options) == dict(model.options))


def _fill_heads(model: nn.Module, rest: dict[str, Tensor], path: str) -> None:
    """All that is not the backbone's own, after every key and shape has been found right."""
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if not (name.startswith(_PREFIX) and _VIM.match(name.removeprefix(_PREFIX)))
    }
    shapes = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (wanted, rest))
    if faults := _core.misfits(*shapes):
        raise ValueError(f"init: {path} does not fit this model:\n  " + listed(faults, "\n  "))
    model.load_state_dict(rest, strict=False)


def _without_tokens(own: dict[str, Tensor], metadata: Any, path: str) -> dict[str, Tensor]:
    """A network's tensors without class tokens and their rows of the position table."""
    if CONFIG_KEY not in metadata:
        raise ValueError(
            f"init: {path}: has a class token, of which it does not say where it stands, and this network "
            "has none; name it with --class-token, or make a vimcore file of it first (vimcore convert)"
        )
    stored = unpack(metadata, path).config
    kept = {name: value for name, value in own.items() if name not in _TOKENS}
    table, rows = kept.get("pos_embed"), class_rows(stored.class_token, stored.grid[0] * stored.grid[1])
    if table is not None and table.ndim == 3:
        places = [row for row in range(table.shape[1]) if row not in rows]
        kept["pos_embed"] = table[:, places]
    return kept
