# SPDX-License-Identifier: Apache-2.0
"""The differentiable pieces of Vision Mamba, channel-last, over the C++ core.

Sizes: B batch, L tokens, D width, E inner width, N state, R rank of dt, K convolution width. The
activations (x, u, delta, B, C, q, z and the result) and their gradients are of one type: float32, float64 or
bfloat16 on the CPU (the latter where the processor has a unit for it, see `vimcore doctor`), float32,
bfloat16 or float16 on CUDA. The others are float64 beside float64, else float32. `torch.autocast` converts.
Arrays of other libraries on a CUDA device (CuPy, ...) are taken without a copy. What does not fit is a
ValueError that names the argument. Second derivatives are an error.

They are operators of torch as well (`torch.ops.vimcore`): torch.compile, torch.export, torch.func and FLOP
counters follow them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core
from .autograd import network_operator as network_operator  # for who loads what was exported
from .autograd import operators
from .autograd.block import block, block_parameters
from .autograd.checks import is_followed, refuse_layout, refuse_tracing, refuse_wrapped
from .autograd.tensors import (
    NAMES,
    activation_types,
    autocast_type,
    describe,
    from_device,
    no_half,
    on_cuda,
    require_unit,
    wide,
)
from .autograd.traced_flops import fvcore_handles
from .utils.compiling import constant_result

__all__ = [
    "bidirectional_scan",
    "causal_conv1d",
    "fvcore_handles",
    "layer_norm",
    "rms_norm",
    "selective_scan",
    "vim_block",
]


# Arguments that may be of a 16-bit type; the others are float32 then.
_ACTIVATIONS = ("x", "u", "delta", "B", "C", "q", "z")


def _checked(op: str, tensors: Mapping[str, Tensor | None]) -> list[Any]:
    """The tensors; the first one, an activation, says which type and device all must have."""
    if torch.compiler.is_compiling():
        return [_converted(name, tensor) for name, tensor in tensors.items()]  # operators check as they run
    out: list[Any] = []
    types: tuple[torch.dtype, ...]
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    refuse_tracing(op)
    for name, value in tensors.items():
        tensor = from_device(value)
        if tensor is None:
            out.append(None)
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"[{op}] {name}: expected a tensor, got {describe(tensor)}")
        refuse_wrapped(op, [name], [tensor])
        if not is_followed():
            refuse_layout(op, name, tensor)
        activation = name.split()[0] in _ACTIVATIONS
        autocast = autocast_type(tensor)
        if autocast is not None and tensor.is_floating_point():
            tensor = tensor.to(autocast if activation else wide(tensor.dtype))
        if dtype is None:
            types = activation_types(tensor)
            dtype, device = tensor.dtype, tensor.device
        else:
            types = (dtype if activation else wide(dtype),)
        if tensor.dtype not in types or tensor.device != device or tensor.is_meta:
            wanted = " or ".join(NAMES[t] for t in types)
            place = "the cpu or cuda" if tensor.is_meta else device
            raise ValueError(
                f"[{op}] {name}: expected a {wanted} tensor on {place}, got {describe(tensor)}"
                f"{no_half(tensor.dtype) if activation and not on_cuda(tensor) else ''}"
            )
        if activation and not on_cuda(tensor):
            require_unit(f"[{op}] {name}", tensor.dtype)
        out.append(tensor)
    return out


def _converted(name: str, tensor: Tensor | None) -> Tensor | None:
    """As autocast wants it."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    autocast = autocast_type(tensor)
    if autocast is None:
        return tensor
    return tensor.to(autocast if name.split()[0] in _ACTIVATIONS else wide(tensor.dtype))


def _saves(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _rank(op: str, name: str, tensor: Tensor | None, rank: int, shape: str) -> None:
    if tensor is not None and tensor.ndim != rank:
        raise ValueError(f"[{op}] {name}: expected {shape}, got {describe(tensor)}")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """The selective state-space recurrence (paper, sections 3.1 and 3.4).

    With d = delta + delta_bias, or its softplus:
    h[t] = exp(d A) h[t-1] + d u B;  y = C h + D u;  out = y silu(z).

    Args:
        u, delta: (B, L, E).
        A: (E, N), negative for a stable recurrence.
        B, C: (B, L, N).
        D, delta_bias: (E), or None for zero.
        z: gate (B, L, E), or None for no gate.
        reverse: run from the last token to the first.

    Returns:
        (B, L, E).
    """
    op = "selective_scan"
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors = _checked(op, named)
    _rank(op, "u", u, 3, "(B, L, E)")
    _rank(op, "A", A, 2, "(E, N)")
    out: Tensor = operators.selective_scan(*tensors, delta_softplus, reverse)
    return out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
) -> Tensor:
    """Depthwise convolution over each token and those before it, or after it with `reverse` (algorithm 1).

    Args:
        x: (B, L, E).
        weight: (E, K); weight[:, K-1] is the token's own.
        bias: (E) or None.
        activation: "silu" or None.

    Returns:
        (B, L, E).
    """
    op = "causal_conv1d"
    if activation not in ("silu", None):
        raise ValueError(f"[{op}] activation: expected 'silu' or None, got {activation!r}")
    x, weight, bias = _checked(op, {"x": x, "weight": weight, "bias": bias})
    _rank(op, "x", x, 3, "(B, L, E)")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"[{op}] weight: expected ({x.shape[2]}, K), got {describe(weight)}")
    out: Tensor = operators.conv1d(x, weight, bias, activation == "silu", reverse)
    return out


def _norm(
    op: str, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    x, weight, bias, residual = _checked(op, {"x": x, "weight": weight, "bias": bias, "residual": residual})
    if x.ndim == 0 or tuple(weight.shape) != tuple(x.shape[-1:]):
        raise ValueError(f"[{op}] weight: expected {tuple(x.shape[-1:])}, got {describe(weight)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"[{op}] residual: expected {describe(x)}, got {describe(residual)}")
    rows = (1, -1 if x.numel() else 0, x.shape[-1])
    rest = None if residual is None else residual.reshape(rows)
    out, total = operators.norm(x.reshape(rows), weight, bias, rest, kind, eps)
    return out.view(x.shape) if residual is None else (out.view(x.shape), total.view(x.shape))


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * s / sqrt(mean(s^2) + eps) over the last axis, s = x + residual.

    Args:
        x, residual: (..., D); residual may be None.
        weight: (D).

    Returns:
        The normalised tensor (..., D); with a residual, also s (..., D).
    """
    return _norm("rms_norm", "rms", x, weight, None, residual, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * (s - mean(s)) / sqrt(var(s) + eps) + bias over the last axis, s = x + residual.

    Shapes and result as in `rms_norm`; bias (D) or None.
    """
    return _norm("layer_norm", "layer", x, weight, bias, residual, eps)


def bidirectional_scan(
    z: Tensor,
    u: Sequence[Tensor],
    q: Sequence[Tensor],
    A_log: Sequence[Tensor],
    D: Sequence[Tensor],
    dt_weight: Sequence[Tensor],
    dt_bias: Sequence[Tensor],
    average: bool = True,
    memory: str = "lean",
) -> Tensor:
    """Both scans of a block with time-step projection, skip, sum and gate (paper, algorithm 1).

    Each direction: q = [dt | B | C], d = softplus(dt_weight dt + dt_bias), A = -exp(A_log), y as in
    `selective_scan`. out = (y_forward + y_reverse) silu(z), halved with `average`.

    Args:
        z: gate (B, L, E).
        u, q, A_log, D, dt_weight, dt_bias: pairs, the forward and the reverse direction: (B, L, E),
            (B, L, R + 2N), (E, N), (E), (E, R), (E).
        memory: tokens between the states that backward starts from again: 64 for "lean" (and "least"),
            16 for "fast".

    Returns:
        (B, L, E).
    """
    op = "bidirectional_scan"
    pairs = {"u": u, "q": q, "A_log": A_log, "D": D, "dt_weight": dt_weight, "dt_bias": dt_bias}
    for name, pair in pairs.items():
        if isinstance(pair, Tensor) or len(pair) != 2:
            raise ValueError(f"[{op}] {name}: expected a pair (forward, reverse), got {describe(pair)}")
    named: dict[str, Tensor | None] = {"z": z}
    for index, direction in enumerate(("forward", "reverse")):
        named.update({f"{name} ({direction})": pair[index] for name, pair in pairs.items()})
    tensors = _checked(op, named)
    _rank(op, "z", z, 3, "(B, L, E)")
    for pair_index in range(2):
        _rank(op, "A_log", A_log[pair_index], 2, "(E, N)")
    scale, chunk = 0.5 if average else 1.0, _chunk(memory)
    out: Tensor = operators.bidirectional_scan(tensors[0], tensors[1:], scale, chunk, _saves(tensors))[0]
    return out


@constant_result
def _chunk(memory: str) -> int:
    return _core.Saved.chunk(memory)


def vim_block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    residual: Tensor | None = None,
    *,
    directions: str = "ssm_conv",
    average_directions: bool = True,
    norm: str = "rms",
    norm_eps: float = 1e-5,
    reverse: bool = False,
    memory: str = "lean",
) -> tuple[Tensor, Tensor]:
    """One Vim block: add, norm, in_proj, both scans, out_proj (paper, algorithm 1).

    Sizes follow from the parameters.

    Args:
        x: (B, L, D), the previous block's output.
        parameters: by the authors' names: `dict(model.layers[0].named_parameters())`.
        residual: (B, L, D) or None.
        directions: "none", "ssm" or "ssm_conv".
        average_directions: halve the sum ("ssm_conv" only).
        norm, norm_eps: "rms" or "layer".
        reverse: with directions="none": from the last token to the first.
        memory: "least", "lean" or "fast", see `VisionMamba`.

    Returns:
        (out, residual + x), both (B, L, D); the next block, or the final norm, adds the two.
    """
    op = "vim_block"
    if directions not in ("none", "ssm", "ssm_conv"):
        raise ValueError(f"[{op}] directions: expected 'none', 'ssm' or 'ssm_conv', got {directions!r}")
    if reverse and directions != "none":
        raise ValueError(f"[{op}] reverse: only with directions='none', got directions={directions!r}")
    _rank(op, "x", x, 3, "(B, L, D)")
    for name in ("mixer.A_log", "mixer.conv1d.weight", "mixer.dt_proj.weight", "norm.weight"):
        if name not in parameters:
            raise ValueError(f"[{op}] parameters: {name} is missing")
    inner, state = parameters["mixer.A_log"].shape
    dim = parameters["norm.weight"].shape[0]
    if x.shape[1] == 0 or dim == 0 or x.shape[2] != dim or inner % dim:
        raise ValueError(
            f"[{op}] x: expected (B, L, D) with L > 0 and D a divisor of {inner}, got {describe(x)}"
        )
    sizes = (dim, inner // dim, state, *(parameters[n].shape[-1] for n in _WIDTHS))
    options = (directions, average_directions, norm, norm_eps, "mixer.gamma" in parameters)
    config, names = _block_config(sizes, options)
    ordered = block_parameters(names, parameters)
    x, residual, *tensors = _checked(op, {"x": x, "residual": residual, **ordered})
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"[{op}] residual: expected {describe(x)}, got {describe(residual)}")
    save = _saves([x, residual, *tensors])
    out, total, _ = block(x, residual, tensors, config, reverse, memory, save)
    return out, total


_WIDTHS = ("mixer.conv1d.weight", "mixer.dt_proj.weight")


@constant_result
def _block_config(sizes: tuple[int, ...], options: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    """What the operator is told, and names of the parameters."""
    return _cached_config(sizes, options)


@functools.lru_cache(256)
def _cached_config(sizes: tuple[int, ...], options: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    dim, expand, state, width, rank = sizes
    directions, average, norm, eps, scaled = options
    config = _core.Config(
        embed_dim=dim,
        expand=expand,
        d_state=state,
        d_conv=width,
        dt_rank=rank,
        directions=directions,
        average_directions=average,
        norm=norm,
        norm_eps=eps,
        layer_scale=1.0 if scaled else None,
    )
    return config.to_json(), tuple(config.block_shapes())
