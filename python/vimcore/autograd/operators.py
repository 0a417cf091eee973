# SPDX-License-Identifier: Apache-2.0
"""Norm, convolution and scans as operators of torch, a forward and a backward of the core each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .library import (
    dense,
    empty,
    folded,
    looped,
    none,
    operator,
)
from .tensors import exported, place, wide

Maybe = Tensor | None


def _exported(tensors: Sequence[Maybe]) -> list[Any]:
    return [exported(t) for t in tensors]


def _dense(tensors: Sequence[Maybe]) -> list[Any]:
    return [None if t is None else dense(t) for t in tensors]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _fresh(tensors: Sequence[Maybe]) -> list[Maybe]:
    return [None if t is None else _zeros(t) for t in tensors]


def _present(tensors: Sequence[Maybe], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(none(like) if t is None else t for t in tensors)


def _where(present: Sequence[Maybe], gradients: Sequence[Tensor]) -> list[Maybe]:
    """The gradients of arguments, of which some were absent."""
    return [None if t is None else g for t, g in zip(present, gradients)]


# ---- norm: x (B, L, D), weight, bias or None (D), residual or None -> out, x + residual --------------------


def _norm(
    x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    x, weight, bias, residual = _dense([x, weight, bias, residual])
    out, total = empty(x), empty(x, dtype=wide(x.dtype))
    x_, residual_, weight_, bias_, total_, out_ = _exported([x, residual, weight, bias, total, out])
    _core.norm_forward(kind, eps, x_, residual_, weight_, bias_, total_, out_, place(out))
    return out, total


def _norm_backward(
    dout: Tensor, dtotal: Maybe, total: Tensor, weight: Tensor, bias: Maybe, kind: str, eps: float
) -> tuple[Tensor, ...]:
    """-> gradient of the sum in its type, of x where that is another (else empty), of weight and bias."""
    dout, dtotal, total, weight = _dense([dout, dtotal, total, weight])
    dsum, dx = empty(total), None if dout.dtype == total.dtype else empty(dout)
    dweight, dbias = _fresh([weight, bias])
    arguments = [*_exported([total, weight, dout, dtotal, dsum, dx, dweight, dbias]), place(total)]
    _core.norm_backward(kind, eps, *arguments)
    return _present([dsum, dx, dweight, dbias], dout)


norm = operator(
    "norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str kind, float eps) -> (Tensor, Tensor)",
    _norm,
    lambda x, weight, bias, residual, kind, eps: (empty(x), empty(x, dtype=wide(x.dtype))),
)
norm_backward = operator(
    "norm_backward(Tensor dout, Tensor? dtotal, Tensor total, Tensor weight, Tensor? bias, str kind,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_backward,
    lambda dout, dtotal, total, weight, bias, kind, eps: _present(
        [
            empty(total),
            None if dout.dtype == total.dtype else empty(dout),
            empty(weight),
            None if bias is None else empty(bias),
        ],
        dout,
    ),
)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, residual, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.dtype, ctx.residual = x.dtype, residual is not None


def _norm_gradient(ctx: Any, needed: Any, dout: Maybe, dtotal: Maybe) -> tuple[Maybe, ...]:
    total, weight, bias = ctx.saved_tensors
    if dout is None:
        dx = None if dtotal is None else dtotal.to(ctx.dtype)
        return dx, None, None, dtotal if ctx.residual else None, None, None
    results = norm_backward(dout, dtotal, total, weight, bias, ctx.kind, ctx.eps)
    dsum, dx, dweight, dbias = results
    if ctx.dtype == dsum.dtype:
        dx = dsum.clone() if ctx.residual else dsum
    return dx, dweight, None if bias is None else dbias, dsum if ctx.residual else None, None, None


norm.gradient(_norm_gradient, _norm_setup)
norm_backward.last_derivative()
norm.vmapped(folded(norm, ["x", "residual"]))
norm_backward.vmapped(looped(norm_backward))
for op in (norm, norm_backward):
    op.multiply_adds(lambda *args: 0)  # as torch counts its own


# ---- convolution: x (B, L, E), weight (E, K), bias (E) or None -> (B, L, E) --------------------------------


def _conv1d(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, reverse: bool) -> Tensor:
    x, weight, bias = _dense([x, weight, bias])
    out = empty(x)
    x_, weight_, bias_, out_ = _exported([x, weight, bias, out])
    _core.conv1d_forward(x_, weight_, bias_, silu, reverse, out_, place(out))
    return out


def _conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, silu: bool, reverse: bool
) -> tuple[Tensor, ...]:
    dout, x, weight, bias = _dense([dout, x, weight, bias])
    dx, dweight, dbias = _fresh([x, weight, bias])
    x_, weight_, bias_ = _exported([x, weight, bias])
    arguments = [*_exported([dout, dx, dweight, dbias]), place(x)]
    _core.conv1d_backward(x_, weight_, bias_, silu, reverse, *arguments)
    return _present([dx, dweight, dbias], x)


conv1d = operator(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
    _conv1d,
    lambda x, weight, bias, silu, reverse: empty(x),
)
conv1d_backward = operator(
    "causal_conv1d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
    _conv1d_backward,
    lambda dout, x, weight, bias, silu, reverse: _present(
        [empty(x), empty(weight), None if bias is None else empty(bias)], x
    ),
)


def _conv1d_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv1d_gradient(ctx: Any, needed: Any, dout: Maybe) -> tuple[Maybe, ...]:
    x, weight, bias = ctx.saved_tensors
    if dout is None:
        return None, None, None, None, None
    results = conv1d_backward(dout, x, weight, bias, ctx.silu, ctx.reverse)
    return (*_where([x, weight, bias], results), None, None)


conv1d.gradient(_conv1d_gradient, _conv1d_setup)
conv1d_backward.last_derivative()
conv1d.vmapped(folded(conv1d, ["x"]))
conv1d_backward.vmapped(looped(conv1d_backward))
conv1d.multiply_adds(lambda x, weight, *args: x[0] * x[1] * weight[0] * weight[1])
conv1d_backward.multiply_adds(lambda dout, x, weight, *args: 2 * x[0] * x[1] * weight[0] * weight[1])


# ---- scan: u, delta, A, B, C, then D, z, delta_bias or None -> out (B, L, E) -------------------------------

_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"


def _scan(*args: Any) -> Tensor:
    *inputs, softplus, reverse = args
    inputs = _dense(inputs)
    out = empty(inputs[0])
    _core.selective_scan_forward(_exported(inputs), softplus, reverse, exported(out), place(out))
    return out


def _scan_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, softplus, reverse = args
    dout, *inputs = _dense([dout, *inputs])
    gradients = _fresh(inputs)
    out = empty(dout)
    inputs_, gradients_, (out_, dout_) = _exported(inputs), _exported(gradients), _exported([out, dout])
    _core.selective_scan_backward(inputs_, softplus, reverse, out_, dout_, gradients_, place(out))
    return _present(gradients, out)


selective_scan = operator(
    f"selective_scan({_SCAN}, bool delta_softplus, bool reverse) -> Tensor", _scan, lambda u, *args: empty(u)
)
selective_scan_backward = operator(
    f"selective_scan_backward(Tensor dout, {_SCAN}, bool delta_softplus, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward,
    lambda dout, *args: _present([None if t is None else empty(t) for t in args[:8]], args[0]),
)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradient(ctx: Any, needed: Any, dout: Maybe) -> tuple[Maybe, ...]:
    inputs = ctx.saved_tensors
    if dout is None:
        return (None,) * 10
    results = selective_scan_backward(dout, *inputs, ctx.softplus, ctx.reverse)
    return (*_where(inputs, results), None, None)


selective_scan.gradient(_scan_gradient, _scan_setup)
selective_scan_backward.last_derivative()
selective_scan.vmapped(folded(selective_scan, ["u", "delta", "B", "C", "z"]))
selective_scan_backward.vmapped(looped(selective_scan_backward))
selective_scan.multiply_adds(lambda u, delta, A, *args: 4 * u[0] * u[1] * A[0] * A[1])
selective_scan_backward.multiply_adds(lambda dout, u, delta, A, *args: 8 * u[0] * u[1] * A[0] * A[1])


# ---- both scans: z (B, L, E), then u, q, A_log, D, dt_weight, dt_bias, forward then reverse -> (B, L, E) ---


def _xz(z: Tensor) -> Tensor:
    xz = z.new_zeros(*z.shape[:2], 2 * z.shape[2])
    xz[:, :, z.shape[2] :] = z
    return xz


def _state_shape(z: Tensor, inputs: Sequence[Tensor], chunk: int, save: bool) -> tuple[Any, ...]:
    batch, length, inner = z.shape
    return batch, (length + chunk - 1) // chunk if save else 0, inputs[2].shape[1], inner


def _both_fake(
    z: Tensor, inputs: Sequence[Tensor], scale: float, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _state_shape(z, inputs, chunk, save)
    return empty(z), empty(z, shape, wide(z.dtype)), empty(z, shape, wide(z.dtype))


def _both(
    z: Tensor, inputs: Sequence[Tensor], scale: float, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, and the states at the beginnings of chunks of either direction, with `save`."""
    inputs = _dense(inputs)
    out, *states = _both_fake(z, inputs, scale, chunk, save)
    values = _exported(inputs)
    outputs = [[exported(state) if save else None] for state in states]
    xz = _xz(z)
    _core.scan_forward(
        exported(xz), [values[:6], values[6:]], outputs, scale, chunk, exported(out), place(out)
    )
    return out, states[0], states[1]


def _both_backward(
    dout: Tensor,
    z: Tensor,
    inputs: Sequence[Tensor],
    first: Tensor,
    second: Tensor,
    scale: float,
    chunk: int,
) -> list[Tensor]:
    """-> gradients of z and of all inputs."""
    dout, first, second, *inputs = _dense([dout, first, second, *inputs])
    gradients = [_zeros(t) for t in inputs]
    xz = _xz(z)
    dxz, out = _zeros(xz), empty(dout)
    passes = [_exported([first, *gradients[:6]]), _exported([second, *gradients[6:]])]
    values = [_exported(inputs[:6]), _exported(inputs[6:])]
    arguments = [*_exported([out, dout, dxz]), place(out)]
    _core.scan_backward(exported(xz), values, passes, scale, chunk, *arguments)
    return [dxz[:, :, z.shape[2] :].contiguous(), *gradients]


bidirectional_scan = operator(
    "bidirectional_scan(Tensor z, Tensor[] inputs, float scale, int chunk, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    _both,
    _both_fake,
)
bidirectional_scan_backward = operator(
    "bidirectional_scan_backward(Tensor dout, Tensor z, Tensor[] inputs, Tensor first, Tensor second,"
    " float scale, int chunk) -> Tensor[]",
    _both_backward,
    lambda dout, z, inputs, *args: [empty(z), *[empty(t) for t in inputs]],
)


def _both_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, values, ctx.scale, ctx.chunk, _ = inputs
    ctx.save_for_backward(z, output[1], output[2], *values)
    ctx.mark_non_differentiable(output[1], output[2])


def _both_gradient(ctx: Any, needed: Any, dout: Maybe, *states: Maybe) -> tuple[Any, ...]:
    z, first, second, *inputs = ctx.saved_tensors
    if dout is None:
        return None, [None] * len(inputs), None, None, None
    dz, *gradients = bidirectional_scan_backward(dout, z, inputs, first, second, ctx.scale, ctx.chunk)
    return dz, gradients, None, None, None


def _both_macs(z: Any, inputs: Any, *args: Any) -> Any:
    scans = 4 * inputs[2][0] * inputs[2][1] + 4 * inputs[8][0] * inputs[8][1]
    steps = inputs[4][0] * inputs[4][1] + inputs[10][0] * inputs[10][1]
    return z[0] * z[1] * (scans + steps)


bidirectional_scan.gradient(_both_gradient, _both_setup)
bidirectional_scan_backward.last_derivative()
bidirectional_scan.vmapped(folded(bidirectional_scan, ["z"], lists=(0, 1, 6, 7)))
bidirectional_scan_backward.vmapped(looped(bidirectional_scan_backward))
bidirectional_scan.multiply_adds(_both_macs)
bidirectional_scan_backward.multiply_adds(lambda dout, z, inputs, *args: 2 * _both_macs(z, inputs))
