# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench --device cuda`: speed against peers on one GPU, in interleaved pairs in one process.

A sample is as many calls back to back as fill `Options.sample` seconds, between two CUDA events; figures are
medians over pairs (ours, peer, ours, peer, ...). Everything is measured twice: called from Python, and
replayed from a CUDA graph. The latency is the time on the host's clock from the call until the GPU is done,
median over single calls. Weights and images of a peer are in the type that ours computes in.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ... import _core
from .common import Call, Options, table_line, training_call
from .memory import peak_bytes
from .networks import WITHOUT_NECK, build, placed

LATENCY_CALLS = 50
PEERS = ("torch", "torch-materialised", "vim-torch")
HEADER = (
    "pixels",
    "batch",
    "graph",
    "peer".rjust(9),
    "ours img/s",
    "peer img/s",
    "ratio",
    "latency ms",
    "ours MiB",
    "peer MiB",
    "pairs",
)


def event_seconds(call: Call, count: int) -> float:
    """Seconds of one call on the GPU, over `count` calls back to back."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def calls_for(call: Call, seconds: float) -> int:
    """The number of calls that fill `seconds`; warms up on the way."""
    for _ in range(3):
        call()
    return max(1, round(seconds / max(event_seconds(call, 3), 1e-7)))


def latency(call: Call) -> float:
    """Seconds from the call until the GPU has finished it: the median of single calls."""
    found = []
    for _ in range(LATENCY_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found)


def graphed(call: Call) -> Call:
    """Records the call as a CUDA graph; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _forward(model: Any, images: torch.Tensor) -> Call:
    def forward() -> Any:
        with torch.inference_mode():
            return model(images)

    return forward


def _call(options: Options, model: Any, images: torch.Tensor) -> Call:
    """The call that is timed: forward, or forward and backward."""
    if not options.train:
        return _forward(model.eval(), images)
    return training_call(model, images, torch.randint(1000, (len(images),), device=images.device))


def _interleave(ours: Call, peer: Call | None, options: Options) -> dict[str, list[float]]:
    calls = {"ours": ours} if peer is None else {"ours": ours, "peer": peer}
    counts = {name: calls_for(call, options.sample) for name, call in calls.items()}
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    begin = time.perf_counter()
    while len(found["ours"]) < options.pairs and (
        not found["ours"] or time.perf_counter() - begin < options.seconds
    ):
        for name, call in calls.items():
            found[name].append(event_seconds(call, counts[name]))
    return found


def prepare(options: Options) -> str:
    """Description of the device; an error that says why nothing can be measured."""
    device = torch.device(options.device)
    description = _core.cuda_description(device.index or 0)
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # nor does vimcore
    return description


def measure(
    options: Options, side: int, batch: int, folder: Path | None, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """All rows of one image size and batch: with and without graph, one for each peer or one without any."""
    peers: list[str | None] = [None]
    skipped.update({name: "is measured on the CPU" for name in options.peers if name not in PEERS})
    if folder is not None and any(name in PEERS for name in options.peers):
        peers = [name for name in options.peers if name in PEERS]
    if options.neck != "none" and WITHOUT_NECK & set(peers):
        skipped.update(dict.fromkeys(WITHOUT_NECK, "is measured as a classifier only"))
        peers = [name for name in peers if name not in WITHOUT_NECK]
    dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    model = placed(build(options, None, side, folder), device, dtype)
    images = torch.randn(batch, 3, side, side, device=options.device).to(dtype)
    eager = _call(options, model, images)
    rows = []
    for graph in (False, True):
        ours = graphed(eager) if graph else eager
        waits = latency(ours)
        for name in peers:
            peer: Call | None = None
            if name is not None and folder is not None:
                other = placed(build(options, name, side, folder), device, dtype)
                peer = graphed(_call(options, other, images)) if graph else _call(options, other, images)
            found = _interleave(ours, peer, options)
            row: dict[str, Any] = {
                "model": options.model,
                "size": side,
                "batch": batch,
                "mode": "train" if options.train else "forward",
                "neck": options.neck,
                "dtype": options.dtype,
                "graph": graph,
                "peer": name,
                "pairs": len(found["ours"]),
                "latency_ms": 1e3 * waits,
                "ms_per_image": 1e3 * median(found["ours"]) / batch,
                "images_per_s": batch / median(found["ours"]),
                "samples": found,
            }
            if peer is not None:
                row["peer_images_per_s"] = batch / median(found["peer"])
                row["ratio"] = median(a / b for a, b in zip(found["ours"], found["peer"], strict=True))
            if options.peak_memory:
                row["peak_bytes"] = peak_bytes(options, None, side, batch, folder)
                if peer is not None:
                    row["peer_peak_bytes"] = peak_bytes(options, name, side, batch, folder)
            rows.append(row)
            print(_line(row), file=options.table, flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    cells = (
        str(row["size"]),
        str(row["batch"]),
        "yes" if row["graph"] else "no",
        row["peer"] or "-",
        f"{row['images_per_s']:.0f}",
        f"{row['peer_images_per_s']:.0f}" if "ratio" in row else "-",
        f"{row['ratio']:.3f}" if "ratio" in row else "-",
        f"{row['latency_ms']:.3f}",
        *(f"{row[key] / 2**20:.0f}" if row.get(key) else "-" for key in ("peak_bytes", "peer_peak_bytes")),
        str(row["pairs"]),
    )
    return table_line(cells, HEADER)
