# SPDX-License-Identifier: Apache-2.0
"""One Vim block as an operator of torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .library import (
    config_of,
    dense,
    empty,
    folded,
    looped,
    none,
    operator,
)
from .tensors import NAMES, aligned, exported, on_cuda, place, wide

Maybe = Tensor | None


def _size(x: Tensor, config: str, memory: str, batch: Any) -> Any:
    """Bytes that are saved of so many images."""
    return _core.Saved.block_size(
        config_of(config), batch, int(x.shape[1]), NAMES[x.dtype], on_cuda(x), memory
    )


def _fake(
    x: Tensor, residual: Maybe, params: Sequence[Tensor], config: str, reverse: bool, memory: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = x.shape[0] * _size(x, config, memory, 1) if save else 0
    return empty(x), empty(x, dtype=wide(x.dtype)), empty(x, (size,), torch.uint8)


def _block(
    x: Tensor, residual: Maybe, params: Sequence[Tensor], config: str, reverse: bool, memory: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> mixer output, residual + x, and with `save` what backward needs."""
    x, residual = dense(x), None if residual is None else dense(residual)
    out, total, bytes = _fake(x, residual, params, config, reverse, memory, save)
    saved = _core.Saved.lent(memory, exported(bytes)) if save and x.shape[0] else None
    values = [exported(dense(p)) for p in params]
    _core.block_forward(
        config_of(config), values, exported(x), exported(residual), reverse, exported(total), exported(out),
        saved, place(x),
    )  # fmt: skip
    return out, total, bytes


def _backward(
    dout: Tensor,
    dtotal: Maybe,
    total: Tensor,
    saved: Tensor,
    params: Sequence[Tensor],
    config: str,
    reverse: bool,
    memory: str,
) -> list[Tensor]:
    """-> gradient of the sum in its type, of x where that is another (else empty), of the parameters."""
    dout, total, dtotal = dense(dout), dense(total), None if dtotal is None else dense(dtotal)
    params = [dense(p) for p in params]
    gradients = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in params]
    dsum = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
    dx = None if dout.dtype == total.dtype else empty(dout)
    if total.shape[0]:
        kept = aligned(saved[: _size(dout, config, memory, total.shape[0])])
        gradients_ = [exported(g) for g in gradients]
        arguments = [*[exported(t) for t in (dout, dtotal, dsum, dx)], gradients_, place(total)]
        _core.block_backward(
            config_of(config), [exported(p) for p in params], exported(total), reverse,
            _core.Kept(exported(kept), memory), *arguments,
        )  # fmt: skip
    return [dsum, none(dout) if dx is None else dx, *gradients]


block = operator(
    "block(Tensor x, Tensor? residual, Tensor[] parameters, str config, bool reverse, str memory, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    _block,
    _fake,
)
block_backward = operator(
    "block_backward(Tensor dout, Tensor? dtotal, Tensor total, Tensor saved, Tensor[] parameters, str config,"
    " bool reverse, str memory) -> Tensor[]",
    _backward,
    lambda dout, dtotal, total, saved, params, *args: [
        empty(total),
        none(dout) if dout.dtype == total.dtype else empty(dout),
        *[empty(p) for p in params],
    ],
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, params, ctx.config, ctx.reverse, ctx.memory, _ = inputs
    ctx.save_for_backward(output[2], output[1], *params)
    ctx.mark_non_differentiable(output[2])
    ctx.dtype, ctx.residual = x.dtype, residual is not None


def _gradient(ctx: Any, needed: Any, dout: Maybe, dtotal: Maybe, _: Any) -> tuple[Any, ...]:
    saved, total, *params = ctx.saved_tensors
    if dout is None and dtotal is None:
        return None, None, [None] * len(params), None, None, None, None
    if dout is None:
        dout = torch.zeros_like(total, dtype=ctx.dtype)
    results = block_backward(dout, dtotal, total, saved, params, ctx.config, ctx.reverse, ctx.memory)
    dsum, dx, *gradients = results
    if ctx.dtype == dsum.dtype:
        dx = dsum.clone() if ctx.residual else dsum
    return dx, dsum if ctx.residual else None, gradients, None, None, None, None


def _rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """What is saved of a batch is no sequence of what is saved of its images."""
    return (looped(block) if args[-1] else _folded)(info, in_dims, *args)


@functools.lru_cache(64)
def _token_macs(config: str) -> int:
    """Multiply-adds of one token."""
    one = config_of(config).replace(depth=1, num_classes=0)
    two = one.replace(depth=2)
    return (two.flops() - one.flops()) // one.tokens


def _macs(x: Any, config: str) -> Any:
    return x[0] * x[1] * _token_macs(config)


_folded = folded(block, ["x", "residual"])
block.gradient(_gradient, _setup)
block_backward.last_derivative()
block.vmapped(_rule)
block_backward.vmapped(looped(block_backward))
block.multiply_adds(lambda x, residual, params, config, *args: _macs(x, config))
block_backward.multiply_adds(
    lambda dout, dtotal, total, saved, params, config, *args: 2 * _macs(dout, config)
)


def block_parameters(names: Sequence[str], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one block in the core's order; ValueError lists missing and unexpected names."""
    missing = [name for name in names if name not in parameters]
    unexpected = [name for name in parameters if name not in names]
    if missing or unexpected:
        raise ValueError(f"[vim_block] parameters: missing {missing}, unexpected {unexpected}")
    return {name: parameters[name] for name in names}
