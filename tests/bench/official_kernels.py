# SPDX-License-Identifier: Apache-2.0
"""The kernels of the published code and their gradients: what `vim_official` is made of.

The scan is mamba-ssm's `selective_scan_cuda` and the convolution `causal_conv1d_cuda` (1.5 or later) where
these are importable and the tensors are on a GPU; residual add and norm are Triton kernels there, forward and
backward. Elsewhere, and for what is missing, plain torch stands in; `kernels` says what is used.

`Direction` keeps what the published code keeps at its first checkpoint level: xz, the weights as it used
them, q, the copies of B and C, the scan's states at chunk borders and its output before the gate. Its
backward computes the convolution and delta again. `AddNorm` keeps the residual and one statistic a row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


@functools.cache
def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _extension(name: str, like: Tensor) -> ModuleType | None:
    """The compiled module for tensors like this one; None where plain torch must do."""
    return _installed(name) if like.is_cuda and like.dtype != torch.float64 else None


def kernels(device: torch.device) -> dict[str, str]:
    """What computes scan, convolution and norm on this device."""
    modules = {"scan": "selective_scan_cuda", "conv": "causal_conv1d_cuda", "norm": "triton"}
    cuda = device.type == "cuda"
    return {part: name if cuda and _installed(name) else "torch" for part, name in modules.items()}


# ---- the scan: u, delta, z (B, E, L), A (E, N), Bm, Cm (B, 1, N, L), D, bias (E) ---------------------------


def _plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Output before and after the gate; differentiable."""
    kind, (batch, inner, length) = u.dtype, u.shape
    wide = A.dtype
    u, z, Bm, Cm = u.to(wide), z.to(wide), Bm[:, 0].to(wide), Cm[:, 0].to(wide)
    delta = F.softplus(delta.to(wide) + bias.unsqueeze(1))
    h = u.new_zeros(batch, inner, A.shape[1])
    y = torch.empty_like(u)
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * Bm[:, None, :, t]
        y[:, :, t] = (h * Cm[:, None, :, t]).sum(2)
    out = y + D.unsqueeze(1) * u
    return out.to(kind), (out * F.silu(z)).to(kind)


def _scan_forward(*arguments: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output before the gate, states at chunk borders (None in plain torch), output after the gate."""
    module = _extension("selective_scan_cuda", arguments[0])
    if module is not None:
        out, states, gated = module.fwd(*arguments, True)
        return out, states, gated
    out, gated = _plain_scan(*arguments)
    return out, None, gated


def scan(*arguments: Tensor) -> Tensor:
    """u, delta, A, Bm, Cm, D, z, bias -> output after the gate (B, E, L)."""
    return _scan_forward(*arguments)[2]


def scan_gradients(*arguments: Tensor, dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What computes the gradients of `scan`, du first, after a forward pass that is done here."""
    module = _extension("selective_scan_cuda", dout)
    if module is not None:
        out, states, _ = module.fwd(*arguments, True)
        return lambda: module.bwd(*arguments, dout, states, out, None, True, False)  # type: ignore[no-any-return]
    leaves = [t.detach().requires_grad_() for t in arguments]
    with torch.enable_grad():
        gated = scan(*leaves)
    return lambda: torch.autograd.grad(gated, leaves, dout, retain_graph=True)


def _scan_backward(
    arguments: tuple[Tensor, ...], dout: Tensor, states: Tensor | None, out: Tensor, dz: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, Bm, Cm, D and bias; that of z is written to dz."""
    module = _extension("selective_scan_cuda", dout)
    if module is not None:
        # The last argument has the gated output rebuilt: the published code asks for it and does not use it.
        found = module.bwd(*arguments, dout, states, out, dz, True, True)
        return tuple(found[:7])
    du, ddelta, dA, dB, dC, dD, found_dz, dbias = scan_gradients(*arguments, dout=dout)()
    dz.copy_(found_dz)
    return du, ddelta, dA, dB, dC, dD, dbias


# ---- the convolution: x (B, E, L), weight (E, K), bias (E) -------------------------------------------------


def _plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = weight.shape[1]
    weight, bias = weight.unsqueeze(1).to(x.dtype), bias.to(x.dtype)
    out = F.conv1d(x, weight, bias, padding=width - 1, groups=weight.shape[0])
    return F.silu(out[..., : x.shape[2]])


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of the causal depthwise convolution -> (B, E, L)."""
    module = _extension("causal_conv1d_cuda", x)
    if module is None:
        return _plain_conv(x, weight, bias)
    out = torch.empty_like(x)
    module.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
    return out


def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of x is written to dx."""
    module = _extension("causal_conv1d_cuda", x)
    if module is not None:
        dweight, dbias = (torch.zeros_like(t, dtype=torch.float32) for t in (weight, bias))
        module.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, True)
        return dweight, dbias
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        out = _plain_conv(*leaves)
    found, dweight, dbias = torch.autograd.grad(out, leaves, dout)
    dx.copy_(found)
    return dweight, dbias


# ---- one direction -----------------------------------------------------------------------------------------


def _delta(q: Tensor, dt_proj: Tensor, batch: int) -> Tensor:
    """The raw time steps (B, E, L) of q (B L, R + 2N)."""
    inner, rank = dt_proj.shape
    return (dt_proj @ q[:, :rank].t()).view(inner, batch, -1).transpose(0, 1)


class Direction(torch.autograd.Function):
    """One direction, from the first token to the last.

    xz (B, 2E, L), conv weight (E, K) and bias (E), x_proj (R + 2N, E), dt_proj (E, R), A (E, N), D and dt
    bias (E) -> gated output (B, E, L). x_proj and dt_proj are cast to the type of xz.
    """

    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
    ) -> Tensor:
        x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
        x, z = xz.chunk(2, 1)
        u = conv(x, conv_weight, conv_bias)
        batch, inner, length = u.shape
        q = F.linear(u.transpose(1, 2).reshape(batch * length, inner), x_proj)
        _, Bm, Cm = q.view(batch, length, -1).split([dt_proj.shape[1], A.shape[1], A.shape[1]], 2)
        Bm, Cm = (t.transpose(1, 2).unsqueeze(1).contiguous() for t in (Bm, Cm))
        out, states, gated = _scan_forward(u, _delta(q, dt_proj, batch), A, Bm, Cm, D, z, dt_bias)
        ctx.save_for_backward(
            xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, q, Bm, Cm, states, out
        )
        return gated

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        """In the types of the computation; autograd casts to those of the parameters."""
        xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, q, Bm, Cm, states, out = ctx.saved_tensors
        x, z = xz.chunk(2, 1)
        u = conv(x, conv_weight, conv_bias)
        batch, inner, length = u.shape
        tokens, rank, state = batch * length, dt_proj.shape[1], A.shape[1]
        arguments = (u, _delta(q, dt_proj, batch), A, Bm, Cm, D, z, dt_bias)
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, 1)
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        du, ddelta, dA, dB, dC, dD, dbias = _scan_backward(arguments, dout, states, out, dz)
        dq = torch.empty_like(q)
        dq[:, rank : rank + state] = dB.squeeze(1).transpose(1, 2).reshape(tokens, state)
        dq[:, rank + state :] = dC.squeeze(1).transpose(1, 2).reshape(tokens, state)
        ddelta = ddelta.transpose(0, 1).reshape(inner, tokens)
        dq[:, :rank] = ddelta.t() @ dt_proj
        ddt_proj = ddelta @ q[:, :rank]
        dx_proj = dq.t() @ u.transpose(1, 2).reshape(tokens, inner)
        du = du.transpose(0, 1).reshape(inner, tokens).addmm_(x_proj.t(), dq.t())
        du = du.view(inner, batch, length).transpose(0, 1)
        dconv = _conv_backward(x, conv_weight, conv_bias, du, dx)
        return dxz, *dconv, dx_proj, ddt_proj, dA, dD, dbias


# ---- residual add and norm ---------------------------------------------------------------------------------


@functools.cache
def _triton() -> tuple[Any, Any]:
    """Forward: one program a row. Backward: each takes `count` rows and sums their part of dweight."""
    import triton
    import triton.language as tl

    @triton.jit
    def forward(h, residual, weight, total, out, scales, width, eps, HAS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        index = tl.program_id(0)
        row = index.to(tl.int64) * width
        at = tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(h + row + at, mask=inside, other=0.0).to(tl.float32)
        if HAS:
            x += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row + at, x, mask=inside)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
        tl.store(scales + index, scale)
        w = tl.load(weight + at, mask=inside).to(tl.float32)
        tl.store(out + row + at, x * scale * w, mask=inside)

    @triton.jit
    def backward(  # type: ignore
        total, weight, scales, dout, dtotal, dh, dresidual, parts, rows, width, count,
        HAS: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        at = tl.arange(0, BLOCK)
        inside = at < width
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        dweight = tl.zeros([BLOCK], tl.float32)
        begin = program * count
        for index in range(begin, tl.minimum(begin + count, rows)):
            row = tl.cast(index, tl.int64) * width
            scale = tl.load(scales + index)
            normal = tl.load(total + row + at, mask=inside, other=0.0) * scale
            dy = tl.load(dout + row + at, mask=inside, other=0.0).to(tl.float32)
            dweight += dy * normal
            dy *= w
            dx = (dy - normal * (tl.sum(dy * normal, 0) / width)) * scale
            if HAS:
                dx += tl.load(dtotal + row + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dh + row + at, dx, mask=inside)
            if BOTH:
                tl.store(dresidual + row + at, dx, mask=inside)
        tl.store(parts + program * width + at, dweight, mask=inside)

    return forward, backward


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def triton_forward(h: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm(h + residual), h + residual, 1 / rms of each row; h (B, L, D)."""
    h, width = h.contiguous(), h.shape[-1]
    rows = h.numel() // width
    total, out = torch.empty_like(h, dtype=torch.float32), torch.empty_like(h)
    scales, r = total.new_empty(rows), h if residual is None else residual
    _triton()[0][(rows,)](h, r, weight, total, out, scales, width, EPS, residual is not None, _block(width))
    return out, total, scales


def triton_backward(
    total: Tensor,
    weight: Tensor,
    scales: Tensor,
    dout: Tensor,
    dtotal: Tensor | None,
    residual: bool,
    programs: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of h in the type of dout, of the residual in float32 or None, of the weight in float32."""
    dout, (rows, width) = dout.contiguous(), (scales.numel(), total.shape[-1])
    dtotal = None if dtotal is None else dtotal.contiguous()
    dh = torch.empty_like(dout)
    both = residual and dout.dtype != torch.float32
    dresidual = torch.empty_like(total) if both else dh
    parts = total.new_empty(programs, width)
    _triton()[1][(programs,)](
        total, weight, scales, dout, dout if dtotal is None else dtotal, dh, dresidual, parts,
        rows, width, -(-rows // programs), dtotal is not None, both, _block(width),
    )  # fmt: skip
    return dh, dresidual if residual else None, parts.sum(0)


class AddNorm(torch.autograd.Function):
    """h (B, L, D), residual or None, weight (D)
    -> RMSNorm(h + residual) in h's type, h + residual in the type of weight."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if _extension("triton", h):
            out, total, scales = triton_forward(h, residual, weight)
        else:
            total = h.to(weight.dtype, copy=True) if residual is None else h.to(weight.dtype) + residual
            scales = (total.square().mean(2, keepdim=True) + EPS).rsqrt()
            out = (total * scales * weight).to(h.dtype)
        ctx.save_for_backward(total, weight, scales)
        ctx.residual, ctx.kind = residual is not None, h.dtype
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dtotal: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        total, weight, scales = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(total, dtype=ctx.kind)
        if _extension("triton", dout):
            programs = torch.cuda.get_device_properties(dout.device).multi_processor_count
            return triton_backward(total, weight, scales, dout, dtotal, ctx.residual, programs)
        normal, dy = total * scales, dout.to(weight.dtype) * weight
        dsum = (dy - normal * (dy * normal).mean(2, keepdim=True)) * scales
        if dtotal is not None:
            dsum = dsum + dtotal
        dweight = (dout.to(weight.dtype) * normal).sum((0, 1))
        return dsum.to(ctx.kind), dsum if ctx.residual else None, dweight
