# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba step by step as the published code runs it: a peer of the GPU benchmark.

The same operations and memory traffic in plain torch: activations are channel-major (B, E, L), the reverse
direction works on a flipped copy and its output is flipped back, B and C are copied, x_proj and out_proj read
transposed copies, and each direction is gated by itself. The scan is mamba-ssm's `selective_scan_cuda` and
the convolution `causal_conv1d_cuda` where those extensions are importable and the tensors are on a GPU; the
residual add and the norm are one Triton kernel there, as in the original. Elsewhere, and for what is missing,
plain torch stands in: `kernels` says what is used. Weights are cast once to the activation type, where
autocast would do so at every step: that is in the peer's favour.

State-dict keys are the authors', so the weights of `vimcore.VisionMamba` load directly. Inference only,
but for the scan on its own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"tiny": 192, "small": 384, "base": 768}
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


def scan(
    u: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """u, delta, z (B, E, L), A (E, N), Bm, Cm (B, 1, N, L), D, bias (E) -> gated output (B, E, L)."""
    module = _extension("selective_scan_cuda", u)
    if module is not None:
        gated: Tensor = module.fwd(u, delta, A, Bm, Cm, D, z, bias, True)[2]
        return gated
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
    return ((y + D.unsqueeze(1) * u) * F.silu(z)).to(kind)


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


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of the causal depthwise convolution: x (B, E, L), weight (E, K), bias (E) -> (B, E, L)."""
    module = _extension("causal_conv1d_cuda", x)
    if module is not None:
        out = torch.empty_like(x)
        module.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        return out
    width = weight.shape[1]
    out = F.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=weight.shape[0])
    return F.silu(out[..., : x.shape[2]])


@functools.cache
def _triton_norm() -> Any:
    """The kernel of `add_norm`: one program a row."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(h, residual, weight, total, out, width, eps, HAS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        row = tl.program_id(0).to(tl.int64) * width
        at = tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(h + row + at, mask=inside, other=0.0).to(tl.float32)
        if HAS:
            x += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row + at, x, mask=inside)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
        w = tl.load(weight + at, mask=inside).to(tl.float32)
        tl.store(out + row + at, x * scale * w, mask=inside)

    return kernel


def add_norm(h: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h + residual) in h's type, h + residual in the type of weight); h, residual (B, L, D)."""
    if _extension("triton", h):
        h, width = h.contiguous(), h.shape[-1]
        total, out = torch.empty_like(h, dtype=torch.float32), torch.empty_like(h)
        r, block = h if residual is None else residual, 1 << (width - 1).bit_length()
        _triton_norm()[(h.numel() // width,)](
            h, r, weight, total, out, width, EPS, residual is not None, block
        )
        return out, total
    total = h.to(weight.dtype) if residual is None else h.to(weight.dtype) + residual
    return F.rms_norm(total, weight.shape, weight, EPS).to(h.dtype), total


class Weight(nn.Module):
    """Holds a weight, and a bias where there is one."""

    def __init__(self, *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
        if bias:
            self.bias = nn.Parameter(torch.zeros(bias))


class Mixer(nn.Module):
    """The bidirectional mixer: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, state: int, kernel: int) -> None:
        super().__init__()
        inner, rank = 2 * width, -(-width // 16)
        self.rank, self.state = rank, state
        steps = torch.arange(1, state + 1).log().repeat(inner, 1)
        self.A_log, self.A_b_log = nn.Parameter(steps), nn.Parameter(steps.clone())
        self.D, self.D_b = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        self.in_proj = Weight(2 * inner, width)
        self.out_proj = Weight(width, inner)
        for suffix in ("", "_b"):
            self.add_module("conv1d" + suffix, Weight(inner, 1, kernel, bias=inner))
            self.add_module("x_proj" + suffix, Weight(rank + 2 * state, inner))
            self.add_module("dt_proj" + suffix, Weight(inner, rank, bias=inner))

    def direction(self, xz: Tensor, suffix: str) -> Tensor:
        """One direction on xz (B, 2E, L), from the first token to the last -> (B, E, L)."""
        conv1d, x_proj, dt_proj = (getattr(self, n + suffix) for n in ("conv1d", "x_proj", "dt_proj"))
        x, z = xz.chunk(2, 1)
        u = conv(x, conv1d.weight.squeeze(1), conv1d.bias)
        batch, inner, length = u.shape
        q = F.linear(u.transpose(1, 2).reshape(batch * length, inner), x_proj.weight)  # a transposed copy
        dt, Bm, Cm = q.split([self.rank, self.state, self.state], 1)
        delta = (dt_proj.weight @ dt.t()).view(inner, batch, length).transpose(0, 1)
        Bm, Cm = (t.view(batch, length, -1).transpose(1, 2).unsqueeze(1).contiguous() for t in (Bm, Cm))
        A = -torch.exp(self.A_b_log if suffix else self.A_log)
        return scan(u, delta, A, Bm, Cm, self.D_b if suffix else self.D, z, dt_proj.bias)

    def forward(self, v: Tensor) -> Tensor:
        batch, length, width = v.shape
        xz = self.in_proj.weight @ v.reshape(batch * length, width).t()  # (2E, B L)
        xz = xz.view(-1, batch, length).transpose(0, 1)
        out = self.direction(xz, "") + self.direction(xz.flip(2), "_b").flip(2)
        return F.linear(out.transpose(1, 2) / 2, self.out_proj.weight)


class Layer(nn.Module):
    """Residual add, RMSNorm, mixer."""

    def __init__(self, width: int, state: int = 16, kernel: int = 4) -> None:
        super().__init__()
        self.mixer = Mixer(width, state, kernel)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        v, residual = add_norm(h, residual, self.norm.weight)
        return self.mixer(v), residual

    def cast(self, dtype: torch.dtype) -> Layer:
        """Matrices and convolutions to `dtype`; A, D, the bias of dt and the norms stay as they are."""
        for name, module in self.mixer.named_children():
            module.weight.data = module.weight.data.to(dtype)
            if name.startswith("conv1d"):
                module.bias.data = module.bias.data.to(dtype)
        return self


class VimOfficial(nn.Module):
    """Images (B, 3, img_size, img_size) -> logits; middle class token, averaged directions."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 24,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = (img_size // patch_size) ** 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.patches + 1, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm_f = nn.Module()
        self.norm_f.weight = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, num_classes)

    def cast(self, dtype: torch.dtype) -> VimOfficial:
        """For activations in `dtype`; see `Layer.cast`."""
        for module in (self.patch_embed, self.head):
            module.to(dtype)
        self.cls_token.data, self.pos_embed.data = (
            self.cls_token.data.to(dtype),
            self.pos_embed.data.to(dtype),
        )
        for layer in self.layers:
            layer.cast(dtype)
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        middle = self.patches // 2
        h = (
            torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1)
            + self.pos_embed
        )
        residual = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        h, _ = add_norm(h, residual, self.norm_f.weight)
        return self.head(h[:, middle])


def build(size: str, img_size: int) -> VimOfficial:
    """The published network of vim_{tiny,small,base}_patch16."""
    return VimOfficial(img_size, width=SIZES[size])
