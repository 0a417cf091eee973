# SPDX-License-Identifier: Apache-2.0
"""Clusters of patches, and the decoder that predicts one from those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.parameters import trunc_normal

HEAD = 64  # width of an attention head


def cluster_order(name: str, grid: tuple[int, int], side: int) -> Tensor:
    """Patches (J) by their places in rows, cluster after cluster, each of them by rows as well.

    Raises:
        ValueError: clusters of this side do not divide the grid, or there is only one.
    """
    rows, columns = grid
    if rows % side or columns % side or rows * columns == side**2:
        raise ValueError(
            f"[{name}] cluster: expected a side that cuts {rows} x {columns} patches into several, got {side}"
        )
    places = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
    return places.permute(0, 2, 1, 3).flatten()


class ClusterDecoder(nn.Module):
    """Cross-attention from the places of a cluster to all patches of the clusters before it.

    Block i of the decoder reads the encoder's depth i, the deepest one last.

    Args:
        dim: width of the encoder.
        count: patches.
        size: patches of a cluster.
        width, blocks: of the decoder; the width is a multiple of 64, or below.
        pixels: values of a patch.
        reverse: clusters after it, instead.
    """

    sees: Tensor

    def __init__(
        self, dim: int, count: int, size: int, width: int, blocks: int, pixels: int, *, reverse: bool
    ) -> None:
        super().__init__()
        if width > HEAD and width % HEAD:
            raise ValueError(f"[NextPatch] decoder_dim: expected a multiple of {HEAD}, got {width}")
        self.size, self.reverse = size, reverse
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, count, width))
        self.blocks = nn.ModuleList(_Block(dim, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, pixels)
        cluster = torch.arange(count) // size
        later = cluster[:, None] > cluster[None]
        self.register_buffer("sees", later.T.contiguous() if reverse else later, persistent=False)
        trunc_normal(self.query, 0.02)
        trunc_normal(self.positions, 0.02)

    def forward(self, depths: Sequence[Tensor]) -> Tensor:
        """(B, J, pixels): at t what is predicted for the same place of the next cluster from those up to t's.

        Args:
            depths: of the encoder, (B, J, D) each, patches cluster by cluster.
        """
        step = self.size
        targets = slice(None, -step) if self.reverse else slice(step, None)
        batch = len(depths[0])
        x = (self.query + self.positions[:, targets]).expand(batch, -1, -1)
        for block, seen in zip(self.blocks, depths):
            x = block(x, seen, self.sees[targets])
        found = self.predict(self.norm(x))
        nothing = found.new_zeros(batch, step, found.shape[2])
        return torch.cat([nothing, found] if self.reverse else [found, nothing], 1)


class _Block(nn.Module):
    """Cross-attention and MLP, each after a norm and around a residual."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.heads = max(width // HEAD, 1)
        self.norm, self.norm_seen, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(dim), nn.LayerNorm(width)
        self.query, self.keys_values = nn.Linear(width, width), nn.Linear(dim, 2 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor, sees: Tensor) -> Tensor:
        """(B, T, width) of the same and of the patches seen (B, J, D); `sees` (T, J) bool."""
        q = self.query(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.keys_values(self.norm_seen(seen)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))
        return x + mlp
