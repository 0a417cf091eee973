# SPDX-License-Identifier: Apache-2.0
"""The network once more in plain torch operations, one block at a time, every tensor shown to an observer.

For looking inside, not for speed; states (B, L, E, N) exist in chunks of tokens only. Reads a model's
parameters, changes nothing, computes without gradients and without the random draws of training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..positions import embedded, rope_tables
from .vision_mamba import VisionMamba

Observe = Callable[[str, Tensor], None]  # name, some of the tensor of that name
CHUNK = 1 << 16  # elements of a chunk of states, which stays in the cache


class Plain:
    """One pass over a model.

    Args:
        model: on any device, in float32 or float64; that is what is computed in.
        observe: called with (name, tensor) in the order of computation: parameters under their state-dict
            keys, and what is computed from them: "layers.0.mixer.delta", "layers.0.mixer.state_b", ...
        store: the 16-bit type that activations and weights of linear maps are rounded to, as on CUDA under
            autocast; None: no rounding. Time steps, states, residual and norm statistics never are.
    """

    def __init__(self, model: VisionMamba, observe: Observe, store: torch.dtype | None = None) -> None:
        core, params = model._weights()
        self.weights = {n: p.detach() for n, p in zip(core.names, params)}
        self.config = model.config
        self._config_for, self._rank = model._config_for, model._config.dt_rank
        self._made_for = self._here = model._config  # sizes of the position table, and of the images
        self.observe, self.store = observe, store

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, L, D) of images or clips, as `forward_features` in eval mode."""
        c, self._here = self.config, self._config_for(images)
        h, r = self._embed(images), None
        step = 2 if c["directions"] == "block" else 1
        for i in range(0, c["depth"], step):
            h, r = self._rotated(h, r)
            if step == 1:
                h, r = self._layer(i, h, r)
                continue
            h_f, r_f = self._layer(i, h, r)
            h_b, r_b = self._layer(i + 1, h.flip(1), None if r is None else r.flip(1))
            h, r = h_f + h_b.flip(1), r_f + r_b.flip(1)
        stream = h if r is None else r + h
        self.observe("residual", stream)
        return self._seen("norm_f", self._norm("norm_f", stream))

    # ---- pieces --------------------------------------------------------------------------------------------

    def _weight(self, name: str, rounded: bool = False) -> Tensor:
        weight = self.weights[name]
        self.observe(name, weight)
        return self._rounded(weight) if rounded else weight

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.store is None else x.to(self.store).to(x.dtype)

    def _seen(self, name: str, x: Tensor) -> Tensor:
        """An activation: in the type of activations, and shown."""
        x = self._rounded(x)
        self.observe(name, x)
        return x

    def _embed(self, images: Tensor) -> Tensor:
        c = self.config
        images = self._seen("images", images)
        weight = self._weight("patch_embed.proj.weight", rounded=True)
        bias, stride = self._weight("patch_embed.proj.bias"), c["stride"]
        if c["frames"]:
            x = F.conv3d(images, weight, bias, (1, stride, stride))
        else:
            x = F.conv2d(images, weight, bias, stride)
        x = embedded(x.flatten(2).transpose(1, 2), self._weight, self._made_for, self._here)
        self.observe("embedding", x)
        return x

    def _rotated(self, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.config["rope"]:
            return h, r
        cos, sin = (table.to(h) for table in rope_tables(self._here.to_dict()))

        def turn(x: Tensor) -> Tensor:  # a class token at the head passes
            skip = x.shape[1] - cos.shape[0]
            rest = x[:, skip:]
            turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(-2)
            return torch.cat([x[:, :skip], rest * cos + turned * sin], 1)

        return turn(h), turn(r) if r is not None and self.config["rope_residual"] else r

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, eps = self._weight(f"{name}.weight"), self.config["norm_eps"]
        if self.config["norm"] == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, self._weight(f"{name}.bias"), eps)
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def _layer(self, i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h, r) -> (mixer output, residual stream), both (B, L, D)."""
        r = h if r is None else r + h
        self.observe(f"layers.{i}.residual", r)
        v = self._seen(f"layers.{i}.norm", self._norm(f"layers.{i}.norm", r))
        return self._mixer(f"layers.{i}.mixer.", v), r

    def _mixer(self, m: str, v: Tensor) -> Tensor:
        """v (B, L, D) -> (B, L, D); m is the prefix of the keys."""
        directions = self.config["directions"]
        x, z = self._seen(m + "xz", v @ self._weight(m + "in_proj.weight", rounded=True).T).chunk(2, -1)
        inputs = self._inputs(m, "", x)
        y = self._scan(m, "", "", inputs)
        if directions == "ssm":  # one convolution, a second scan from the other end
            y = y + self._scan(m, "_b", "", [t.flip(1) for t in inputs]).flip(1)
        elif directions == "ssm_conv":
            y = y + self._scan(m, "_b", "_b", self._inputs(m, "_b", x.flip(1))).flip(1)
            if self.config["average_directions"]:
                y = y / 2
        y = self._seen(m + "y", y * F.silu(z))
        out = y @ self._weight(m + "out_proj.weight", rounded=True).T
        if self.config["layer_scale"] is not None:
            out = out * self._weight(m + "gamma")
        return self._seen(m + "out", out)

    def _inputs(self, m: str, s: str, x: Tensor) -> list[Tensor]:
        """u, delta (B, L, E), B, C (B, L, N) of the direction with key suffix s; x (B, L, E)."""
        weight, rank, state = self._weight(f"{m}conv1d{s}.weight"), self._rank, self.config["d_state"]
        padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        p = F.conv1d(padded, weight, self._weight(f"{m}conv1d{s}.bias"), groups=x.shape[2])
        u = self._seen(f"{m}u{s}", F.silu(p.transpose(1, 2)))
        q = self._seen(f"{m}q{s}", u @ self._weight(f"{m}x_proj{s}.weight", rounded=True).T)
        low, B, C = q.split([rank, state, state], -1)
        raw = F.linear(
            low, self._weight(f"{m}dt_proj{s}.weight", rounded=True), self._weight(f"{m}dt_proj{s}.bias")
        )
        delta = F.softplus(raw)
        self.observe(f"{m}delta{s}", delta)
        return [u, delta, B, C]

    def _scan(self, m: str, a: str, s: str, inputs: list[Tensor]) -> Tensor:
        """y (B, L, E) with skip, without gate; a and s are the key suffixes of A_log and of the rest."""
        A = -self._weight(f"{m}A{a}_log").exp()  # (E, N)
        D = self._weight(f"{m}D{s}")
        u, delta, B, C = (t.transpose(0, 1) for t in inputs)  # tokens first
        # A is negative, delta is not: the extremes of the product are products of extremes
        low, high = delta.amax((0, 1)) * A.amin(1), delta.amin((0, 1)) * A.amax(1)
        self.observe(f"{m}A_delta{a}", torch.stack([low, high]))
        y = torch.empty_like(u)
        state = u.new_zeros(*u.shape[1:], A.shape[1])  # (B, E, N)
        step = max(1, CHUNK // max(state.numel(), 1))
        for begin in range(0, len(u), step):
            part = slice(begin, begin + step)
            decay = (delta[part, ..., None] * A).exp_()  # (chunk, B, E, N)
            states = (delta[part] * u[part])[..., None] * B[part, :, None]
            for t in range(len(states)):
                state = states[t].addcmul_(decay[t], state)
            self.observe(f"{m}state{a}", states)
            y[part] = (states @ C[part, ..., None]).squeeze(-1)
        return (y + D * u).transpose(0, 1)
