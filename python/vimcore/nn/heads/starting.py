# SPDX-License-Identifier: Apache-2.0
"""A backbone's weights out of files of classifiers, and of networks with heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..._core import Config
from ...positions import class_rows
from ...weights.checkpoints import read_checkpoint
from ...weights.metadata import CONFIG_KEY, unpack
from ...weights.wrappers import ROPE_TABLES

# Of other networks than Vim, in files of mmsegmentation, detectron2 and timm.
_HEADS = ("head.", "neck.", "norm_neck.", "fpn1.", "fpn2.", "decode_head.", "auxiliary_head.")
_DETECTOR = ("backbone.simfp_", "proposal_generator.", "roi_heads.")
_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")
_TABLES = ("pos_embed", "pos_embed_cls")  # that of registers is one of their own


class Start(NamedTuple):
    """Tensors by Vim's names, the grid of their position table where the file tells it, and notes."""

    tensors: dict[str, Tensor]
    grid: tuple[int, int] | None
    notes: list[str]


def backbone_weights(path: str, config: Config, own: Mapping[str, Tensor], weights: str = "model") -> Start:
    """The weights for a backbone without a head.

    Heads and necks in the file are left aside. Where the backbone has no class token, those of the file are
    taken out of the position table as well: their rows are where the file says, or else where the authors
    have them: at the middle, with rotary positions at the head.

    Args:
        path: of vimcore (any task), or of other programs as `read_checkpoint` takes them.
        config: of the backbone.
        own: the backbone's tensors; it keeps its final norm where the file has none, as of detectors.
        weights: "model", or "ema" for the averaged weights of a training checkpoint.

    Raises:
        OSError, ValueError, vimcore.Error: it cannot be read; whether the tensors fit, `fill` says.
    """
    tensors, metadata, notes = read_checkpoint(path, weights)
    grid = token = None
    if CONFIG_KEY in metadata:
        stored = unpack(metadata, path).config
        grid, token = stored.grid, stored.class_token
        dense = [name for name in tensors if name.startswith("backbone.")]
        if dense:
            tensors = {name.removeprefix("backbone."): tensors[name] for name in dense}
    aside = [name for name in tensors if name.startswith(_HEADS + _DETECTOR)]
    if aside:
        notes.append(f"left aside: {', '.join(sorted({name.split('.')[0] for name in aside}))}")
    tensors = {name: value for name, value in tensors.items() if name not in aside}
    if config.class_token == "none" and any(name in tensors for name in _TOKENS):
        token = token or _published_token(tensors)
        tensors = _without_token(tensors, token, grid)
        notes.append(f"class token left out, with its row of the position table ({token})")
    for name, value in own.items():
        if name.startswith("norm_f.") and name not in tensors:
            tensors[name] = value
            notes.append(f"{name} is not in the file and stays as it is")
    return Start(tensors, grid, notes)


def _published_token(tensors: Mapping[str, Tensor]) -> str:
    if "cls_token_head" in tensors:
        return "double"
    if "pos_embed_cls" in tensors:
        return "registers"
    return "head" if any(name in tensors for name in ROPE_TABLES) else "middle"


def _without_token(
    tensors: Mapping[str, Tensor], token: str, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    table_name, own_table = _TABLES
    found = {name: value for name, value in tensors.items() if name not in (*_TOKENS, own_table)}
    table = found.get(table_name)
    if table is not None and table.ndim == 3:  # another one does not fit, as is said later
        patches = grid[0] * grid[1] if grid else table.shape[1] - len(class_rows(token, 0))
        rows = set(class_rows(token, max(patches, 0)))
        found[table_name] = table[:, [row for row in range(table.shape[1]) if row not in rows]]
    return found
