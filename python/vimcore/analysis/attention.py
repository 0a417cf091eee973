# SPDX-License-Identifier: Apache-2.0
"""The attention that the scans of a Vim imply, exactly, a row of it in time and memory linear in the tokens.

The scan alone (Ali et al., The Hidden Attention of Mamba Models, arXiv 2403.01590), for s <= t:

    alpha[t, s] = delta[s] * sum_n C[t] exp(A sum_{k = s+1 .. t} delta[k]) B[s], and at s = t also the skip D

The whole mixer adds convolution and gate (Zimerman et al., arXiv 2405.16504). Row t of either, for all
channels, is the gradient of output t by all inputs, the selectivity held, and that is one scan the other way
round. Nothing here is approximated, normalised or cut off at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import Config
from ..utils.arguments import integer
from .layers import Frozen, Layers, chosen_layers, exact

Token = str | Sequence[int]
_OP = "attention_maps"


@exact
def attention_maps(
    model: Any,
    images: Tensor,
    token: Token = "class",
    layers: int | Sequence[int] | None = None,
    part: str = "block",
    reduce: str | None = "abs",
) -> Tensor:
    """How much each token enters one token's output, by layer and scan direction.

    The network computes as in eval mode and is not changed. It takes O(layers * B * L * E * N) time and the
    memory of one layer. Direction 0 is the forward scan, 1 the reverse one; zeros where a layer has no such
    scan: all layers with directions "none" and "sequence" (which runs forward in eval mode), and with
    "block" the reverse direction of even layers and the forward direction of odd ones.

    Args:
        model: a `VisionMamba`, on any device.
        images: (B, C, H, W), normalised as for the model.
        token: the row: (row, column) of a patch, or "class": what the head reads, with two class tokens the
            mean of their rows.
        layers: numbers of layers, negative ones count from the last; None: all.
        part: "block" (the mixer: y = sum over directions and tokens of M x, as `W_out` gets it, gate and
            halving of the average included) or "scan" (the scan alone with its skip, per direction).
        reduce: over the E channels: "abs" the mean of absolute values; "norm" the Frobenius norm of the
            linear map that they make up, D x D from normalised token to output ("block", W_x and W_out
            included) or diagonal ("scan"); None: none.

    Returns:
        (B, layers, 2, h, w) of at least 0, class tokens left out; with reduce None signed
        (B, layers, 2, E, L) over all tokens in sequence order, the class tokens where the network puts them.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; images, token, layers, part or reduce do not fit;
            token is "class" and there is no class token.
    """
    if part not in ("block", "scan"):
        raise ValueError(f"[{_OP}] part: expected 'block' or 'scan', got {part!r}")
    if reduce not in ("abs", "norm", None):
        raise ValueError(f"[{_OP}] reduce: expected 'abs', 'norm' or None, got {reduce!r}")
    net = Layers(_OP, model, images)
    wanted = chosen_layers(_OP, net.config.depth, layers)
    row = _row(net, token)
    found: dict[int, Tensor] = {}
    for i, h, r in net.visit():
        if i in wanted:
            found[i] = _of_layer(net, net.frozen(i, h, r), row, part, reduce)
        if len(found) == len(set(wanted)):
            break
    return torch.stack([found[i] for i in wanted], 1)


def place_of(config: Config, token: Token) -> tuple[int, int] | None:
    """(row, column) of a patch; None: "class".

    Raises:
        TypeError, ValueError: there is no such token.
    """
    if isinstance(token, str):
        if token != "class":
            raise ValueError(f"[{_OP}] token: expected 'class' or (row, column), got {token!r}")
        if not config.class_tokens:
            raise ValueError(f"[{_OP}] token: this network has no class token; name a patch: (row, column)")
        return None
    at = list(token) if isinstance(token, Sequence) else [token]
    if len(at) != 2:
        raise ValueError(f"[{_OP}] token: expected 'class' or (row, column), got {token!r}")
    row, column = (integer(f"[{_OP}] token", value) for value in at)
    height, width = config.grid
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"[{_OP}] token: expected a row of 0 .. {height - 1} and a column of 0 .. {width - 1}, "
            f"got ({row}, {column})"
        )
    return row, column


def _row(net: Layers, token: Token) -> Tensor:
    """(L): weights of the rows that are summed."""
    at = place_of(net.config, token)
    if at is None:
        return net.class_row()
    weights = net.images.new_zeros(net.config.tokens)
    weights[net.patch_at[at[0] * net.config.grid[1] + at[1]]] = 1
    return weights


def pulled(mixer: Frozen, row: Tensor, part: str = "block") -> list[tuple[int, Tensor]]:
    """Rows of the map, weighted and summed: (direction, (B, L, E)) of every branch.

    Args:
        row: (L) or (B, L), weights of the rows.
    """
    gate = mixer.gate if part == "block" else torch.ones_like(mixer.gate)
    tokens = row.reshape(-1, row.shape[-1]).ne(0).any(0).nonzero().flatten().tolist()
    found = []
    for branch in mixer.branches:
        if len(tokens) <= 2:
            pieces = [branch.scan_row(row[..., t, None] * gate[:, t], t) for t in tokens]
            du = sum(pieces[1:], pieces[0]) if pieces else torch.zeros_like(gate)
        else:
            du = branch.scan_transposed(row[..., None] * gate)
        found.append((int(branch.reverse), branch.convolved_transposed(du) if part == "block" else du))
    return found


def _of_layer(net: Layers, mixer: Frozen, row: Tensor, part: str, reduce: str | None) -> Tensor:
    """One layer: (B, 2, h, w), or (B, 2, E, L)."""
    batch, length, inner = mixer.gate.shape
    if reduce is None:
        out = mixer.gate.new_zeros(batch, 2, inner, length)
    else:
        out = mixer.gate.new_zeros(batch, 2, *net.config.grid)
    for direction, weights in pulled(mixer, row, part):
        if reduce is None:
            out[:, direction] = weights.transpose(1, 2)
        elif reduce == "abs":
            out[:, direction] = net.on_grid(weights.abs().mean(-1))
        else:
            squares = weights.square()
            if part == "block":  # ||W_out diag(c) W_x||^2 = c (W_out' W_out * W_x W_x') c
                between = (mixer.out.T @ mixer.out) * (mixer.into @ mixer.into.T)
                squares = (weights @ between) * weights
            out[:, direction] = net.on_grid(squares.sum(-1).clamp_min(0).sqrt())
    return out
