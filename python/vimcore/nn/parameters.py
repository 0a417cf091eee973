# SPDX-License-Identifier: Apache-2.0
"""The modules that hold the parameters of `VisionMamba`, with the published initialisation.

The network is one call of the core and calls none of them, unless hooks, adapters or other modules want it
layer by layer (`layerwise`): then a layer is one operator, or pieces where something hangs in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._core import Config
from ..positions import rope_tables
from ..utils.compiling import constant_result
from .structure import Made, as_built, made


def trunc_normal(tensor: Tensor, std: float) -> None:
    """Normal values of deviation std, cut at -2 and 2."""
    nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0)


def empty(kind: Any, *args: Any, **options: Any) -> Any:
    """A module whose parameters are not set yet, on torch's default device."""
    module = kind(*args, **options, device="meta")
    for name, parameter in module.named_parameters():
        # not by torch.nn.utils.skip_init, which imports sympy, for a third of a second
        setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    return module


def uniform(module: Any, fan_in: int) -> Any:
    """The module, with weight and bias drawn from (-1, 1) / sqrt(fan_in)."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
    return module


class PatchEmbed(nn.Module):
    """Holds `proj`, the convolution that makes tokens of patches; of clips, frame by frame, a Conv3d."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, dim, patch, stride = config.in_chans, config.embed_dim, config.patch_size, config.stride
        if config.frames:
            self.proj = empty(nn.Conv3d, channels, dim, (1, patch, patch), (1, stride, stride))
        else:
            self.proj = empty(nn.Conv2d, channels, dim, patch, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Patches (B, J, D) of images (B, C, H, W), of clips those of the frames in order."""
        patches: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return patches


class Scale(nn.Module):
    """Holds the weight, and for LayerNorm the bias, of a normalisation."""

    def __init__(self, dim: int, norm: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        if norm == "layer":
            self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum of x and residual (..., D), normalised."""
        bias = getattr(self, "bias", None)
        if bias is None:
            found = ops.rms_norm(x, self.weight, residual, self.eps)
        else:
            found = ops.layer_norm(x, self.weight, bias, residual, self.eps)
        return found[0] if isinstance(found, tuple) else found


def normalised(norm: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """By a module of ours, which adds in wide types, or by another, which gets the sum."""
    if type(norm) is Scale and residual is not None:
        found: Tensor = norm(x, residual)
    else:
        found = norm(x if residual is None else residual + x)
    return found


class Rope(nn.Module):
    """Holds the rotation tables of the authors' files; the core computes its own."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens (B, L, D) turned by tables (J, D); a class token at the head passes."""
        skip = x.shape[1] - cos.shape[0]
        rest = x[:, skip:]
        turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(-2)
        return torch.cat([x[:, :skip], (rest * cos + turned * sin).to(x.dtype)], 1)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for name, table in zip(("freqs_cos", "freqs_sin"), rope_tables(config)):
            self.register_buffer(name, table.to(torch.get_default_device(), torch.get_default_dtype()))

    def fill(self, config: dict[str, Any]) -> None:
        """Replaces the tables by those of another configuration."""
        for name, table in zip(("freqs_cos", "freqs_sin"), rope_tables(config)):
            setattr(self, name, table.to(self._buffers[name]))

    def faults(self, config: dict[str, Any]) -> list[str]:
        """Which tables are not those of the configuration, be they rounded to 16 bits."""
        found = []
        for name, table in zip(("freqs_cos", "freqs_sin"), rope_tables(config)):
            value = self._buffers.get(name)
            if value is None or value.shape != table.shape:
                got = "none" if value is None else tuple(value.shape)
                found.append(f"rope.{name}: expected {tuple(table.shape)}, got {got}")
            elif not value.is_meta and not (value.detach().cpu().double() - table).abs().max() < 4e-3:
                found.append(f"rope.{name}: not the rotation of rope_grid={config['rope_grid']}")
        return found


class CausalConv1d(nn.Conv1d):
    """Holds a depthwise convolution over each token and those before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Channels first as in torch, and as long as the input: (B, E, L) of (B, E, L)."""
        y = ops.causal_conv1d(x.transpose(1, 2), self.weight.squeeze(1), self.bias, activation=None)
        return y.transpose(1, 2)


class Facts(NamedTuple):
    """What a layer or mixer must know when it is called, in plain values."""

    directions: str  # "none", "ssm" or "ssm_conv"
    average: bool
    norm: str
    eps: float
    split: tuple[int, int, int]  # of q: R, N, N
    names: tuple[str, ...]  # of the parameters
    plain: tuple[str, ...]  # child modules to which nothing was done


class _Part(nn.Module):
    """A module that looks at itself before it computes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self._made: Made = {}

    @constant_result
    def _facts(self) -> Facts:
        c = self._config
        plain = []
        for name, child in self.named_children():
            own = {path: kind for path, kind in self._made.items() if path.split(".")[0] == name}
            if name != "parametrizations" and as_built(nn.ModuleDict({name: child}), own):
                plain.append(name)
        two = c.directions in ("ssm", "ssm_conv")
        return Facts(
            c.directions if two else "none",
            c.average_directions and c.directions == "ssm_conv",
            c.norm,
            c.norm_eps,
            (c.dt_rank, c.d_state, c.d_state),
            tuple(c.block_shapes()),
            tuple(plain),
        )


class Mixer(_Part):
    """Holds the parameters of one bidirectional mixer (paper, section 3.3)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        dim, state, width = config.embed_dim, config.d_state, config.d_conv
        inner, rank = config.inner, config.dt_rank
        both, own = config.two_directions, config.directions == "ssm_conv"
        if config.layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((dim,), float(config.layer_scale)))
        log_state = torch.arange(1, state + 1, dtype=torch.float64).log().to(torch.get_default_dtype())
        self.A_log = nn.Parameter(log_state.repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        if both:
            self.A_b_log = nn.Parameter(log_state.repeat(inner, 1))
        if own:
            self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = uniform(empty(nn.Linear, dim, 2 * inner, bias=False), dim)
        self._add_direction("", inner, rank, state, width)
        if own:
            self._add_direction("_b", inner, rank, state, width)
        self.out_proj = uniform(empty(nn.Linear, inner, dim, bias=False), inner)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.depth)
        self._made = made(self)

    def forward(self, v: Tensor, memory: str = "lean") -> Tensor:
        """Tokens (B, L, D) of normalised ones, piece by piece: modules in it that do more are called."""
        facts = self._facts()
        x, z = self.in_proj(v).chunk(2, -1)
        ways = [self._inputs(facts, "", x, False)]
        suffixes = [""]
        if facts.directions == "ssm_conv":
            ways.append(self._inputs(facts, "_b", x, True))
            suffixes.append("_b")
        elif facts.directions == "ssm":  # all but A is shared, the convolution stays causal
            ways, suffixes = ways * 2, ["", ""]
        logs = [self.A_log, self.A_b_log] if len(ways) == 2 else [self.A_log]
        skips = [getattr(self, f"D{s}") for s in suffixes]
        steps = [getattr(self, f"dt_proj{s}") for s in suffixes]
        if len(ways) == 2 and all(f"dt_proj{s}" in facts.plain for s in suffixes):
            u, q = zip(*ways)
            weights, biases = [step.weight for step in steps], [step.bias for step in steps]
            y = ops.bidirectional_scan(z, u, q, logs, skips, weights, biases, facts.average, memory)
        else:
            y = _summed(ways, facts.split, logs, skips, steps)
            y = (y / 2 if facts.average else y) * F.silu(z)
        out: Tensor = self.out_proj(y)
        gamma = getattr(self, "gamma", None)
        return out if gamma is None else (out * gamma).to(out.dtype)

    def _inputs(self, facts: Facts, suffix: str, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """u (B, L, E) and q (B, L, R + 2N) of one direction; x (B, L, E)."""
        conv, proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}")
        if f"conv1d{suffix}" in facts.plain:
            u = ops.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, reverse=reverse)
        else:
            x = x.flip(1) if reverse else x
            u = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
            u = u.flip(1) if reverse else u
        return u, proj(u)

    def _add_direction(self, suffix: str, inner: int, rank: int, state: int, width: int) -> None:
        conv = empty(CausalConv1d, inner, inner, width, groups=inner, padding=width - 1)
        self.add_module(f"conv1d{suffix}", uniform(conv, width))
        x_proj = empty(nn.Linear, inner, rank + 2 * state, bias=False)
        self.add_module(f"x_proj{suffix}", uniform(x_proj, inner))
        dt_proj = uniform(empty(nn.Linear, rank, inner), rank)
        self.add_module(f"dt_proj{suffix}", dt_proj)
        if suffix:  # as published: only the forward direction spreads its time steps
            nn.init.zeros_(dt_proj.bias)
            return
        low, high = math.log(0.001), math.log(0.1)
        step = (torch.rand(inner) * (high - low) + low).exp().clamp(min=1e-4)
        with torch.no_grad():
            dt_proj.bias.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is `step`


def _summed(
    ways: Sequence[tuple[Tensor, Tensor]],
    split: Sequence[int],
    logs: Sequence[Tensor],
    skips: Sequence[Tensor],
    steps: Sequence[nn.Module],
) -> Tensor:
    """Scans of both directions without gate, one by one, whose time steps modules compute."""
    total: Tensor | None = None
    for k, ((u, q), log, skip, step) in enumerate(zip(ways, logs, skips, steps)):
        low, B, C = q.split(split, -1)
        delta = step(low)
        y = ops.selective_scan(u, delta, -log.exp(), B, C, skip, delta_softplus=True, reverse=k == 1)
        total = y if total is None else total + y
    assert total is not None
    return total


class Layer(_Part):
    """Holds one block: `mixer` and `norm`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mixer = Mixer(config)
        self.norm = Scale(config.embed_dim, config.norm, config.norm_eps)
        self._made = made(self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, memory: str = "lean"
    ) -> tuple[Tensor, Tensor]:
        """(mixer output, residual + x), both (B, L, D), of the output and the residual before this layer.

        One operator; in pieces where a module in it has hooks or stands in the place of another.
        """
        facts = self._facts()
        if len(facts.plain) == 2:
            parameters = {name: _parameter(self, name) for name in facts.names}
            return ops.vim_block(
                x, parameters, residual, directions=facts.directions, average_directions=facts.average,
                norm=facts.norm, norm_eps=facts.eps, memory=memory,
            )  # fmt: skip
        v = normalised(self.norm, x, residual)
        ours = type(self.mixer) is Mixer and "forward" not in vars(self.mixer)
        own = {"memory": memory} if ours else {}
        return self.mixer(v, **own), x.to(_sum_type(x)) if residual is None else residual + x


def equip(model: nn.Module, config: Config, built: Made) -> None:
    """Gives modules what they must know to be called, where they lack it.

    Args:
        built: what the submodules were when the network was built.
    """
    for path, module in model.named_modules():
        if type(module) is Scale:
            module.eps = config.norm_eps
        elif isinstance(module, _Part) and "_config" not in vars(module):
            begin = f"{path}."
            module._config = config
            module._made = {
                at.removeprefix(begin): kind for at, kind in built.items() if at.startswith(begin)
            }


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parameter(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found
