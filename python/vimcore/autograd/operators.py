# SPDX-License-Identifier: Apache-2.0
"""The differentiable operators as Functions of autograd: a forward and a backward of the core each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import _core
from .checks import once_differentiable
from .tensors import aligned, exported, place, wide


def _fresh(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like)


def _narrow(total: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A place for the gradient of x beside the wide one of its sum with the residual; None where one does."""
    return None if total.dtype == dtype else torch.empty_like(total, dtype=dtype)


def _exported(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [exported(t) for t in tensors]


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


class NormFunction(torch.autograd.Function):
    """x (B, L, D), weight, bias or None (D), residual or None -> out, x + residual."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        eps: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, total = torch.empty_like(x), torch.empty_like(x, dtype=wide(x.dtype))
        x_, residual_, weight_, bias_, total_, out_ = _exported([x, residual, weight, bias, total, out])
        _core.norm_forward(kind, eps, x_, residual_, weight_, bias_, total_, out_, place(out))
        ctx.save_for_backward(total, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.eps, ctx.dtype = kind, eps, x.dtype
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias = ctx.saved_tensors
        residual = ctx.needs_input_grad[5]
        if dout is None:
            dx = None if dtotal is None else dtotal.to(ctx.dtype)
            return None, None, dx, None, None, dtotal if residual else None
        dsum, dx = torch.empty_like(total), _narrow(total, ctx.dtype)
        dweight, dbias = torch.zeros_like(weight), _fresh(bias)
        dout, dtotal = dout.contiguous(), _contiguous(dtotal)
        arguments = [*_exported([total, weight, dout, dtotal, dsum, dx, dweight, dbias]), place(total)]
        _core.norm_backward(ctx.kind, ctx.eps, *arguments)
        if dx is None:
            dx = dsum.clone() if residual else dsum
        return None, None, dx, dweight, dbias, dsum if residual else None


class Conv1dFunction(torch.autograd.Function):
    """x (B, L, E), weight (E, K), bias (E) or None -> (B, L, E)."""

    @staticmethod
    def forward(
        ctx: Any, silu: bool, reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(x)
        x_, weight_, bias_, out_ = _exported([x, weight, bias, out])
        _core.conv1d_forward(x_, weight_, bias_, silu, reverse, out_, place(out))
        ctx.save_for_backward(x, weight, bias)
        ctx.silu, ctx.reverse = silu, reverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = torch.zeros_like(x), torch.zeros_like(weight), _fresh(bias)
        dout = dout.contiguous()
        x_, weight_, bias_ = _exported([x, weight, bias])
        arguments = [*_exported([dout, dx, dweight, dbias]), place(x)]
        _core.conv1d_backward(x_, weight_, bias_, ctx.silu, ctx.reverse, *arguments)
        return None, None, dx, dweight, dbias


class SelectiveScanFunction(torch.autograd.Function):
    """u, delta, A, B, C, then D, z, delta_bias or None -> out (B, L, E)."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, reverse: bool, *inputs: Tensor | None) -> Tensor:
        assert inputs[0] is not None
        out = torch.empty_like(inputs[0])
        _core.selective_scan_forward(_exported(inputs), softplus, reverse, exported(out), place(out))
        ctx.save_for_backward(*inputs)
        ctx.softplus, ctx.reverse = softplus, reverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [_fresh(t) for t in inputs]
        dout = dout.contiguous()
        out = torch.empty_like(dout)
        inputs_, gradients_, (out_, dout_) = _exported(inputs), _exported(gradients), _exported([out, dout])
        _core.selective_scan_backward(inputs_, ctx.softplus, ctx.reverse, out_, dout_, gradients_, place(out))
        return (None, None, *gradients)


class BidirectionalScanFunction(torch.autograd.Function):
    """z (B, L, E), then u, q, A_log, D, dt_weight, dt_bias, forward then reverse direction -> (B, L, E)."""

    @staticmethod
    def forward(ctx: Any, scale: float, chunk: int, z: Tensor, *inputs: Tensor) -> Tensor:
        batch, length, inner = z.shape
        xz = z.new_zeros(batch, length, 2 * inner)
        xz[:, :, inner:] = z.detach()
        shape = (batch, (length + chunk - 1) // chunk, inputs[2].shape[1], inner)
        needed = any(ctx.needs_input_grad)
        states = [z.new_empty(shape, dtype=wide(z.dtype)) if needed else None for _ in range(2)]
        out = torch.empty_like(z)
        values = _exported(inputs)
        outputs = [[exported(state)] for state in states]
        passes = [values[:6], values[6:]]
        _core.scan_forward(exported(xz), passes, outputs, scale, chunk, exported(out), place(out))
        ctx.save_for_backward(z, xz, *states, *inputs)  # z: see once_differentiable
        ctx.scale, ctx.chunk = scale, chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, xz, first, second, *inputs = ctx.saved_tensors
        gradients = [torch.zeros_like(t) for t in inputs]
        dout = dout.contiguous()
        dxz, out = torch.zeros_like(xz), torch.empty_like(dout)
        passes = [_exported([first, *gradients[:6]]), _exported([second, *gradients[6:]])]
        values = [_exported(inputs[:6]), _exported(inputs[6:])]
        arguments = [*_exported([out, dout, dxz]), place(out)]
        _core.scan_backward(exported(xz), values, passes, ctx.scale, ctx.chunk, *arguments)
        return (None, None, dxz[:, :, xz.shape[2] // 2 :].contiguous(), *gradients)


class BlockFunction(torch.autograd.Function):
    """x (B, L, D), residual or None, parameters in state-dict order -> mixer output, residual + x."""

    @staticmethod
    def forward(
        ctx: Any,
        config: _core.Config,
        reverse: bool,
        memory: str,
        x: Tensor,
        residual: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        at = place(x)
        saved = _core.Saved(memory, at.capturing) if any(ctx.needs_input_grad) else None
        out, total = torch.empty_like(x), torch.empty_like(x, dtype=wide(x.dtype))
        x_, residual_, total_, out_, *params_ = _exported([x, residual, total, out, *params])
        _core.block_forward(config, params_, x_, residual_, reverse, total_, out_, saved, at)
        if saved is None:
            return out, total
        ctx.save_for_backward(from_dlpack(saved.token), total, *params)
        ctx.set_materialize_grads(False)
        ctx.config, ctx.reverse, ctx.memory, ctx.dtype = config, reverse, memory, x.dtype
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        token, total, *params = ctx.saved_tensors
        token, residual = aligned(token), ctx.needs_input_grad[4]
        gradients = [torch.zeros_like(p) for p in params]
        dsum, dx = torch.zeros_like(total), _narrow(total, ctx.dtype)
        dout = torch.zeros_like(total, dtype=ctx.dtype) if dout is None else dout.contiguous()
        dtotal = _contiguous(dtotal)
        total_, params_ = exported(total), _exported(params)
        arguments = [*_exported([dout, dtotal, dsum, dx]), _exported(gradients), place(total)]
        kept = _core.Kept(exported(token), ctx.memory)
        _core.block_backward(ctx.config, params_, total_, ctx.reverse, kept, *arguments)
        if dx is None:
            dx = dsum.clone() if residual else dsum
        return (None, None, None, dx, dsum if residual else None, *gradients)


def block_parameters(config: _core.Config, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one block in the core's order; ValueError lists missing and unexpected names."""
    names = config.block_shapes()
    missing = [name for name in names if name not in parameters]
    unexpected = [name for name in parameters if name not in names]
    if missing or unexpected:
        raise ValueError(f"[vim_block] parameters: missing {missing}, unexpected {unexpected}")
    return {name: parameters[name] for name in names}
