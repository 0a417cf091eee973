# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench` on the CPU: speed against peers, measured in interleaved pairs in one process.

Each figure is the median over pairs (ours, peer, ours, peer, ...) on the same machine, with the same number
of threads, within seconds of each other; a sample is as many calls back to back as fill `Options.sample`
seconds, after a pause in which the worker threads of the other side go to sleep. The share of the floor is

    (2 * multiply-adds outside the scan + 20 * state updates) / (seconds * FMA peak)

with state updates = tokens * inner * state * directions * depth per image, and the peak measured between
the pairs. In bfloat16 the multiply-adds of linear maps count at the peak of the unit that multiplies it,
which is measured too, and all else (convolution, 14 for a state update) at the FMA peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ... import _core
from ...config import WIDTHS
from .common import Call, Options, forward_call, table_line, training_call
from .memory import peak_bytes
from .networks import OURS, WITHOUT_NECK, build, dtype_of, neck_flops, placed
from .peers import load_module, quiet

# Slots of the pipe that multiplies, times two: the exponential takes most of them. In bfloat16 it is shorter,
# and what it adds goes elsewhere where the processor has a pipe for additions.
STATE_UPDATE_FLOPS = {"float32": 20, "bfloat16": 14}
CONVOLUTION = 4  # taps
RUNTIME = ("runtime_peak_bytes", "peer_runtime_peak_bytes")
HEADER = (
    "pixels",
    "batch",
    "peer".rjust(15),
    "ours ms/img",
    "peer ms/img",
    "ratio",
    "of floor",
    "peak GF/s",
    "ours MiB",
    "peer MiB",
    "Runtime MiB",
    "pairs",
)


class Sizes:
    """Sizes of a Vim for the floor: middle class token, both directions, patches of 16 pixels."""

    depth, d_state, scans = 24, 16, 2

    def __init__(self, side: int, width: int, multiply_adds: int) -> None:
        self.tokens = (side // 16) ** 2 + 1
        self.inner = 2 * width
        self.multiply_adds = multiply_adds  # scan included, at 4 for each state update
        self.channels = self.tokens * self.inner * self.scans * self.depth  # that are scanned


def floor_flops(sizes: Sizes, dtype: str = "float32") -> float:
    """Flops that the forward pass of one image needs at least, exponentials at their cost."""
    updates = sizes.channels * sizes.d_state
    return 2.0 * (sizes.multiply_adds - 4 * updates) + STATE_UPDATE_FLOPS[dtype] * updates


def linear_flops(sizes: Sizes) -> float:
    """Those of linear maps among them, time steps included."""
    rest = sizes.channels * (4 * sizes.d_state + CONVOLUTION)
    return 2.0 * (sizes.multiply_adds - rest)


def sample(call: Call, seconds: float, pause: float) -> float:
    """Seconds of one call: rests, then calls until `seconds` are over."""
    time.sleep(pause)
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return elapsed / count


def interleave(
    ours: Call, peer: Call | None, peak: Callable[[], tuple[float, float]] | None, options: Options
) -> dict[str, Any]:
    """Pairs of samples and the peaks between them: {"ours", "peer", "peak"}, lists of equal length.

    Args:
        peak: of multiply-adds in float32 and in the type of the activations, GFLOP/s.
    """
    ours()  # warm up: memory, packed weights, compiled kernels
    if peer:
        peer()
    found: dict[str, Any] = {"ours": [], "peer": [], "peak": []}
    begin = time.perf_counter()
    while len(found["ours"]) < options.pairs and (
        not found["ours"] or time.perf_counter() - begin < options.seconds
    ):
        if peak:
            time.sleep(options.pause)
            found["peak"].append(peak())
        found["ours"].append(sample(ours, options.sample, options.pause))
        if peer:
            found["peer"].append(sample(peer, options.sample, options.pause))
    return found


def measure(
    options: Options, side: int, batch: int, folder: Path | None, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """All rows of one image size and batch: one per peer, or one without a peer."""
    width = WIDTHS[options.model]
    model = placed(build(options, None, side, None), torch.device("cpu"), dtype_of(options, None))
    pixels = torch.randn(batch, 3, side, side)
    images = pixels.to(dtype_of(options, None))
    targets = torch.randint(1000, (batch,)) if options.train else None
    ours = forward_call(model, images) if targets is None else training_call(model, images, targets)
    backbone: Any = model if options.neck == "none" else model.backbone
    sizes = Sizes(side, width, backbone.flops())
    narrow = options.dtype == "bfloat16"
    floor = batch * (floor_flops(sizes, options.dtype) + 2.0 * neck_flops(options, side))
    linear = batch * (linear_flops(sizes) + 2.0 * neck_flops(options, side)) if narrow else 0.0

    def peak() -> tuple[float, float]:
        own = _core.fma_peak(options.threads)
        return own, _core.bf16_peak(options.threads) if narrow else own

    peers: dict[str | None, Call | None] = {}
    for name in options.peers:
        if options.train and name in ("openvino", "onnxruntime"):
            skipped[name] = "does not train"
        elif options.neck != "none" and name in WITHOUT_NECK:
            skipped[name] = "is measured as a classifier only"
        elif name == "onnxruntime" and options.dtype != "float32":
            skipped[name] = f"has no {options.dtype} on the CPU"
        elif name in OURS and options.dtype == "float32":
            skipped[name] = "is measured beside 16 bits"
        elif (folder is not None or name in OURS) and name not in skipped:
            try:
                peers[name] = _peer_call(name, folder, side, pixels, targets, options)
            except ImportError as error:
                skipped[name] = f"not installed ({error})"
            except NotImplementedError as error:
                skipped[name] = str(error)
    rows = []
    own_peak = _peak(options, None, side, batch, folder)
    for peer_name, peer in (peers or {None: None}).items():
        found = interleave(ours, peer, peak, options)
        row: dict[str, Any] = {
            "model": options.model,
            "size": side,
            "batch": batch,
            "mode": "train" if options.train else "forward",
            "neck": options.neck,
            "dtype": options.dtype,
            "peer": peer_name,
            "pairs": len(found["ours"]),
            "ms_per_image": 1e3 * median(found["ours"]) / batch,
            "peak_gflops": median(own for own, _ in found["peak"]),
            "samples": found,
        }
        if not options.train:
            row["share_of_floor"] = median(
                ((floor - linear) / own + linear / unit) / (seconds * 1e9)
                for seconds, (own, unit) in zip(found["ours"], found["peak"], strict=True)
            )
        if narrow:
            row["bf16_peak_gflops"] = median(unit for _, unit in found["peak"])
        if peer:
            row["peer_ms_per_image"] = 1e3 * median(found["peer"]) / batch
            row["ratio"] = median(a / b for a, b in zip(found["ours"], found["peer"], strict=True))
        row |= own_peak
        if peer and peer_name not in ("openvino", "onnxruntime"):
            peaks = _peak(options, peer_name, side, batch, folder)
            row |= {f"peer_{key}": value for key, value in peaks.items()}
        rows.append(row)
        print(_line(row), file=options.table, flush=True)
    return rows


def _peer_call(
    name: str,
    folder: Path | None,
    side: int,
    pixels: torch.Tensor,
    targets: torch.Tensor | None,
    options: Options,
) -> Call:
    """The call of a peer on float32 pixels.

    Raises:
        ImportError, NotImplementedError: something is not installed, or does not compute in this type.
    """
    model = build(options, name, side, folder)
    if name in ("openvino", "onnxruntime"):
        assert folder is not None
        precision = {"openvino": {"dtype": options.dtype}}.get(name, {})
        with quiet():
            call: Call = getattr(load_module(folder, "deit"), name)(
                model, pixels, options.threads, **precision
            )
        return call
    dtype = dtype_of(options, name)
    model, images = placed(model, torch.device("cpu"), dtype), pixels.to(dtype)
    return forward_call(model, images) if targets is None else training_call(model, images, targets)


def _peak(
    options: Options, peer: str | None, side: int, batch: int, folder: Path | None
) -> dict[str, int | None]:
    """{"peak_bytes": ...} of a network, and of ours as `Runtime` has it "runtime_peak_bytes".

    None: more than there is. Nothing where it is not asked for.
    """
    if not options.peak_memory:
        return {}
    found = {"peak_bytes": peak_bytes(options, peer, side, batch, folder)}
    if peer in OURS and not options.train and options.neck == "none":
        found["runtime_peak_bytes"] = peak_bytes(options, peer, side, batch, folder, runtime=True)
    return found


def _line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    cells = (
        str(row["size"]),
        str(row["batch"]),
        row["peer"] or "-",
        number("ms_per_image", ".2f"),
        number("peer_ms_per_image", ".2f"),
        number("ratio", ".3f"),
        number("share_of_floor", ".0%"),
        number("peak_gflops", ".0f"),
        *(f"{row[key] / 2**20:.0f}" if row.get(key) else "-" for key in ("peak_bytes", "peer_peak_bytes")),
        " / ".join(f"{row[key] / 2**20:.0f}" for key in RUNTIME if row.get(key)) or "-",
        str(row["pairs"]),
    )
    return table_line(cells, HEADER)
