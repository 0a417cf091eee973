# SPDX-License-Identifier: Apache-2.0
"""The modules that hold the parameters of `VisionMamba`, with the published initialisation; no arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .._core import Config
from ..positions import rope_tables


def trunc_normal(tensor: Tensor, std: float) -> None:
    """Normal values of deviation std, cut at -2 and 2."""
    nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0)


def empty(kind: Any, *args: Any, **options: Any) -> Any:
    """A module whose parameters are not set yet, on torch's default device."""
    return skip_init(kind, *args, **options, device=torch.get_default_device())


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


class Scale(nn.Module):
    """Holds the weight, and for LayerNorm the bias, of a normalisation."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        if bias:
            self.bias = nn.Parameter(torch.zeros(dim))


class Rope(nn.Module):
    """Holds the rotation tables of the authors' files; the core computes its own."""

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


class Mixer(nn.Module):
    """Holds the parameters of one bidirectional mixer (paper, section 3.3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
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

    def _add_direction(self, suffix: str, inner: int, rank: int, state: int, width: int) -> None:
        conv = empty(nn.Conv1d, inner, inner, width, groups=inner, padding=width - 1)
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


class Layer(nn.Module):
    """Holds one block: `mixer` and `norm`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mixer = Mixer(config)
        self.norm = Scale(config.embed_dim, config.norm == "layer")
