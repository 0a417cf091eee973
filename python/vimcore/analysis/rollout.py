# SPDX-License-Identifier: Apache-2.0
"""Attention rollout over the attention that the scans imply, and its form for a class ("Mamba-Attr").

A_l is the map of layer l over tokens, both directions together, the mean over channels of what
`attention_maps` gives with part "block". The result is the row that the head reads of a product over layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import boolean, integer
from .attention import pulled
from .layers import Layers, State, exact
from .matrices import channel_matrix
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
    arXiv 2403.01590): A_l is the channel mean of the positive part, scaled to 0 .. 1, times per token the largest
    positive derivative of the logit by the layer's output, scaled to 0 .. 1. With `signed`, the product of
    A_l + 1 with signs and without normalisation, one vector-Jacobian product a layer: the way for long
    sequences. The first two build each layer's matrix: O(L^2 E N) a layer, up to 1024 tokens.

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
    start = integer(f"[{_OP}] start", start)
    signed = boolean(f"[{_OP}] signed", signed)
    depth, step = net.config.depth, len(net.groups[0]) if net.groups else 1
    if not 0 <= start < depth or start % step:
        kind = "an even layer" if step == 2 else "a layer"
        raise ValueError(f"[{_OP}] start: expected {kind} of 0 .. {depth - 1}, got {start}")
    if signed and target is not None:
        raise ValueError(f"[{_OP}] signed: only without a target, whose positive part is taken")
    if not signed and net.config.tokens > MOST:
        remedy = "a smaller image" if target is not None else "signed=True, or a smaller image"
        raise ValueError(
            f"[{_OP}] images: expected at most {MOST} tokens, whose matrices are computed, got "
            f"{net.config.tokens}; remedy: {remedy}"
        )
    inputs: list[State] = []
    state: State = net.embed(net.patches()), None
    for layers in net.groups:
        inputs.append(state)
        state = net.group(layers, *state)
    strengths = None if target is None else _strengths(net, inputs, state, target)
    row = net.class_row().repeat(len(net.images), 1)
    for g in reversed(range(start // step, len(net.groups))):
        before, row = row, torch.zeros_like(row)
        for i in net.groups[g]:
            mixer = net.frozen(i, *net.rotated(*inputs[g]))
            if signed:
                row += before + sum(weights.mean(-1) for _, weights in pulled(mixer, before))
                continue
            for image in range(len(row)):
                if strengths is None:
                    matrix = channel_matrix(mixer, image, torch.abs)
                else:
                    matrix = channel_matrix(mixer, image, torch.relu)
                    matrix = _scaled(matrix) * _scaled(strengths[g][image])
                matrix.diagonal().add_(1)
                # of a pair half each, so that rows still add up to 1
                row[image] += before[image] @ (matrix / matrix.sum(1, keepdim=True)) / step
    return net.on_grid(row)


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
