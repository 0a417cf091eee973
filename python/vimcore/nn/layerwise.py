# SPDX-License-Identifier: Apache-2.0
"""A network run by calling its modules, for what hangs on them: hooks, adapters, modules of other kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd.draws import Drawn
from ..positions import embedded, resize_pos_embed
from .following import Plan, at_size, draws_of, images_of
from .parameters import Layer, normalised
from .readout import activations_like, readout

_HALF = (torch.bfloat16, torch.float16)


def layerwise(
    model: Any, plan: Plan, kind: str, images: Tensor, layers: tuple[int, ...], position: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs of one call, as `follow` gives them; what is drawn in training is the same.

    A layer is called with the output of the layer before, to which its drop path was applied, and the
    residual stream; it gives its output and the stream with that added. The second layer of a pair
    (directions="block") sees the tokens reversed, as in the authors' code.
    """
    named = dict(model.named_parameters())
    images = images_of(model, plan, images, list(named), list(named.values()))
    draws = draws_of(model, plan, images, kind == "logits", position)
    with activations_like(images):
        return _run(model, plan, kind, images, layers, draws)


def _run(
    model: Any, plan: Plan, kind: str, images: Tensor, layers: tuple[int, ...], draws: Drawn
) -> tuple[Tensor, ...]:
    here = at_size(model, plan, images)
    h, r = _embed(model, plan, here, images, draws).to(images.dtype), None
    turn = _rotation(model, here, images) if plan.rope else None
    outputs = []
    step = 2 if plan.directions == "block" else 1
    for i in range(0, plan.depth, step):
        if turn is not None:
            h, r = turn(h), turn(r) if r is not None and plan.rope_residual else r
        pair = [_layer(model, i, h, r, draws, draws.flip)]
        if step == 2:
            pair.append(_layer(model, i + 1, h, r, draws, True))
            h, r = pair[0][0] + pair[1][0], pair[0][1] + pair[1][1]
        else:
            h, r = pair[0]
        if i + step - 1 in layers:
            outputs.append((r + _dropped(h, draws, i + step - 1)).to(images.dtype))
    if kind == "layers":
        return tuple(outputs)
    tokens = normalised(model.norm_f, _dropped(h, draws, plan.depth - 1), r)
    if kind == "tokens":
        return (tokens,)
    if draws.position is not None:
        return (model.head(tokens.index_select(1, draws.position.view(1).to(tokens.device)).squeeze(1)),)
    return (readout(tokens, here, model._weight, model.head, model._neck),)


def _embed(model: Any, plan: Plan, here: Any, images: Tensor, draws: Drawn) -> Tensor:
    """The tokens (B, L, D) that enter the first layer."""
    patches = model.patch_embed(images)
    if draws.position is None:
        h = embedded(patches, model._weight, plan, here)
    else:  # the class token stands where it was drawn
        count, at = patches.shape[1], draws.position.to(patches.device)
        place = torch.arange(count + 1, device=patches.device)
        order = torch.where(place < at, place, torch.where(place == at, count, place - 1))
        token = model._weight("cls_token").expand(patches.shape[0], -1, -1)
        h = torch.cat([patches, token], 1).index_select(1, order)
        if plan.pos_embed:
            h = h + resize_pos_embed(model._weight("pos_embed"), plan.grid, here.grid, plan.class_token)
    return h if draws.dropout is None else h * draws.dropout


def _rotation(model: Any, here: Any, images: Tensor) -> Any:
    tables = model._rotations(*here.img_size)
    cos, sin = [table.to(images.device, _wide(images)) for table in tables]
    return lambda x: model.rope(x, cos, sin)


def _wide(images: Tensor) -> torch.dtype:
    return torch.float32 if images.dtype in _HALF else images.dtype


def _layer(
    model: Any, index: int, h: Tensor, r: Tensor | None, draws: Drawn, reverse: Tensor | bool | None
) -> tuple[Tensor, Tensor]:
    """(output, residual stream) of one layer; a flip of the tokens, if one is wanted or drawn, is undone."""
    layer = model.layers[index]
    if index > 0:
        h = _dropped(h, draws, index - 1)
    h = _reversed(h, reverse)
    r = None if r is None else _reversed(r, reverse)
    ours = type(layer) is Layer and "forward" not in vars(layer)
    own = {"memory": model.memory} if ours else {}
    out, total = layer(h, r, **own)
    return _reversed(out, reverse), _reversed(total, reverse)


def _reversed(x: Tensor, reverse: Tensor | bool | None) -> Tensor:
    if isinstance(reverse, Tensor):
        return torch.where(reverse.to(x.device), x.flip(1), x)
    return x.flip(1) if reverse else x


def _dropped(h: Tensor, draws: Drawn, layer: int) -> Tensor:
    """The output of a layer with its drop path."""
    if draws.drop_path is None:
        return h
    return (h * draws.drop_path[layer][:, None, None]).to(h.dtype)
