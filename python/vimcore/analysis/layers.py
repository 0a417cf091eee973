# SPDX-License-Identifier: Apache-2.0
"""A network layer by layer, each mixer as the linear map that it is while its selectivity is held.

What a Vim block makes of x, the first half of in_proj's output, is linear once time steps, B, C, the gate
silu(z) and the factor sigmoid(p) of the convolution's silu are constants:

    y[t] = gate[t] * sum over directions of scan(sigmoid(p) * (conv(x) + bias)),    out[t] = W_out y[t]

`Frozen` is this map, computed by the operators of the core, so that it and its transpose cost O(L). Layers
are visited one at a time: memory is that of one layer, and of the tokens between layers where asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._core import Config
from ..nn.inputs import checked_images
from ..nn.vision_mamba import VisionMamba
from ..positions import embedded, rope_tables
from ..utils.arguments import integer

State = tuple[Tensor, Tensor | None]  # mixer output h, and residual r before it is added; (B, L, D)
Block = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # a layer's number, h, r -> new h, r
P = ParamSpec("P")
R = TypeVar("R")


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes without autocast, and without gradients where it does not ask for them."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return call


def network_of(op: str, model: Any) -> VisionMamba:
    """The network within what DistributedDataParallel, averages and torch.compile make of it.

    Raises:
        TypeError: there is none.
        ValueError: it takes clips, whose maps are no pictures.
    """
    for wrapped in ("module", "_orig_mod"):
        model = getattr(model, wrapped, model)
    if not isinstance(model, VisionMamba):
        inner = getattr(model, "backbone", None)
        hint = "; give its .backbone" if isinstance(inner, VisionMamba) else ""
        raise TypeError(f"[{op}] model: expected a VisionMamba, got {type(model).__name__}{hint}")
    if model._config.frames:
        raise ValueError(f"[{op}] model: expected a network of images, got one of clips")
    return model


@contextmanager
def evaluating(model: VisionMamba) -> Iterator[None]:
    """Within it the network is in eval mode."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def chosen_layers(op: str, depth: int, layers: int | Sequence[int] | None) -> list[int]:
    """Layers counted from the first; negative ones count from the last, None: all.

    Raises:
        ValueError, TypeError: there is no such layer, or none was named.
    """
    if layers is None:
        return list(range(depth))
    given = list(layers) if isinstance(layers, Sequence) else [layers]
    if not given:
        raise ValueError(f"[{op}] layers: expected at least one of 0 .. {depth - 1}, got none")
    found = [integer(f"[{op}] layers", layer) for layer in given]
    for layer in found:
        if not -depth <= layer < depth:
            raise ValueError(f"[{op}] layers: expected {-depth} .. {depth - 1}, got {layer}")
    return [layer % depth for layer in found]


def output_layers(op: str, config: Config, layers: int | Sequence[int] | None) -> list[int]:
    """`chosen_layers` of those after which there is a stream: of a pair (directions "block") the second.

    Raises:
        ValueError, TypeError: there is no such layer or stream, or none was named.
    """
    step = 2 if config.directions == "block" else 1
    if layers is None:
        return list(range(step - 1, config.depth, step))
    found = chosen_layers(op, config.depth, layers)
    for layer in found:
        if layer % step != step - 1:
            raise ValueError(
                f'[{op}] layers: with directions="block" there are outputs after odd layers, got {layer}'
            )
    return found


@dataclass(frozen=True)
class Branch:
    """One direction of a mixer: x (B, L, E) -> scan(slope * conv(x)).

    Attributes:
        reverse, conv_reverse: whether scan and convolution run from the last token to the first.
        weight, bias: of the convolution, (E, K) and (E).
        slope: sigmoid(p) (B, L, E), p the output of the convolution.
        delta, A, B, C, D: of the scan, as `ops.selective_scan` takes them.
    """

    reverse: bool
    conv_reverse: bool
    weight: Tensor
    bias: Tensor
    slope: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def scan(self, u: Tensor) -> Tensor:
        """The scan of u (B, L, E) with its skip."""
        return ops.selective_scan(u, self.delta, self.A, self.B, self.C, self.D, reverse=self.reverse)

    def convolved(self, x: Tensor, bias: bool = True) -> Tensor:
        """slope * (conv(x) + bias), which is silu of it for the x that the slope is of."""
        p = ops.causal_conv1d(x, self.weight, self.bias if bias else None, None, self.conv_reverse)
        return p * self.slope

    def scan_row(self, dy: Tensor, t: int) -> Tensor:
        """dy (B, E) of token t through the transposed scan: (B, L, E).

        Seen from one token that is a scan the other way: its state decays by the delta of the token last
        left, B and C change places. No gradient is needed, and tokens that the row cannot reach are left out.
        """
        length = self.delta.shape[1]
        if self.reverse:
            part, shifted, at = slice(t, None), self.delta[:, t : length - 1], 0
            ends = (t, 0)
        else:
            part, shifted, at = slice(0, t + 1), self.delta[:, 1 : t + 1], -1
            ends = (0, length - 1 - t)
        first = torch.ones_like(self.delta[:, :1])  # in front of it there is no state
        delta = torch.cat([first, shifted] if self.reverse else [shifted, first], 1)
        u = torch.zeros_like(delta)
        u[:, at] = dy
        C, B = self.B[:, part], self.C[:, part]
        du = ops.selective_scan(u, delta, self.A, B, C, reverse=not self.reverse) * self.delta[:, part]
        du[:, at] += dy * self.D
        return F.pad(du, (0, 0, *ends))

    def scan_transposed(self, dy: Tensor) -> Tensor:
        """dy (B, L, E) through the transposed scan."""
        u = torch.zeros_like(dy).requires_grad_()
        with torch.enable_grad():
            (du,) = torch.autograd.grad(self.scan(u), u, dy)
        return du

    def convolved_transposed(self, du: Tensor) -> Tensor:
        """du (B, L, E) through the transpose of `convolved` without bias: a convolution the other way."""
        return ops.causal_conv1d(du * self.slope, self.weight, None, None, not self.conv_reverse)


@dataclass(frozen=True)
class Frozen:
    """The mixer of one layer with its selectivity held.

    Attributes:
        branches: the directions that the layer has, forward before reverse.
        x, z: in_proj's output in two halves (B, L, E).
        gate: silu(z) (B, L, E), halved where the directions are averaged.
        into, out: W_x (E, D) and W_out (D, E), this times layer scale.
    """

    branches: list[Branch]
    x: Tensor
    z: Tensor
    gate: Tensor
    scale: float
    into: Tensor
    out: Tensor


class Layers:
    """What a `VisionMamba` computes of images in eval mode, layer by layer, in the type of its parameters.

    Args:
        op: the function, for messages.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; the images do not fit.
    """

    def __init__(self, op: str, model: Any, images: Any) -> None:
        self.op, self.model = op, network_of(op, model)
        core, params = self.model._weights()
        self.weights = {name: p.detach() for name, p in zip(core.names, params)}
        images = images.detach() if isinstance(images, Tensor) else images
        like = params[0]
        images = checked_images(images, like, self.model._config, self.model.dynamic_img_size)
        self.images: Tensor = images.to(like.dtype)
        self.config: Config = self.model._config_for(images)
        self.class_at = self.config.class_positions
        taken = set(self.class_at)
        self.patch_at = [t for t in range(self.config.tokens) if t not in taken]
        step = 2 if self.config.directions == "block" else 1
        self.groups = [list(range(i, i + step)) for i in range(0, self.config.depth, step)]
        self._blocks = [self._of_layer(i) for i in range(self.config.depth)]
        self._tables: tuple[Tensor, Tensor] | None = None
        if self.config.rope:
            cos, sin = (table.to(self.images) for table in rope_tables(self.config.to_dict()))
            self._tables = cos, sin

    def _of_layer(self, i: int) -> dict[str, Tensor]:
        prefix = f"layers.{i}."
        return {n.removeprefix(prefix): p for n, p in self.weights.items() if n.startswith(prefix)}

    # ---- tokens --------------------------------------------------------------------------------------------

    def patches(self) -> Tensor:
        """What the patches' pixels give to the tokens: (B, J, D), without bias, positions, class tokens."""
        weight = self.weights["patch_embed.proj.weight"]
        return F.conv2d(self.images, weight, stride=self.config.stride).flatten(2).transpose(1, 2)

    def embed(self, patches: Tensor) -> Tensor:
        """The tokens (B, L, D) of patches (B, J, D)."""
        x = patches + self.weights["patch_embed.proj.bias"]
        return embedded(x, self.weights.__getitem__, self.model._config, self.config)

    def on_grid(self, x: Tensor) -> Tensor:
        """(..., L) -> (..., h, w), without class tokens."""
        return x[..., self.patch_at].unflatten(-1, self.config.grid)

    def class_row(self) -> Tensor:
        """(L): how much the head reads of every token; all alike where it reads them all."""
        row = self.images.new_zeros(self.config.tokens)
        at: Any = self.class_at or ([-1] if self.config.pool == "last" else slice(None))
        row[at] = 1
        return row / row.sum()

    # ---- layers --------------------------------------------------------------------------------------------

    def rotated(self, h: Tensor, r: Tensor | None) -> State:
        """What enters a layer, or a pair of layers, of what came before."""
        if self._tables is None:
            return h, r
        cos, sin = self._tables

        def turn(x: Tensor) -> Tensor:  # a class token at the head passes
            skip = x.shape[1] - cos.shape[0]
            rest = x[:, skip:]
            turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(-2)
            return torch.cat([x[:, :skip], rest * cos + turned * sin], 1)

        return turn(h), turn(r) if r is not None and self.config.rope_residual else r

    def block(self, i: int, h: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """Layer i, as the network computes it."""
        c = self.config
        paired, directions = c.directions == "block", c.directions
        return ops.vim_block(
            h,
            self._blocks[i],
            r,
            directions=directions if c.two_directions else "none",
            average_directions=c.average_directions,
            norm=c.norm,
            norm_eps=c.norm_eps,
            reverse=paired and i % 2 == 1,
        )

    def group(
        self, layers: Sequence[int], h: Tensor, r: Tensor | None, block: Block | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer, or a pair on the same input (directions "block"): new h and r, both (B, L, D)."""
        h, r = self.rotated(h, r)
        outputs = [(block or self.block)(i, h, r) for i in layers]
        (out, total), *others = outputs
        for more, residual in others:
            out, total = out + more, total + residual
        return out, total

    def visit(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Every layer's number, with the h and r that enter it, rotated."""
        h, r = self.embed(self.patches()), None
        for layers in self.groups:
            turned = self.rotated(h, r)
            for i in layers:
                yield (i, *turned)
            if layers != self.groups[-1]:
                h, r = self.group(layers, h, r)

    def group_backward(
        self,
        layers: Sequence[int],
        entered: State,
        dh: Tensor,
        dr: Tensor,
        block: Block | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of what entered a group of layers, of those of its outputs; without r, twice h's."""
        held = [t.detach().requires_grad_() for t in entered if t is not None]
        with torch.enable_grad():
            out = self.group(layers, held[0], held[1] if len(held) > 1 else None, block)
            gradients = torch.autograd.grad(out, held, (dh, dr))
        return gradients[0], gradients[-1]

    def last_norm(self, x: Tensor) -> Tensor:
        """The tokens that the head reads, of the stream r + h."""
        weight, eps = self.weights["norm_f.weight"], self.config.norm_eps
        if self.config.norm == "layer":
            out = ops.layer_norm(x, weight, self.weights["norm_f.bias"], eps=eps)
        else:
            out = ops.rms_norm(x, weight, eps=eps)
        assert isinstance(out, Tensor)
        return out

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, classes) of normalised tokens (B, L, D).

        Raises:
            ValueError: there is no head, or it gives logits for every token.
        """
        with evaluating(self.model):
            logits = VisionMamba.forward_head(self.model, tokens)  # not a subclass's, which may drop
        if logits.ndim != 2 or not logits.shape[1] or isinstance(self.model.head, torch.nn.Identity):
            without = isinstance(self.model.head, torch.nn.Identity)
            got = "a network without a head" if without else f"{tuple(logits.shape)}, one for every token"
            raise ValueError(f"[{self.op}] model: expected logits (B, classes), got {got}")
        return logits

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The normalisation `name`, its deviation held: the derivative is that of a linear map."""
        weight, eps = self.weights[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
            held = (x.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
            return x * held * weight + self.weights[f"{name}.bias"]
        return x * (x.detach().square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def frozen(self, i: int, h: Tensor, r: Tensor | None) -> Frozen:
        """The mixer of layer i on what enters it; its selectivity is held, x and z can be differentiated."""
        c, w = self.config, {n.removeprefix("mixer."): p for n, p in self._blocks[i].items()}
        v = self.norm(f"layers.{i}.norm", h if r is None else r + h)
        x, z = (v @ w["in_proj.weight"].T).chunk(2, -1)
        paired_reverse = c.directions == "block" and i % 2 == 1
        with torch.no_grad():
            if c.directions == "ssm_conv":
                branches = [_branch(c, w, x, "", "", False, False), _branch(c, w, x, "_b", "_b", True, True)]
            elif c.directions == "ssm":  # the second scan runs over what the first convolution gives
                branches = [_branch(c, w, x, "", "", False, False), _branch(c, w, x, "", "_b", True, False)]
            else:
                branches = [_branch(c, w, x, "", "", paired_reverse, paired_reverse)]
            scale = 0.5 if c.directions == "ssm_conv" and c.average_directions else 1.0
            gate, out = F.silu(z) * scale, w["out_proj.weight"]
            if c.layer_scale is not None:
                out = out * w["gamma"][:, None]
        return Frozen(branches, x, z, gate, scale, w["in_proj.weight"][: c.inner], out)


def _branch(
    c: Config, w: dict[str, Tensor], x: Tensor, s: str, a: str, reverse: bool, conv_reverse: bool
) -> Branch:
    """A direction; s and a are the key suffixes of its projections and of its A_log."""
    weight, bias = w[f"conv1d{s}.weight"].squeeze(1), w[f"conv1d{s}.bias"]
    p = ops.causal_conv1d(x, weight, bias, None, conv_reverse)
    slope = torch.sigmoid(p)
    low, B, C = ((p * slope) @ w[f"x_proj{s}.weight"].T).split([c.dt_rank, c.d_state, c.d_state], -1)
    delta = F.softplus(F.linear(low, w[f"dt_proj{s}.weight"], w[f"dt_proj{s}.bias"]))
    A, D = -w[f"A{a}_log"].exp(), w[f"D{s}"]
    return Branch(reverse, conv_reverse, weight, bias, slope, delta, A, B.contiguous(), C.contiguous(), D)
