# SPDX-License-Identifier: Apache-2.0
"""All rows of the attention that a mixer implies, some at a time, for one image.

Between an earlier token s and row t the decay is exp(A sum of delta), a product of two factors on either side
of the first row a of a tile, so that most of a tile is a matrix product per channel. Both factors are
at most 1: nothing overflows. Within the tile the decays are written out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layers import Branch, Frozen

ROWS = 16  # of a tile


def scan_rows(branch: Branch, image: int, begin: int, end: int) -> Tensor:
    """Rows begin .. end - 1 of the scan's map with its skip, without convolution: (rows, L, E)."""
    delta, B, C = (t[image] for t in (branch.delta, branch.B, branch.C))
    if not branch.reverse:
        return _forward_rows(delta, branch.A, B, C, branch.D, begin, end)
    length, turned = len(delta), [t.flip(0) for t in (delta, B, C)]
    rows = _forward_rows(turned[0], branch.A, *turned[1:], branch.D, length - end, length - begin)
    return rows.flip(0, 1)


def _forward_rows(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, begin: int, end: int
) -> Tensor:
    """delta (L, E), A (E, N), B and C (L, N), D (E)."""
    out = delta.new_zeros(end - begin, *delta.shape)
    here = slice(begin, end)
    since = delta[here].cumsum(0) - delta[begin]  # of delta after `begin`, up to a row; (rows, E)
    if begin:
        to_begin = delta[1 : begin + 1].flip(0).cumsum(0).flip(0)  # after a token, up to `begin`; (begin, E)
        left = C[here, None] * (since[..., None] * A).exp()  # (rows, E, N)
        right = B[:begin, None] * (to_begin[..., None] * A).exp() * delta[:begin, :, None]
        out[:, :begin] = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).permute(1, 2, 0)
    later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=delta.device).tril_()
    between = (since[:, None] - since[None]).clamp_min_(0)  # (rows, tokens, E)
    decay = (between[..., None] * A).exp()
    own = torch.einsum("tsen,tn,sn->tse", decay, C[here], B[here]) * delta[here] * later[..., None]
    out[:, here] = own
    out[range(end - begin), range(begin, end)] += D
    return out


def block_rows(mixer: Frozen, image: int, begin: int, end: int) -> Tensor:
    """Rows begin .. end - 1 of the mixer's map of x, both directions, gate included: (rows, L, E)."""
    total = mixer.gate.new_zeros(end - begin, *mixer.gate.shape[1:])
    for branch in mixer.branches:
        scanned = scan_rows(branch, image, begin, end) * branch.slope[image]
        for tap, weight in enumerate(branch.weight.flip(1).unbind(1)):  # of tokens 0, 1, ... before
            if tap >= total.shape[1]:
                break
            kept, moved = slice(0, total.shape[1] - tap), slice(tap, None)
            if branch.conv_reverse:
                kept, moved = moved, kept
            total[:, kept] += scanned[:, moved] * weight
    return total * mixer.gate[image, begin:end, None]


def tiles(mixer: Frozen, image: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the mixer's map, tile by tile: (which rows, (rows, L, E))."""
    length = mixer.gate.shape[1]
    for begin in range(0, length, ROWS):
        end = min(begin + ROWS, length)
        yield slice(begin, end), block_rows(mixer, image, begin, end)
