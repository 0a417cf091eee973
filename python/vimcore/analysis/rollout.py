# SPDX-License-Identifier: Apache-2.0
"""Attention rollout over the attention that the scans imply, and its form for a class ("Mamba-Attr").

A_l is the map of layer l over tokens, both directions together, the mean over channels of what
`attention_maps` gives with part "block". The result is the row that the head reads of a product over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import Config
from ..utils.arguments import boolean, integer
from .attention import pulled
from .layers import Layers, State, exact
from .matrices import channel_matrices
from .targets import Target, target_index

MOST = 1024  # tokens whose matrices are computed
_OP = "attention_rollout"


@exact
def attention_rollout(
    model: Any, images: Tensor, start: int = 0, target: Target = None, *, signed: bool = False
) -> Tensor:
    """How much each patch enters what the head reads, over several layers.

    Three ways. Without a target, rollout (Abnar and Zuidema, arXiv 2005.00928): the product of all
    |A_l| + 1 (channel means of absolute values), rows normalised. With a target, as Mamba-Attr (Ali et al.,
    arXiv 2403.01590): A_l is the channel mean of the positive part, scaled to 0 .. 1, times per token the
    largest positive derivative of the logit by the layer's output, scaled to 0 .. 1. With `signed`, the
    product of A_l + 1 with signs and without normalisation, one vector-Jacobian product a layer: the way for
    long sequences. The first two build each layer's matrix: O(L^2 E N) a layer, up to 1024 tokens.

    Args:
        model: a `VisionMamba`, computed as in eval mode, not changed.
        images: (B, C, H, W), normalised as for the model.
        start: first layer of the product; with directions "block" the first of a pair. Mamba-Attr's authors
            take the last 9 of 24.
        target: class index for all images, or one per image; None: no class.
        signed: see above; not with a target.

    Returns:
        (B, h, w), class tokens left out. Without a target and signs, the values and those of class tokens
        add up to 1.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; images, start or target do not fit; a sequence is
            too long for matrices; a target without logits of whole images.
    """
    net = Layers(_OP, model, images)
    start = first_layer(net.config, start)
    signed = boolean(f"[{_OP}] signed", signed)
    if signed and target is not None:
        raise ValueError(f"[{_OP}] signed: only without a target, whose positive part is taken")
    if signed:
        return net.on_grid(_signed(net, start))
    return net.on_grid(_products(net, start, [target])[0])


@exact
def rollouts(model: Any, images: Tensor, start: int, targets: Sequence[Target]) -> list[Tensor]:
    """`attention_rollout` without signs for several targets, None among them; the matrices are made once."""
    net = Layers(_OP, model, images)
    return [net.on_grid(row) for row in _products(net, first_layer(net.config, start), targets)]


def first_layer(config: Config, start: int) -> int:
    """`start` as a layer.

    Raises:
        TypeError, ValueError: it is none, or the second of a pair.
    """
    start = integer(f"[{_OP}] start", start)
    step = 2 if config.directions == "block" else 1
    if not 0 <= start < config.depth or start % step:
        kind = "an even layer" if step == 2 else "a layer"
        raise ValueError(f"[{_OP}] start: expected {kind} of 0 .. {config.depth - 1}, got {start}")
    return start


def _pass(net: Layers) -> tuple[list[State], State]:
    """What enters every group of layers, and what leaves the last."""
    inputs: list[State] = []
    state: State = net.embed(net.patches()), None
    for layers in net.groups:
        inputs.append(state)
        state = net.group(layers, *state)
    return inputs, state


def _signed(net: Layers, start: int) -> Tensor:
    """(B, L): what the head reads, through A_l + 1 of the layers from the last to `start`."""
    inputs, _ = _pass(net)
    row = net.class_row().repeat(len(net.images), 1)
    for layers, entered in zip(reversed(net.groups), reversed(inputs)):
        if layers[0] < start:
            break
        before, row = row, torch.zeros_like(row)
        for i in layers:
            row += before  # the residual stream of a pair is the sum of both
            for _, weights in pulled(net.frozen(i, *net.rotated(*entered)), before):
                row += weights.mean(-1)
    return row


def _products(net: Layers, start: int, targets: Sequence[Target]) -> list[Tensor]:
    """(B, L) for each target."""
    if net.config.tokens > MOST:
        remedy = "a smaller image" if targets != [None] else "signed=True, or a smaller image"
        raise ValueError(
            f"[{_OP}] images: expected at most {MOST} tokens, whose matrices are computed, got "
            f"{net.config.tokens}; remedy: {remedy}"
        )
    inputs, state = _pass(net)
    strengths = [None if target is None else _strengths(net, inputs, state, target) for target in targets]
    products = [net.class_row().repeat(len(net.images), 1) for _ in targets]
    kinds = list({torch.abs if s is None else torch.relu: None for s in strengths})
    for g in reversed(range(start // len(net.groups[0]), len(net.groups))):
        before = products
        products = [torch.zeros_like(row) for row in before]
        for i in net.groups[g]:
            mixer = net.frozen(i, *net.rotated(*inputs[g]))
            for image in range(len(net.images)):
                found = dict(zip(kinds, channel_matrices(mixer, image, kinds)))
                for k, strength in enumerate(strengths):
                    if strength is None:
                        matrix = found[torch.abs].clone()
                    else:
                        matrix = _scaled(found[torch.relu]) * _scaled(strength[g][image])
                    matrix.diagonal().add_(1)
                    matrix /= matrix.sum(1, keepdim=True)
                    # of a pair half each, so that rows still add up to 1
                    products[k][image] += before[k][image] @ matrix / len(net.groups[g])
    return products


def _scaled(x: Tensor) -> Tensor:
    """From 0 to 1."""
    low, high = x.aminmax()
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def _strengths(net: Layers, inputs: list[State], state: State, target: Target) -> list[Tensor]:
    """By group of layers, (B, L): the largest positive derivative of the logit by the channels of a token."""
    h, r = (t.detach().requires_grad_() for t in state if t is not None)
    with torch.enable_grad():
        logits = net.logits(net.last_norm(r + h))
        index = target_index(_OP, target, logits)
        dh, dr = torch.autograd.grad(logits.gather(1, index[:, None]).sum(), (h, r))
    found = [dh]
    for layers, entered in zip(net.groups[:0:-1], inputs[:0:-1]):
        dh, dr = net.group_backward(layers, entered, dh, dr)
        found.append(dh)
    return [gradient.clamp_min(0).amax(-1) for gradient in reversed(found)]
