# SPDX-License-Identifier: Apache-2.0
"""The random draws of a training forward, all from torch's generators and in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import Config, Draws
from .tensors import exported, wide

NONE = Draws()  # of a forward in eval mode


class Chances(NamedTuple):
    """What an architecture draws, in plain numbers."""

    depth: int
    drop_path_rate: float
    drop_rate: float
    undropped: tuple[int, ...]  # positions of class tokens that keep all their features
    flips: bool
    places: bool  # whether the class token stands anywhere


class Drawn(NamedTuple):
    """The draws of one forward; None for what is not drawn."""

    drop_path: Tensor | None = None  # (depth, B) factors
    dropout: Tensor | None = None  # (B, L, D) factors
    flip: Tensor | None = None  # a boolean: all tokens reversed
    position: Tensor | None = None  # of the class token

    def choices(self) -> Tensor | None:
        """Flip and position as the operator takes them, (2) i64; None where neither was drawn."""
        if self.flip is None and self.position is None:
            return None
        some = self.flip if self.position is None else self.position
        assert some is not None
        flip = torch.zeros_like(some) if self.flip is None else self.flip
        position = torch.full_like(some, -1, dtype=torch.int64) if self.position is None else self.position
        return torch.stack([flip.long(), position])


def chances_of(config: Config) -> Chances:
    """What this architecture draws in training."""
    # as published, of registers and patches only patches are dropped
    undropped = tuple(config.class_positions) if config.class_token == "registers" else ()
    return Chances(
        config.depth,
        config.drop_path_rate,
        config.drop_rate,
        undropped,
        config.directions == "sequence",
        config.class_token == "random",
    )


def drawn(chances: Chances, images: Tensor, shape: tuple[int, int], patches: int, places: bool) -> Drawn:
    """The draws for a batch.

    Args:
        images: (B, ...); only their number, type and device count.
        shape: (L, D) of their tokens, of which `patches` are patches.
        places: whether a random class token is placed here, if there is one.
    """
    batch, depth, dtype, device = images.shape[0], chances.depth, wide(images.dtype), images.device
    drop_path = dropout = flip = position = None
    if chances.drop_path_rate > 0:
        steps = max(depth - 1, 1)
        rates = [chances.drop_path_rate * (j / steps if depth > 1 else 1.0) for j in range(depth)]
        keep = 1 - torch.tensor(rates, dtype=dtype, device=device)[:, None]
        drop_path = (torch.rand(depth, batch, dtype=dtype, device=device) < keep) / keep
    if chances.drop_rate > 0:
        ones = torch.ones(batch, *shape, dtype=dtype, device=device)
        dropout = F.dropout(ones, chances.drop_rate)
        if chances.undropped:
            dropout[:, list(chances.undropped)] = 1
    if chances.flips:
        flip = torch.rand(()) < 0.5
    if chances.places and places:
        position = torch.randint(0, patches + 1, ())
    return Drawn(drop_path, dropout, flip, position)


def draw(config: Config, images: Tensor, position: int | None = None) -> Draws:
    """As `drawn`, for the core.

    Args:
        position: of a random class token where it was drawn before; None: drawn here.
    """
    shape = (config.tokens, config.embed_dim)
    d = drawn(chances_of(config), images, shape, config.patches, position is None)
    if position is None:
        position = -1 if d.position is None else int(d.position)
    flip = d.flip is not None and bool(d.flip)
    return Draws(exported(d.drop_path), exported(d.dropout), flip, position)
