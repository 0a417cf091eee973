# SPDX-License-Identifier: Apache-2.0
"""Pictures of features: their principal components as colours (as DINOv2 shows them), and norms of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import boolean, integer
from .layers import Layers, evaluating, exact, output_layers


@exact
def feature_pca(model: Any, images: Tensor, layer: int = -1, foreground: bool = True) -> Tensor:
    """The features of every patch as a colour: alike in colour is alike in features.

    The residual stream after the layer, normalised as the head sees it, centred over all patches of the
    batch. With `foreground`, patches whose first principal component is above its mean are foreground, if
    most of the images' borders are below it, and otherwise those below; the others are black. The first three
    components of the foreground (of all patches, without) are red, green and blue, each stretched over the
    range of 98 % of its values. Colours compare within one call only.

    Args:
        model: a `VisionMamba`, computed as in eval mode, not changed.
        images: (B, C, H, W), normalised as for the model, at least one.
        layer: negative ones count from the last.
        foreground: see above.

    Returns:
        (B, h, w, 3) from 0 to 1, in the type of the model.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; images or layer do not fit.
    """
    op = "feature_pca"
    net = Layers(op, model, images)
    foreground = boolean(f"[{op}] foreground", foreground)
    if not len(net.images):
        raise ValueError(f"[{op}] images: expected at least one, got {tuple(net.images.shape)}")
    (layer,) = output_layers(op, net.config, integer(f"[{op}] layer", layer))
    with evaluating(net.model):
        (stream,) = net.model.forward_intermediates(net.images, [layer])
    tokens = net.last_norm(stream.flatten(2).transpose(1, 2).contiguous())
    height, width = net.config.grid
    x = tokens.flatten(0, 1).double()
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if foreground:
        first = _components(x, 1)[:, 0].view(-1, height, width)
        border = torch.ones(height, width, dtype=torch.bool, device=x.device)
        border[1:-1, 1:-1] = False
        above = first > 0
        kept = (above if above[:, border].double().mean() <= 0.5 else ~above).flatten()
    colours = x.new_zeros(len(x), 3)
    if kept.any():
        colours[kept] = _stretched(_components(x[kept], 3))
    return colours.view(-1, height, width, 3).to(tokens.dtype)


def _components(x: Tensor, count: int) -> Tensor:
    """(n, count): coordinates of x (n, D) float64 along its first principal components, zeros beyond D.

    The sign of a component is the one whose largest weight is positive: the same in every run.
    """
    x = x - x.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    vectors = vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    found = x @ (vectors * torch.where(largest < 0, -1.0, 1.0))
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def _stretched(x: Tensor) -> Tensor:
    """Each column of x (n, 3) from 0 to 1 between its 1st and 99th percentile; 0.5 where all are alike."""
    ordered, last = x.sort(dim=0).values, len(x) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    flat = high - low <= 1e-12 * x.abs().amax(0).clamp_min(1e-300)
    return torch.where(flat, 0.5, (x - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


@exact
def token_norms(model: Any, images: Tensor, layers: int | Sequence[int] | None = None) -> Tensor:
    """The length of every patch's token after each layer.

    Large ones in even background are places where the network keeps what concerns the whole image (Darcet et
    al., arXiv 2309.16588; of Vim: Mamba-R, arXiv 2405.14858).

    Args:
        model: a `VisionMamba`, computed as in eval mode, not changed.
        images: (B, C, H, W), normalised as for the model.
        layers: numbers of layers, negative ones count from the last; None: all. With directions "block" there
            is one stream after each pair, that of its second (odd) layer.

    Returns:
        (B, layers, h, w): Euclidean norms of the residual stream, as `forward_intermediates` gives it.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; images or layers do not fit.
    """
    op = "token_norms"
    net = Layers(op, model, images)
    wanted = output_layers(op, net.config, layers)
    found: dict[int, Tensor] = {}
    with evaluating(net.model):
        for begin in range(0, len(wanted), 8):  # bounds the memory of the maps
            some = wanted[begin : begin + 8]
            for layer, stream in zip(some, net.model.forward_intermediates(net.images, some)):
                found[layer] = stream.norm(dim=1)
    return torch.stack([found[layer] for layer in wanted], 1)
