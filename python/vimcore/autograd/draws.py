# SPDX-License-Identifier: Apache-2.0
"""The random draws of a training forward, all from torch's generators and in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import exported, wide


class Draws(NamedTuple):
    """The random draws of one training forward."""

    drop_path: Tensor | None = None  # (depth, B): factor of each mixer output, 0 or 1 / keep
    mask: Tensor | None = None  # (B, L, D): dropout factors
    flip: bool = False
    class_position: int = -1  # -1: where it stands in eval

    def arguments(self) -> dict[str, Any]:
        return {**self._asdict(), "drop_path": exported(self.drop_path), "mask": exported(self.mask)}


def draw(config: Mapping[str, Any], facts: Mapping[str, Any], images: Tensor, position: bool) -> Draws:
    """The draws for a batch.

    Args:
        config, facts: of the network, as `_core.config_normalize` and `_core.config_facts` give them.
        images: (B, ...); only their number, type and device count.
        position: whether the place of a random class token is among the draws.
    """
    batch, depth, dtype = images.shape[0], config["depth"], wide(images.dtype)
    drop_path = mask = None
    if config["drop_path_rate"] > 0:
        steps = max(depth - 1, 1)
        rates = [config["drop_path_rate"] * (j / steps if depth > 1 else 1.0) for j in range(depth)]
        keep = 1 - torch.tensor(rates, dtype=dtype, device=images.device)[:, None]
        drop_path = (torch.rand(depth, batch, dtype=dtype, device=images.device) < keep) / keep
    if config["drop_rate"] > 0:
        ones = images.new_ones(batch, facts["tokens"], config["embed_dim"], dtype=dtype)
        mask = F.dropout(ones, config["drop_rate"])
    flip = config["directions"] == "sequence" and bool(torch.rand(()) < 0.5)
    random = position and config["class_token"] == "random"
    return Draws(drop_path, mask, flip, draw_position(facts) if random else -1)


def draw_position(facts: Mapping[str, Any]) -> int:
    """Where the class token stands in a training forward (class_token="random")."""
    return int(torch.randint(0, facts["patches"] + 1, ()))
