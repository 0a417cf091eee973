# SPDX-License-Identifier: Apache-2.0
"""A network in operations that other programs have: torch.export and ONNX follow it from images to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from ..nn.plain import Plain
from ..nn.readout import readout
from ..nn.vision_mamba import VisionMamba

State = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


class ExportNetwork(nn.Module):
    """The eval mode of a model with its weights as buffers, at one image size, for any batch.

    Args:
        model: on the CPU in float32; not changed, and not referred to afterwards.
    """

    def __init__(self, model: VisionMamba) -> None:
        super().__init__()
        self._plain = _OneScan(model, lambda name, tensor: None)
        self._plain.prepare()
        self._buffer_of = {name: name.replace(".", "_") for name in self._plain.weights}
        for name, weight in self._plain.weights.items():
            self.register_buffer(self._buffer_of[name], weight.clone())
        self._config = model._config
        self._plain.weights = {}  # those of the buffers, while forward runs
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images or clips, as of the model; without a head what it would see."""
        weights = {name: self.get_buffer(buffer) for name, buffer in self._buffer_of.items()}
        self._plain.weights = weights
        try:
            return readout(self._plain.tokens(images), self._config, weights.__getitem__, self._head)
        finally:
            self._plain.weights = {}

    def _head(self, tokens: Tensor) -> Tensor:
        weights = self._plain.weights
        if "head.weight" not in weights:
            return tokens
        return F.linear(tokens, weights["head.weight"], weights.get("head.bias"))


class _OneScan(Plain):
    """Both directions of a mixer in one loop over tokens, which is one operator in the exported graph.

    Decay and input of the states are computed within the loop, so that nothing of the shape (B, L, E, N)
    exists. Of the forms that were tried (tests/bench/export_scan.py) ONNX Runtime and OpenVINO run this
    one fastest: channels last, because a step's output is then a product of row and matrix.
    """

    def prepare(self) -> None:
        """Puts A of a layer's directions, (ways, 1, N, E), in the place of their logarithms.

        OpenVINO wants the loop's constants stored, not computed.
        """
        for i in range(self.config["depth"]):
            names = [f"layers.{i}.mixer.A{way}_log" for way in ("", "_b")]
            logs = [self.weights.pop(name) for name in names if name in self.weights]
            self.weights[f"layers.{i}.mixer.A"] = torch.stack([-log.exp().T for log in logs])[:, None]

    def _mixer(self, m: str, v: Tensor) -> Tensor:
        directions = self.config["directions"]
        x, z = (v @ self._weight(m + "in_proj.weight").T).chunk(2, -1)
        ways = [self._inputs(m, "", x)]
        skips = [self._weight(f"{m}D")]
        if directions in ("ssm", "ssm_conv"):
            own = "_b" if directions == "ssm_conv" else ""
            reverse = self._inputs(m, "_b", x.flip(1)) if own else [t.flip(1) for t in ways[0]]
            ways.append(reverse)
            skips.append(self._weight(f"{m}D{own}"))
        y = [y + D * way[0] for y, D, way in zip(_scanned(ways, self._weight(f"{m}A")), skips, ways)]
        total = y[0] if len(y) == 1 else y[0] + y[1].flip(1)
        if directions == "ssm_conv" and self.config["average_directions"]:
            total = total / 2
        out = (total * F.silu(z)) @ self._weight(m + "out_proj.weight").T
        return out if self.config["layer_scale"] is None else out * self._weight(m + "gamma")


def _scanned(ways: list[list[Tensor]], A: Tensor) -> list[Tensor]:
    """y (B, L, E), without skip, of scans side by side.

    Args:
        ways: u, delta (B, L, E), B, C (B, L, N) of each.
        A: (ways, 1, N, E).
    """
    u, delta, B, C = (torch.stack(parts).permute(2, 0, 1, 3) for parts in zip(*ways))  # (L, ways, B, ...)

    def step(h: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        d, x, b, c = token  # (ways, B, E), (ways, B, E), (ways, B, N), (ways, B, N)
        h = torch.exp(d[:, :, None] * A) * h + x[:, :, None] * b[..., None]
        return h, (c[:, :, None] @ h)[:, :, 0]

    start = torch.zeros_like(delta[0][:, :, None] * A)
    y = scan(step, start, (delta, delta * u, B, C))[1]  # (L, ways, B, E)
    return list(y.permute(1, 2, 0, 3).unbind())
