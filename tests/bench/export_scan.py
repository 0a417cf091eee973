# SPDX-License-Identifier: Apache-2.0
"""Forms of the selective scan for exported networks: how fast ONNX Runtime and OpenVINO run each.

    python tests/bench/export_scan.py                  # Vim-Ti's scan of both directions, 197 and 1025 tokens
    python tests/bench/export_scan.py --tokens 4097 --json

One thread, one image, float32; minima of repeated calls. `core` is the same scan by vimcore.ops. A form
whose result is wrong shows as a difference; OpenVINO 2026.4 computes loops wrongly whose states are slices.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vimcore
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

WAYS, CHANNELS, STATES = 2, 384, 16
REPEATS = 8
Result = tuple[Tensor, Tensor]


class Form(nn.Module):
    """y (L, ways, E) of delta, u (L, ways, E), B, C (L, ways, N); A is (ways, E, N), constant."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("A_rows", A.transpose(1, 2).contiguous())


class Inside(Form):
    """A loop that computes decay and input of the states itself; channels first."""

    def forward(self, delta: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        def step(h: Tensor, token: Sequence[Tensor]) -> Result:
            d, x, b, c = token
            h = torch.exp(d[..., None] * self.A) * h + x[..., None] * b[:, None]
            return h, (h @ c[..., None])[..., 0]

        return scan(step, torch.zeros_like(self.A), (delta, delta * u, B, C))[1]


class InsideLast(Form):
    """The same with channels last; what `vimcore export` writes."""

    def forward(self, delta: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        def step(h: Tensor, token: Sequence[Tensor]) -> Result:
            d, x, b, c = token
            h = torch.exp(d[:, None] * self.A_rows) * h + x[:, None] * b[..., None]
            return h, (c[:, None] @ h)[:, 0]

        return scan(step, torch.zeros_like(self.A_rows), (delta, delta * u, B, C))[1]


class Before(Form):
    """Decay and input of all states before the loop, (L, ways, N, E) each."""

    def forward(self, delta: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        def step(h: Tensor, token: Sequence[Tensor]) -> Result:
            decay, x, c = token
            h = decay * h + x
            return h, (c[:, None] @ h)[:, 0]

        decay = torch.exp(delta[:, :, None] * self.A_rows)
        x = (delta * u)[:, :, None] * B[..., None]
        return scan(step, torch.zeros_like(self.A_rows), (decay, x, C))[1]


class Doubling(Form):
    """No loop: every state after 1, 2, 4 ... tokens, log2(L) times over (L, ways, E, N)."""

    def forward(self, delta: Tensor, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(delta[..., None] * self.A)
        h = (delta * u)[..., None] * B[:, :, None]
        reach = 1
        while reach < len(h):
            h = torch.cat([h[:reach], decay[reach:] * h[:-reach] + h[reach:]])
            decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
            reach *= 2
        return (h @ C[..., None])[..., 0]


def onnx_call(path: Path, arguments: Sequence[np.ndarray]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {put.name: value for put, value in zip(session.get_inputs(), arguments)}
    return lambda: session.run(None, feed)[0]


def openvino_call(path: Path, arguments: Sequence[np.ndarray]) -> Callable[[], Any]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(str(path)), "CPU", options)
    feed = dict(zip(("delta", "u", "b", "c"), arguments))
    return lambda: compiled(feed)[0]


def fastest(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    found, times = call(), []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times), np.asarray(found)


def rows_of(tokens: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    A = -torch.arange(1.0, STATES + 1).expand(WAYS, CHANNELS, STATES).contiguous()
    delta, u = normal(tokens, WAYS, CHANNELS).sigmoid() / 10, normal(tokens, WAYS, CHANNELS)
    arguments = delta, u, normal(tokens, WAYS, STATES), normal(tokens, WAYS, STATES)

    def core() -> np.ndarray:
        ways = [[t.transpose(0, 1)[[way]].contiguous() for t in arguments] for way in range(WAYS)]
        y = [vimcore.ops.selective_scan(v, d, A[way], b, c) for way, (d, v, b, c) in enumerate(ways)]
        return torch.cat(y).transpose(0, 1).numpy()

    milliseconds, wanted = fastest(core)
    found = [{"tokens": tokens, "form": "core", "program": "vimcore", "ms": milliseconds, "difference": 0.0}]
    for form in (Inside, InsideLast, Before, Doubling):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            path = Path(folder) / "scan.onnx"
            names = ["delta", "u", "b", "c"]
            torch.onnx.export(form(A).eval(), arguments, path, input_names=names, dynamo=True, verbose=False)
            for program, make in (("ONNX Runtime", onnx_call), ("OpenVINO", openvino_call)):
                milliseconds, y = fastest(make(path, [t.numpy() for t in arguments]))
                row = {"tokens": tokens, "form": form.__name__, "program": program, "ms": milliseconds}
                found.append({**row, "difference": float(np.abs(y - wanted).max())})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1025], help="default: 197 1025")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in args.tokens:
        for row in rows_of(tokens):
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                about = f"{row['tokens']:6} tokens  {row['form']:10}  {row['program']:12}"
                print(f"{about}  {row['ms']:9.2f} ms  difference {row['difference']:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
