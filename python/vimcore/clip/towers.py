# SPDX-License-Identifier: Apache-2.0
"""Vim as open_clip's image tower: registered by name, built around any network, and taken out again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from .. import timm as _registers_towers  # noqa: F401
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import integer
from ..weights.clip import VOCABULARY, check_tower, checked_loss, checked_text
from ..weights.wrappers import ROPE_TABLES

open_clip.add_model_config(Path(__file__).parent / "configs")
# Where temperature and bias begin: as in the papers on CLIP and SigLIP.
_BEGIN: dict[str, dict[str, float]] = {
    "clip": {"init_logit_scale": math.log(1 / 0.07)},
    "siglip": {"init_logit_scale": math.log(10), "init_logit_bias": -10.0},
}
LARGEST_SCALE = math.log(100)  # of the temperature's logarithm, from 0 on


class ImageTower(TimmModel):
    """open_clip's adapter of timm's networks, around one that is there already: any size, any class token.

    Its own constructor can only ask timm for a name. Parameters have the same names.

    Args:
        trunk: without a head; reads one token or a mean.
        embed_dim: dimensions of the common space.
    """

    def __init__(self, trunk: VisionMamba, embed_dim: int) -> None:
        nn.Module.__init__(self)
        self.trunk = trunk
        self.image_size = trunk._config.img_size
        projection = nn.Linear(trunk.embed_dim, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.0), proj=projection))
        self.preprocess: Mapping[str, Any] | None = None  # of pictures, as files have it

    def no_weight_decay(self) -> set[str]:
        """Tokens and the position table."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}


def create(
    backbone: VisionMamba,
    embed_dim: int = 512,
    *,
    width: int = 512,
    layers: int = 12,
    heads: int = 8,
    context: int = 77,
    loss: str = "clip",
) -> CLIP:
    """open_clip's model of an image tower and a text tower with a common space.

    `model(images, tokens)` gives unit vectors (B, embed_dim) of both, the temperature, and for "siglip" the
    bias; `encode_image`, `encode_text` one of them. Texts go through `Tokenizer(context)`.

    Args:
        backbone: without a head.
        embed_dim: dimensions of the common space.
        width, layers, heads, context: of the text tower, a causal transformer; context in tokens.
        loss: "clip" or "siglip": where temperature and bias begin.

    Raises:
        ValueError, TypeError: a size is out of range, or the backbone has a head.
    """
    text = checked_text({"width": width, "layers": layers, "heads": heads, "context": context})
    checked_loss(loss)
    embed_dim = integer("[clip] embed_dim", embed_dim, 1)
    if not isinstance(backbone, VisionMamba):
        raise TypeError(f"[clip] backbone: expected a VisionMamba, got {type(backbone).__name__}")
    check_tower(backbone._config)
    model = CLIP(
        embed_dim,
        {"layers": 1, "width": 64, "image_size": 16, "patch_size": 16},  # makes room: replaced below
        {
            "context_length": text["context"],
            "vocab_size": VOCABULARY,
            **{name: text[name] for name in ("width", "layers", "heads")},
        },
        **_BEGIN[loss],
    )
    model.visual = ImageTower(backbone, embed_dim)
    return model


@torch.no_grad()
def constrain(model: nn.Module) -> None:
    """Keeps the temperature within CLIP's bounds; to be called after each update."""
    scale: Any = model.logit_scale
    scale.clamp_(0, LARGEST_SCALE)


def image_tower(model: nn.Module) -> VisionMamba:
    """The image tower as one network whose head is the projection; its weights are copies.

    Args:
        model: of `create` or `load`, or made by open_clip with a tower of ours.

    Raises:
        TypeError: the image tower is not one of ours.
        ValueError: no `VisionMamba` computes what it does.
    """
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if not isinstance(trunk, VisionMamba):
        kind = type(trunk if trunk is not None else model).__name__
        raise TypeError(f"[clip] model: expected open_clip's, with an image tower of vimcore, got a {kind}")
    if getattr(trunk, "_pool", None) is not None or getattr(trunk, "_without_norm", False):
        raise ValueError(
            "[clip] the projection reads the mean of the patches of a network with class tokens, which no "
            "VisionMamba does; take timm_pool 'token', or a network with class_token='none'"
        )
    weights: dict[str, Tensor] = {
        name: value for name, value in trunk.state_dict().items() if name not in ROPE_TABLES
    }
    weight, bias = _projection(model.visual, trunk)
    options = {**trunk.config, "num_classes": len(weight)}
    with torch.no_grad():
        network = VisionMamba(**options).to(weight)
        weights["head.weight"] = weight
        weights["head.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
        own = {name: value for name, value in network.state_dict().items() if name in ROPE_TABLES}
        network.load_state_dict({**own, **weights})
    return network.eval()


def _projection(tower: Any, trunk: VisionMamba) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of what stands on the trunk: a linear layer behind it, or its own head."""
    behind = [layer for layer in tower.head if not isinstance(layer, nn.Dropout | nn.Identity)]
    if not behind and isinstance(trunk.head, nn.Linear):
        return trunk.head.weight, trunk.head.bias
    if len(behind) != 1 or not isinstance(behind[0], nn.Linear) or not isinstance(trunk.head, nn.Identity):
        made = " and ".join(type(layer).__name__ for layer in behind) or "nothing"
        raise ValueError(f"[clip] projection: expected one linear layer (timm_proj 'linear'), got {made}")
    return behind[0].weight, behind[0].bias
