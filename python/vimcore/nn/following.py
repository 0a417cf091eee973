# SPDX-License-Identifier: Apache-2.0
"""Calls of a network that torch records or transforms: one operator, and around it only what torch knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core import Config
from ..autograd.checks import differentiates_each, is_followed, refuse_wrapped
from ..autograd.draws import Chances, Drawn, chances_of, drawn
from ..autograd.network import takes_part
from ..autograd.network_operator import network, outputs_text
from ..autograd.tensors import autocast_type
from .inputs import checked_images


class Plan(NamedTuple):
    """What a call has to know of a network, in plain values: for a compiler they are constants.

    Those of the configuration have the names that they have there.
    """

    text: str  # the configuration as operators take it
    names: tuple[str, ...]
    part: tuple[bool, ...]  # of the parameters, which of them outputs depend on
    head_is_fused: bool
    calls_modules: bool
    chances: Chances
    img_size: tuple[int, int]
    patch_size: int
    stride: int
    frames: int | None
    embed_dim: int
    depth: int
    directions: str
    class_token: str
    class_tokens: int
    class_positions: list[int]
    registers: int | None
    neck_reduction: int
    pool: str
    norm: str
    norm_eps: float
    pos_embed: bool
    rope: bool
    rope_residual: bool
    rope_grid: int
    grid: tuple[int, int]
    tokens: int
    patches: int
    head_per_token: bool

    def param_shapes(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return self.names

    def patches_at(self, height: int, width: int) -> int:
        """Number of patches of images of this size."""
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in (height, width))
        return rows * columns * (self.frames or 1)


_OF_CONFIG = Plan._fields[Plan._fields.index("img_size") :]


def plan_of(
    config: Config, head_is_fused: bool, calls_modules: bool, kind: str, layers: tuple[int, ...]
) -> Plan:
    """The plan of a call for outputs of this kind.

    Args:
        config: of the network, with as many classes as its head has, if that is fused.
    """
    names = tuple(config.param_shapes())
    part = tuple(kind == "logits" or takes_part(name, kind, layers) for name in names)
    values = [getattr(config, field) for field in _OF_CONFIG]
    return Plan(config.to_json(), names, part, head_is_fused, calls_modules, chances_of(config), *values)


def parameter(model: nn.Module, name: str) -> Any:
    """A parameter by its state-dict key, also a parametrised one."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def follow(
    model: Any, plan: Plan, kind: str, images: Tensor, layers: tuple[int, ...], position: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs of one call; as those of `ComputingNetwork._call`.

    Args:
        position: of a random class token in training, where it was drawn before.
    """
    if torch.compiler.is_dynamo_compiling():
        params = [parameter(model, name) for name in plan.names]
    else:
        params = model._tensors(*model._bound_places())
    images = images_of(model, plan, images, plan.names, params)
    draws = draws_of(model, plan, images, kind == "logits", position)
    save = torch.is_grad_enabled() and (
        images.requires_grad or any(p.requires_grad for p, t in zip(params, plan.part) if t)
    )
    apart = save and not torch.compiler.is_dynamo_compiling() and differentiates_each()
    out, _ = network(
        images, params, plan.text, outputs_text(kind, layers), model.memory, draws.drop_path, draws.dropout,
        draws.choices(), save, apart,
    )  # fmt: skip
    return tuple(out.unbind(0)) if kind == "layers" else (out,)


def at_size(model: Any, plan: Plan, images: Tensor) -> Plan:
    """The plan for images of this size."""
    height, width = images.shape[-2:]
    if (height, width) == plan.img_size:
        return plan
    found: Plan = model._plan_at(height, width)
    return found


def images_of(
    model: Any, plan: Plan, images: Tensor, names: Sequence[str], params: Sequence[Tensor]
) -> Tensor:
    """The images as operators take them beside parameters of these names.

    Raises:
        ValueError, TypeError: they, or a parameter, do not fit.
    """
    if not torch.compiler.is_dynamo_compiling():
        refuse_wrapped("VisionMamba", names, params)
        return checked_images(images, params[0], model._config, model.dynamic_img_size, is_followed())
    autocast = autocast_type(params[0])
    if autocast is not None:
        images = images.to(autocast)
    if not model.dynamic_img_size and tuple(images.shape[-2:]) != plan.img_size:
        raise ValueError(
            f"[VisionMamba] images: expected {plan.img_size[0]} x {plan.img_size[1]}, got "
            f"{images.shape[-2]} x {images.shape[-1]}: other sizes by dynamic_img_size=True"
        )
    return images


def draws_of(model: Any, plan: Plan, images: Tensor, places: bool, position: Tensor | None) -> Drawn:
    """The random draws of a forward in training."""
    if not model.training:
        return Drawn()
    patches = plan.patches_at(*images.shape[-2:])
    found = drawn(plan.chances, images, (patches + plan.class_tokens, plan.embed_dim), patches, places)
    return found if position is None else found._replace(position=position)
