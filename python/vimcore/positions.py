# SPDX-License-Identifier: Apache-2.0
"""Position tables between grids of patches, and the rotation tables (RoPE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _core
from .config import image_size, patch_grid
from .utils.compiling import constant_result


@constant_result
def class_rows(class_token: str, patches: int) -> list[int]:
    """Rows of a position table that belong to class tokens, for ``patches`` patches."""
    return _core.class_rows(class_token, patches)


class Sequenced(Protocol):
    """What says of a network how patches become tokens: a configuration, or plain values of it."""

    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def class_token(self) -> str: ...
    @property
    def class_positions(self) -> list[int]: ...
    @property
    def pos_embed(self) -> bool: ...
    @property
    def frames(self) -> int | None: ...
    def param_shapes(self) -> Iterable[str]: ...


def with_class_tokens(x: Tensor, tokens: Tensor, at: list[int]) -> Tensor:
    """Patches (B, J, D) with class tokens (1, n, D) between them, which then stand at `at`, ascending."""
    for k, place in enumerate(at):
        x = torch.cat([x[:, :place], tokens[:, k : k + 1].expand(x.shape[0], -1, -1), x[:, place:]], 1)
    return x


def embedded(
    patches: Tensor, weight: Callable[[str], Tensor], made_for: Sequenced, here: Sequenced
) -> Tensor:
    """The tokens (B, L, D) that enter the first layer: class tokens put in place, positions added.

    Args:
        patches: (B, J, D), of clips those of the frames in order.
        weight: a parameter by its state-dict key.
        made_for, here: the configuration that the position tables are of, and that of these images.
    """
    names = [name for name in here.param_shapes() if name.startswith("cls_token")]
    at = here.class_positions
    x = patches
    if names:
        x = with_class_tokens(x, torch.cat([weight(name) for name in names], 1), at)
    if not here.pos_embed:
        return x
    table = resize_pos_embed(weight("pos_embed"), made_for.grid, here.grid, here.class_token)
    if here.class_token != "registers" and not here.frames:
        return x + table
    rows = class_rows(here.class_token, here.grid[0] * here.grid[1])
    own = weight("pos_embed_cls") if here.class_token == "registers" else table[:, rows]
    table = table[:, [row for row in range(table.shape[1]) if row not in rows]]
    if here.frames:
        table = (table[:, None] + weight("temporal_pos_embedding")[:, :, None]).flatten(1, 2)
    return x + with_class_tokens(table, own, at)


class _Resized(torch.autograd.Function):
    """A table on another grid, or the gradient of that, which is the transpose and differentiable as well."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: int, transposed: bool, resize: tuple[Any, ...]) -> Tensor:
        ctx.rows, ctx.transposed, ctx.resize = table.shape[1], transposed, resize
        if table.is_meta:
            return table.new_empty(1, rows, table.shape[2])
        here = table.detach().to("cpu", torch.promote_types(table.dtype, torch.float32)).contiguous()
        out = here.new_zeros(1, rows, table.shape[2])
        (_core.resize_positions_backward if transposed else _core.resize_positions)(here, out, *resize)
        return out.to(table)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Resized.apply(gradients[0], ctx.rows, not ctx.transposed, ctx.resize), None, None, None


def resize_pos_embed(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_token: str = "middle",
    way: str = "correct",
) -> Tensor:
    """Position table for another grid of patches: bicubic, align_corners=False, no antialiasing.

    Computed in float64 on the CPU, rounded to the type of the table; differentiable, also twice.

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
    classes, patches = len(class_rows(class_token, 0)), old_grid[0] * old_grid[1]
    expected = patches + classes
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] != expected:
        raise ValueError(
            f"[resize_pos_embed] table: expected (1, {expected}, D) "
            f"for a {old_grid[0]} x {old_grid[1]} grid and class_token {class_token!r}, "
            f"got {tuple(table.shape)}"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table.clone()
    resize = (class_token, tuple(old_grid), tuple(new_grid), way)
    return _Resized.apply(table, new_grid[0] * new_grid[1] + classes, False, resize)


def fit_table(
    table: Tensor,
    wanted: Tensor,
    config: Mapping[str, Any],
    old_grid: tuple[int, int] | None,
    way: str,
) -> Tensor:
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


def rope_tables(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The authors' RoPE tables for a configuration: cos and sin, each (rows * columns, D) float64."""
    grid, dim = patch_grid(config), int(config["embed_dim"])
    need = 2 * 8 * dim * math.prod(grid)
    if need > _core.machine_bytes():
        size = "{} x {}".format(*image_size(config))
        raise ValueError(f"[config] img_size: the rotation tables of {size} pixels need {need / 1e9:.0f} GB")
    cos, sin = torch.empty(2, math.prod(grid), dim, dtype=torch.float64, device="cpu")
    _core.rope_tables(grid, int(config["rope_grid"]), cos, sin)
    return cos, sin
