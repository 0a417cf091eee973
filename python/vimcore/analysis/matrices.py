# SPDX-License-Identifier: Apache-2.0
"""All rows of the attention that a mixer implies, a few at a time, for one image.

Rows are taken in the order of the scan. The decay from an earlier token s to row t is split at the first row
of the tile: exp(A sum of delta) up to there, kept for all s and brought along from tile to tile, and from
there to t. Both factors are at most 1, so that nothing overflows, and what earlier tokens give is a matrix
product per channel. Within the tile the decays are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .layers import Branch, Frozen

ROWS = 8  # of a tile


def channel_matrices(mixer: Frozen, image: int, kept: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """(L, L) each: means over channels of the mixer's map of x, both directions and gate included.

    Args:
        kept: of every element, one function for each matrix: torch.abs, or the positive part.
    """
    length, inner = mixer.gate.shape[1:]
    matrices = [mixer.gate.new_zeros(length, length) for _ in kept]
    reach = mixer.branches[0].weight.shape[1] - 1
    rows = torch.arange(length, device=mixer.gate.device)
    wanted = rows[:, None] + torch.arange(-reach, reach + 1, device=rows.device)
    columns = wanted.clamp(0, length - 1)
    # Forward and reverse rows have only the tokens within `reach` of their own in common: these are added
    # before `kept`, all others belong to one direction.
    near = mixer.gate.new_zeros(*wanted.shape, inner)
    for branch in mixer.branches:
        for part, start, weights in block_rows(mixer, branch, image):
            width = weights.shape[2]
            here = columns[part] - start
            seen = (here >= 0) & (here < width)
            near[part] += (weights.gather(2, here.clamp(0, width - 1).expand(inner, -1, -1)) * seen).permute(
                1, 2, 0
            )
            for matrix, keep in zip(matrices, kept):
                matrix[part, start : start + width] += keep(weights).mean(0)
    inside = wanted.eq(columns)
    at = rows[:, None].expand_as(columns)[inside], columns[inside]
    for matrix, keep in zip(matrices, kept):
        matrix[at] = keep(near).mean(-1)[inside]
    return matrices


def block_rows(mixer: Frozen, branch: Branch, image: int) -> Iterator[tuple[slice, int, Tensor]]:
    """One direction's map of x, gate included, the tiles in the order of the scan.

    Yields:
        which rows; the first of the columns; (E, rows, columns), all other columns are zero.
    """
    length = mixer.gate.shape[1]
    gate, taps = mixer.gate[image].T[..., None], branch.weight.flip(1).T[..., None, None]
    along = branch.reverse == branch.conv_reverse  # the convolution reads tokens that the scan has passed
    for begin, scanned in scan_rows(branch, image):
        rows, end = scanned.shape[1:]
        width = end if along else min(end + len(taps) - 1, length)
        weights = scanned.new_zeros(*scanned.shape[:2], width)
        for tap, weight in enumerate(taps[:width]):  # of tokens 0, 1, ... before
            if along:
                weights[..., : end - tap].addcmul_(scanned[..., tap:], weight)
            else:
                count = min(end, width - tap)
                weights[..., tap : tap + count].addcmul_(scanned[..., :count], weight)
        part, start = slice(begin, begin + rows), 0
        if branch.reverse:
            part, start = slice(length - part.stop, length - begin), length - width
            weights = weights.flip(1, 2)
        yield part, start, weights.mul_(gate[:, part])


def scan_rows(branch: Branch, image: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, (E, rows, columns up to the last row)) of the scan with its skip, times `slope`.

    Rows and columns are counted in the order of the scan.
    """
    held = [t[image] for t in (branch.delta, branch.B, branch.C, branch.slope)]
    delta, B, C, slope = (t.flip(0) for t in held) if branch.reverse else held
    A, length = branch.A, len(delta)
    source = B.T * (delta * slope).T[:, None]  # (E, N, L)
    brought = torch.empty_like(source)  # those of the tiles before, decayed to the first row of the tile
    before = 0
    for begin in range(0, length, ROWS):
        here = slice(begin, min(begin + ROWS, length))
        out = source.new_empty(len(A), here.stop - begin, here.stop)
        since = delta[here].cumsum(0) - delta[begin]  # of delta after `begin`, up to a row; (rows, E)
        if begin:
            tile = slice(before, begin)
            last = delta[before + 1 : begin + 1].flip(0).cumsum(0).flip(0)  # after a token, up to `begin`
            brought[..., :before] *= (last[0, :, None] * A).exp()[..., None]
            brought[..., tile] = source[..., tile] * (last.T[:, None] * A[..., None]).exp()
            left = C[here] * (since.T[..., None] * A[:, None]).exp()  # (E, rows, N)
            out[..., :begin] = torch.bmm(left, brought[..., :begin])
        between = (since[:, None] - since).clamp_min_(0).permute(2, 0, 1)  # (E, rows, tokens)
        decay = (between[:, :, None] * A[:, None, :, None]).exp_()  # (E, rows, N, tokens)
        decay *= source[:, None, :, here]
        out[..., here] = (C[here, None] @ decay).squeeze(2).tril_()
        out.diagonal(begin, 1, 2).add_(branch.D[:, None] * slope[here].T)
        before = begin
        yield begin, out
