# SPDX-License-Identifier: Apache-2.0
"""Relevance by MambaLRP (Jafari et al., arXiv 2406.07592): layer-wise propagation through the scans.

Gradient times input of the same network with other derivatives, under which relevance is neither made nor
lost: silu(x) counts as x times a constant; time steps, B and C of the scan are constants, and so is the
deviation of a norm; of a product of two signals each factor gets half of the gradient. What patches and
biases (positions and class tokens among them) get adds up to the logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layers import Layers, State, exact
from .targets import Target, target_index

_OP = "relevance"


@exact
def relevance(model: Any, images: Tensor, target: Target = None) -> Tensor:
    """What each patch contributes to the logit of a class; negative where it speaks against it.

    One forward and one backward pass, layer by layer: O(L) in time and memory. A head that is no linear layer
    counts with its gradient.

    Args:
        model: a `VisionMamba` with a head, computed as in eval mode, not changed.
        images: (B, C, H, W), normalised as for the model. A pixel of value 0, the mean of the training
            images, has no relevance.
        target: class index for all images, or one per image; None: the predicted class.

    Returns:
        (B, h, w) in units of the logit: the sum over patches is the logit without what biases, positions and
        class tokens contribute. Where patches overlap, a patch counts its share of their pixels.

    Raises:
        TypeError, ValueError: the model is no VisionMamba or has no logits of whole images; images or target
            do not fit.
    """
    net = Layers(_OP, model, images)

    def block(i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        return _block(net, i, h, r)

    patches = net.patches()
    inputs: list[State] = []
    state: State = net.embed(patches), None
    for layers in net.groups:
        inputs.append(state)
        state = net.group(layers, *state)
    h, r = (t.detach().requires_grad_() for t in state if t is not None)
    with torch.enable_grad():
        logits = net.logits(net.norm("norm_f", r + h))
        index = target_index(_OP, target, logits)
        dh, dr = torch.autograd.grad(logits.gather(1, index[:, None]).sum(), (h, r))
    for layers, entered in zip(reversed(net.groups), reversed(inputs)):
        dh, dr = net.group_backward(layers, entered, dh, dr, block)
    return (patches * dh[:, net.patch_at]).sum(-1).unflatten(1, net.config.grid)


def _block(net: Layers, i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """Layer i, with the derivatives of the rules."""
    mixer = net.frozen(i, h, r)
    y = sum(branch.scan(branch.convolved(mixer.x)) for branch in mixer.branches)
    assert isinstance(y, Tensor)
    gate = mixer.z * torch.sigmoid(mixer.z.detach()) * mixer.scale
    half = (y * gate.detach() + y.detach() * gate) / 2
    return half @ mixer.out.T, h if r is None else r + h
