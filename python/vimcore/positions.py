# SPDX-License-Identifier: Apache-2.0
"""Position tables between grids of patches, and the rotation tables (RoPE)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from . import _core
from .config import image_size, patch_grid


def class_rows(class_token: str, patches: int) -> list[int]:
    """Rows of a position table that belong to class tokens, for ``patches`` patches."""
    rows = {"none": [], "head": [0], "random": [0], "middle": [patches // 2], "double": [0, patches + 1]}
    if class_token not in rows:
        raise ValueError(f"class_token: expected one of {', '.join(rows)}, got {class_token!r}")
    return rows[class_token]


def resize_pos_embed(
    table: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_token: str = "middle",
    way: str = "correct",
) -> torch.Tensor:
    """Position table for another grid of patches: bicubic, align_corners=False, no antialiasing.

    Args:
        table: (1, rows * columns + class tokens, D).
        old_grid, new_grid: (rows, columns) of patches.
        class_token: where the class tokens stand, as in the constructor.
        way: "correct" takes the rows of the class tokens out, resizes the others and puts them back in their
            new places. "authors" reproduces the published fine-tuning: the first rows are kept as if the
            class tokens stood there, the rest is resized. Both agree for "none" and "head".
    """
    if way not in ("correct", "authors"):
        raise ValueError(f"pos_embed: expected 'correct' or 'authors', got {way!r}")
    old_patches, new_patches = old_grid[0] * old_grid[1], new_grid[0] * new_grid[1]
    old_rows, new_rows = class_rows(class_token, old_patches), class_rows(class_token, new_patches)
    expected = old_patches + len(old_rows)
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] != expected:
        raise ValueError(
            f"[resize_pos_embed] table: expected (1, {expected}, D) "
            f"for a {old_grid[0]} x {old_grid[1]} grid and class_token {class_token!r}, "
            f"got {tuple(table.shape)}"
        )
    if way == "authors":
        old_rows = new_rows = list(range(len(old_rows)))
    if tuple(old_grid) == tuple(new_grid):
        return table.clone()
    keep = torch.ones(expected, dtype=torch.bool)
    keep[old_rows] = False
    wide = table if table.dtype == torch.float64 else table.float()
    grid = wide[:, keep].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", align_corners=False, antialias=False)
    keep = torch.ones(new_patches + len(new_rows), dtype=torch.bool)
    keep[new_rows] = False
    resized = wide.new_empty(1, len(keep), table.shape[2])
    resized[:, keep] = grid.flatten(2).transpose(1, 2)
    resized[:, new_rows] = wide[:, old_rows]
    return resized.to(table.dtype)


def fit_table(
    table: torch.Tensor,
    wanted: torch.Tensor,
    config: Mapping[str, Any],
    old_grid: tuple[int, int] | None,
    way: str,
) -> torch.Tensor:
    """`resize_pos_embed` to the grid of `config`; old_grid None: the same, or a square one."""
    new_grid = patch_grid(config)
    if old_grid is None:
        if table.shape == wanted.shape:
            return table
        patches = table.shape[1] - len(class_rows(config["class_token"], 0))
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            raise ValueError(f"{patches} patches are no square grid; name it with pos_grid=(rows, columns)")
        old_grid = (side, side)
    return resize_pos_embed(table, old_grid, new_grid, config["class_token"], way)


def rope_tables(config: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' RoPE tables for a configuration: cos and sin, each (rows * columns, D) float64."""
    dim = int(config["embed_dim"]) // 2
    need = 8 * 2 * dim * math.prod(patch_grid(config)) * 4  # cos and sin, and what they are made of
    if need > _core.machine_bytes():
        size = "{} x {}".format(*image_size(config))
        raise ValueError(f"[config] img_size: the rotation tables of {size} pixels need {need / 1e9:.0f} GB")
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64)[: dim // 2] / dim)
    rows, columns = patch_grid(config)
    grid = int(config["rope_grid"])

    def angles(count: int) -> torch.Tensor:
        positions = torch.arange(count, dtype=torch.float64) / count * grid
        return (positions[:, None] * frequencies).repeat_interleave(2, dim=1)

    both = torch.cat(
        [
            angles(rows)[:, None].expand(rows, columns, dim),
            angles(columns)[None].expand(rows, columns, dim),
        ],
        dim=2,
    ).reshape(rows * columns, 2 * dim)
    return both.cos(), both.sin()
