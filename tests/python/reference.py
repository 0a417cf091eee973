# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba written for reading: plain torch operations, one loop over the tokens, gradients by autograd.

It is the oracle of the tests. It follows the published formulation with real flips of the sequence where the
library uses index arithmetic, runs in any floating type (the tests use float64), and takes the random draws
of training as explicit arguments. Parameters come as a dictionary under the state-dict keys.

Letters in shape comments: B batch, J patches, L tokens, D width, E inner width, N state, R dt rank, K conv
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass
class Config:
    """The architecture, with the names and defaults of `vimcore.VisionMamba`."""

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int | None = None
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    directions: str = "ssm_conv"
    average_directions: bool = True
    class_token: str = "middle"
    registers: int | None = None
    neck_reduction: int = 1
    pool: str = "mean"
    norm: str = "rms"
    norm_eps: float = 1e-5
    pos_embed: bool = True
    rope: bool = False
    rope_residual: bool = False
    rope_grid: int = 14
    layer_scale: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    frames: int | None = None

    @property
    def height(self) -> int:
        return self.img_size if isinstance(self.img_size, int) else self.img_size[0]

    @property
    def width(self) -> int:
        return self.img_size if isinstance(self.img_size, int) else self.img_size[1]

    @property
    def grid(self) -> tuple[int, int]:
        stride = self.stride or self.patch_size
        return (self.height - self.patch_size) // stride + 1, (self.width - self.patch_size) // stride + 1

    @property
    def patches(self) -> int:
        return (self.frames or 1) * self.grid[0] * self.grid[1]

    @property
    def class_tokens(self) -> int:
        return {"none": 0, "double": 2, "registers": self.registers}.get(self.class_token, 1)

    @property
    def readout_width(self) -> int:
        count = self.registers if self.class_token == "registers" else 1
        return count * self.embed_dim // self.neck_reduction

    @property
    def tokens(self) -> int:
        return self.patches + self.class_tokens

    @property
    def inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def rank(self) -> int:
        return -(-self.embed_dim // 16) if self.dt_rank == "auto" else int(self.dt_rank)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `vimcore.VisionMamba`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class Draws:
    """The random draws of one training forward."""

    drop_path: Tensor | None = None  # (depth, B) factor of each layer's mixer output: 0 or 1 / keep
    mask: Tensor | None = None  # (B, L, D) dropout factors after the position table
    flip: bool = False  # directions "sequence": run from the last token to the first
    class_position: int = 0  # class_token "random": where the token stands


@dataclass
class Result:
    """Outputs of one forward pass."""

    logits: Tensor  # (B, classes), (B, L, classes) for pool "all"; features without a head
    tokens: Tensor  # (B, L, D) normalised, image order
    intermediates: list[Tensor] = field(default_factory=list)  # (B, D, h, w) after each layer


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """State-dict keys and shapes of the parameters (RoPE tables are not parameters)."""
    d, e, n, r = config.embed_dim, config.inner, config.d_state, config.rank
    shapes: dict[str, tuple[int, ...]] = {}
    if config.class_token == "double":
        shapes["cls_token_head"] = shapes["cls_token_tail"] = (1, 1, d)
    elif config.class_token != "none":
        shapes["cls_token"] = (1, config.class_tokens, d)
    if config.pos_embed:
        registers = config.class_token == "registers"
        if registers:
            shapes["pos_embed_cls"] = (1, config.registers, d)
        rows = config.grid[0] * config.grid[1] + (0 if registers else config.class_tokens)
        shapes["pos_embed"] = (1, rows, d)
        if config.frames:
            shapes["temporal_pos_embedding"] = (1, config.frames, d)
    depth = (1,) if config.frames else ()
    shapes["patch_embed.proj.weight"] = (d, config.in_chans, *depth, config.patch_size, config.patch_size)
    shapes["patch_embed.proj.bias"] = (d,)
    if config.neck_reduction > 1:
        shapes["neck.weight"] = (d // config.neck_reduction, d)
        shapes["norm_neck.weight"] = (config.readout_width,)
        if config.norm == "layer":
            shapes["norm_neck.bias"] = (config.readout_width,)
    if config.num_classes:
        shapes["head.weight"] = (config.num_classes, config.readout_width)
        shapes["head.bias"] = (config.num_classes,)
    for i in range(config.depth):
        m = f"layers.{i}.mixer."
        if config.layer_scale is not None:
            shapes[m + "gamma"] = (d,)
        shapes[m + "A_log"], shapes[m + "D"] = (e, n), (e,)
        if config.directions in ("ssm", "ssm_conv"):
            shapes[m + "A_b_log"] = (e, n)
        if config.directions == "ssm_conv":
            shapes[m + "D_b"] = (e,)
        shapes[m + "in_proj.weight"] = (2 * e, d)
        for s in ("", "_b") if config.directions == "ssm_conv" else ("",):
            shapes[m + f"conv1d{s}.weight"], shapes[m + f"conv1d{s}.bias"] = (e, 1, config.d_conv), (e,)
            shapes[m + f"x_proj{s}.weight"] = (r + 2 * n, e)
            shapes[m + f"dt_proj{s}.weight"], shapes[m + f"dt_proj{s}.bias"] = (e, r), (e,)
        shapes[m + "out_proj.weight"] = (d, e)
        shapes[f"layers.{i}.norm.weight"] = (d,)
        if config.norm == "layer":
            shapes[f"layers.{i}.norm.bias"] = (d,)
    shapes["norm_f.weight"] = (d,)
    if config.norm == "layer":
        shapes["norm_f.bias"] = (d,)
    return shapes


def random_weights(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights of plausible size in which no gradient vanishes and no two directions agree."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in parameter_shapes(config).items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if key.endswith("_log"):
            x = torch.arange(1, shape[1] + 1, dtype=torch.float64).log() + 0.1 * x
        elif key.endswith((".D", ".D_b", "norm.weight", "norm_f.weight", "norm_neck.weight", "gamma")):
            x = 1 + 0.2 * x
        elif "dt_proj" in key and key.endswith("bias"):
            x = -2 + x
        elif "conv1d" in key:
            x = 0.5 * x
        elif key.endswith("proj.weight") or key in ("head.weight", "neck.weight"):
            x = x / (x[0].numel() ** 0.5)
        else:
            x = 0.3 * x
        weights[key] = x.to(dtype)
    return weights


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Selective scan: u, delta, z (B, L, E); A (E, N); Bm, Cm (B, L, N); D, delta_bias (E) -> (B, L, E)."""
    if reverse:
        flipped = scan(
            u.flip(1),
            delta.flip(1),
            A,
            Bm.flip(1),
            Cm.flip(1),
            D,
            None if z is None else z.flip(1),
            delta_bias,
            delta_softplus,
        )
        return flipped.flip(1)
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)  # threshold 20, as published
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])  # (B, E, N)
    ys = []
    for u_t, d_t, b_t, c_t in zip(u.unbind(1), delta.unbind(1), Bm.unbind(1), Cm.unbind(1), strict=True):
        d = d_t[..., None]
        h = torch.exp(d * A) * h + d * b_t[:, None] * u_t[..., None]
        ys.append((h * c_t[:, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u)
    if D is not None:
        y = y + D * u
    return y if z is None else y * F.silu(z)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution over past tokens: x (B, L, E), weight (E, 1, K) -> (B, L, E), no activation."""
    k = weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (k - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)


def normalise(config: Config, w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[name + ".weight"]
    if config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, w[name + ".bias"], config.norm_eps)
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)


def branch_inputs(
    config: Config, w: Weights, m: str, s: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u (B, L, E), raw dt (B, L, E), B and C (B, L, N) of the direction with key suffix `s`."""
    u = F.silu(causal_conv(x, w[m + f"conv1d{s}.weight"], w[m + f"conv1d{s}.bias"]))
    q = u @ w[m + f"x_proj{s}.weight"].T
    dt, Bm, Cm = q.split([config.rank, config.d_state, config.d_state], -1)
    return u, dt @ w[m + f"dt_proj{s}.weight"].T, Bm, Cm


def mixer(config: Config, w: Weights, m: str, v: Tensor) -> Tensor:
    """The bidirectional mixer of one layer, key prefix `m`: v (B, L, D) -> (B, L, D)."""
    x, z = (v @ w[m + "in_proj.weight"].T).chunk(2, -1)
    u, dt, Bm, Cm = branch_inputs(config, w, m, "", x)
    D, bias = w[m + "D"], w[m + "dt_proj.bias"]
    out = scan(u, dt, -w[m + "A_log"].exp(), Bm, Cm, D, z, bias, True)
    if config.directions == "ssm":  # one convolution and projection, a second scan backwards
        out = out + scan(u, dt, -w[m + "A_b_log"].exp(), Bm, Cm, D, z, bias, True, reverse=True)
    elif config.directions == "ssm_conv":
        u, dt, Bm, Cm = branch_inputs(config, w, m, "_b", x.flip(1))
        A, D, bias = -w[m + "A_b_log"].exp(), w[m + "D_b"], w[m + "dt_proj_b.bias"]
        out = out + scan(u, dt, A, Bm, Cm, D, z.flip(1), bias, True).flip(1)
        if config.average_directions:
            out = out / 2
    out = out @ w[m + "out_proj.weight"].T
    return out * w[m + "gamma"] if config.layer_scale is not None else out


def layer(
    config: Config, w: Weights, i: int, h: Tensor, r: Tensor | None, drop: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One layer: (h, r) -> (mixer output, residual stream); `drop` (B) scales the incoming h."""
    if r is None:
        r = h
    else:
        r = r + (h if drop is None else h * drop[:, None, None])
    v = normalise(config, w, f"layers.{i}.norm", r)
    return mixer(config, w, f"layers.{i}.mixer.", v), r


def rope_tables(config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (J, D): half of the width turns with the row, half with the column."""
    m = config.embed_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, m, 2, dtype=torch.float64) / m)
    rows, cols = config.grid

    def angles(count: int) -> Tensor:
        position = torch.arange(count, dtype=torch.float64) / count * config.rope_grid
        return torch.outer(position, frequency).repeat_interleave(2, -1)

    angle = torch.cat(
        [angles(rows)[:, None].expand(rows, cols, m), angles(cols)[None].expand(rows, cols, m)], -1
    ).reshape(rows * cols, 2 * m)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the last J tokens of x (B, L, D); a leading class token passes."""
    cos, sin = tables
    skip = x.shape[1] - cos.shape[0]
    head, rest = x[:, :skip], x[:, skip:]
    turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(-2)
    return torch.cat([head, rest * cos + turned * sin], 1)


def class_positions(config: Config, draws: Draws) -> list[int]:
    """Final indices of the class tokens, ascending."""
    return {
        "none": [],
        "head": [0],
        "middle": [config.patches // 2],
        "random": [draws.class_position],
        "double": [0, config.patches + 1],
        "registers": register_positions(config),
    }[config.class_token]


def register_positions(config: Config) -> list[int]:
    """Registers and patches of n + 1 groups laid out in turns; what is left of the patches comes last."""
    if config.class_token != "registers":
        return []
    group = config.patches // (config.registers + 1)
    kinds = (["patch"] * group + ["register"]) * config.registers
    return [t for t, kind in enumerate(kinds) if kind == "register"]


def embed(config: Config, w: Weights, images: Tensor, draws: Draws) -> Tensor:
    """Images (B, C, H, W), or clips (B, C, T, H, W), -> tokens (B, L, D)."""
    if config.class_token == "registers" or config.frames:
        x = embed_parts(config, w, images, draws)
        return x if draws.mask is None else x * draws.mask
    x = F.conv2d(
        images,
        w["patch_embed.proj.weight"],
        w["patch_embed.proj.bias"],
        stride=config.stride or config.patch_size,
    )
    x = x.flatten(2).transpose(1, 2)
    names = ["cls_token_head", "cls_token_tail"] if config.class_token == "double" else ["cls_token"]
    for name, at in zip(names, class_positions(config, draws), strict=False):
        x = torch.cat([x[:, :at], w[name].expand(len(x), 1, -1), x[:, at:]], 1)
    if config.pos_embed:
        x = x + w["pos_embed"]
    return x if draws.mask is None else x * draws.mask


def embed_parts(config: Config, w: Weights, images: Tensor, draws: Draws) -> Tensor:
    """Registers, or clips: patches frame by frame get their positions, then class tokens get theirs."""
    weight, rows = w["patch_embed.proj.weight"], config.grid[0] * config.grid[1]
    at, clips = class_positions(config, draws), config.frames is not None
    double = config.class_token == "double"
    tokens = [w["cls_token_head"][:, 0], w["cls_token_tail"][:, 0]] if double else None
    tokens = tokens or (list(w["cls_token"].unbind(1)) if at else [])
    spatial = None
    if config.pos_embed:
        spatial = list(
            w["pos_embed"].unbind(1)
        )  # rows of the published table: class tokens among the patches
        if config.class_token == "registers":
            own = list(w["pos_embed_cls"].unbind(1))
        else:
            places = {"none": [], "head": [0], "middle": [rows // 2], "double": [0, rows + 1]}
            own = [spatial[i] for i in places[config.class_token]]
            spatial = [p for i, p in enumerate(spatial) if i not in places[config.class_token]]
        tokens = [token + row for token, row in zip(tokens, own, strict=True)]
    sequence = []
    for f in range(config.frames or 1):
        image = images[:, :, f] if clips else images
        x = F.conv2d(
            image,
            weight[:, :, 0] if clips else weight,
            w["patch_embed.proj.bias"],
            stride=config.stride or config.patch_size,
        )
        for j, patch in enumerate(x.flatten(2).unbind(2)):
            if spatial is not None:
                patch = patch + spatial[j]
                if clips:
                    patch = patch + w["temporal_pos_embedding"][:, f]
            sequence.append(patch)
    for k, place in enumerate(at):
        sequence.insert(place, tokens[k].expand(len(images), -1))
    return torch.stack(sequence, 1)


def read_out(config: Config, w: Weights, tokens: Tensor, draws: Draws) -> Tensor:
    """Normalised tokens (B, L, D) -> logits, or features without a head."""

    def head(x: Tensor) -> Tensor:
        return x @ w["head.weight"].T + w["head.bias"] if config.num_classes else x

    at = class_positions(config, draws)
    if config.class_token == "registers":
        registers = [tokens[:, t] for t in at]
        if config.neck_reduction > 1:
            joined = torch.cat([x @ w["neck.weight"].T for x in registers], 1)
            return head(normalise(config, w, "norm_neck", joined))
        return head(torch.cat(registers, 1))
    if at:
        return head(tokens[:, at].mean(1))
    if config.pool == "mean":
        return head(tokens.mean(1))
    if config.pool == "last":
        return head(tokens[:, -1])
    return head(tokens) if config.pool == "all" else head(tokens).max(1).values


def to_map(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(B, L, D) with class tokens -> (B, D, h, w), of clips (B, D, T, h, w)."""
    keep = [t for t in range(x.shape[1]) if t not in class_positions(config, draws)]
    return x[:, keep].transpose(1, 2).unflatten(2, (*([config.frames] * bool(config.frames)), *config.grid))


def forward(config: Config, w: Weights, images: Tensor, draws: Draws | None = None) -> Result:
    """The whole network on images (B, C, H, W)."""
    draws = draws or Draws()
    flip = draws.flip and config.directions == "sequence"

    def ordered(x: Tensor) -> Tensor:  # image order <-> order of the run
        return x.flip(1) if flip else x

    tables = rope_tables(config, images.dtype) if config.rope else None

    def turn(h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if tables is not None:
            h = ordered(rotate(ordered(h), tables))
            if config.rope_residual and r is not None:
                r = ordered(rotate(ordered(r), tables))
        return h, r

    def drop(i: int) -> Tensor | None:  # of the mixer output of layer i
        return None if draws.drop_path is None or i < 0 else draws.drop_path[i]

    def stream(h: Tensor, r: Tensor, i: int) -> Tensor:
        factor = drop(i)
        return r + (h if factor is None else h * factor[:, None, None])

    h, r = ordered(embed(config, w, images, draws)), None
    maps = []
    if config.directions == "block":  # pairs of layers on the same input, the second one backwards
        for i in range(0, config.depth, 2):
            h, r = turn(h, r)
            h_f, r_f = layer(config, w, i, h, r, drop(i - 1))
            maps.append(to_map(config, stream(h_f, r_f, i), draws))
            h_b, r_b = layer(config, w, i + 1, h.flip(1), None if r is None else r.flip(1), drop(i))
            h, r = h_f + h_b.flip(1), r_f + r_b.flip(1)
            maps.append(to_map(config, stream(h, r, i + 1), draws))
    else:
        for i in range(config.depth):
            h, r = turn(h, r)
            h, r = layer(config, w, i, h, r, drop(i - 1))
            maps.append(to_map(config, ordered(stream(h, r, i)), draws))
    tokens = ordered(normalise(config, w, "norm_f", stream(h, r, config.depth - 1)))
    return Result(read_out(config, w, tokens, draws), tokens, maps)


def gradients(
    config: Config,
    weights: Weights,
    images: Tensor,
    probe: Tensor | None = None,
    draws: Draws | None = None,
) -> tuple[Result, dict[str, Tensor]]:
    """Result and the gradients of sum(logits * probe): per parameter, and of the images under "input"."""
    w = {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
    x = images.detach().clone().requires_grad_()
    result = forward(config, w, x, draws)
    total = result.logits.sum() if probe is None else (result.logits * probe).sum()
    found = torch.autograd.grad(total, [x, *w.values()], allow_unused=True)
    names = ["input", *w]
    return result, {
        k: torch.zeros_like(v) if g is None else g
        for k, v, g in zip(names, [x, *w.values()], found, strict=True)
    }
