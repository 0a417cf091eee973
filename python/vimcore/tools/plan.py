# SPDX-License-Identifier: Apache-2.0
"""`vimcore plan`: the memory that a network needs, and the largest batch that fits.

Counted are weights and their packed or cast copies (an estimate), images, scratch memory (to the byte, as it
grows in the first call; on CUDA with 32 MiB for cuBLASLt) and, for training, activations saved for backward,
gradients and the two moments of AdamW in float32. Inference is that of `Runtime` and `vim-infer`: in bfloat16
on the CPU it keeps most weights in that type alone, and converts images as it cuts them. Not counted are the
interpreter, torch, the memory of a GPU's driver and the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from .. import _core
from .._core import Config
from ..config import WIDTHS
from ..utils.precision import check_precision
from ..weights.metadata import unpack

MODES = {"inference": "", "training, least": "least", "training, lean": "lean", "training, fast": "fast"}
USUAL = {"cpu": "float32", "cuda": "bfloat16"}  # type of activations where none is named
BATCHES = (1, 8, 32, 128)
MOST = 1 << 20  # the search for the largest batch ends here


def needed(
    config: dict[str, Any],
    batch: int,
    mode: str,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
) -> dict[str, int]:
    """Bytes by part for a batch of images; their sum is what the network needs.

    Args:
        config: constructor arguments of `VisionMamba`.
        mode: a key of `MODES`.
        device: "cpu" or "cuda", which need not be there.
        dtype: of activations: "float32", "bfloat16", on cuda also "float16".
        threads: on the cpu.

    Raises:
        ValueError, vimcore.Error: activations are not of this type there.
    """
    check_precision("dtype", dtype, device)
    architecture = Config(**config)
    parts = _core.plan_bytes(architecture, batch, MODES[mode], dtype, threads, device == "cuda")
    weights, half = parts["weights"], dtype != "float32"
    alone = half and device == "cpu" and not MODES[mode]  # packed weights are all that there are
    # the CPU packs every weight; 16 bits are cast; CUDA puts pairs of float32 side by side
    parts["packed"] = 0 if alone else weights // 2 if half else weights if device == "cpu" else weights // 8
    pixels = batch * architecture.in_chans * (architecture.frames or 1) * math.prod(architecture.img_size)
    parts["images"] = pixels * (6 if half and not alone else 4)  # float32, and cast
    if MODES[mode]:
        parts["gradients"], parts["optimizer"] = weights, 2 * weights
    return parts


def largest_batch(
    memory: int,
    config: dict[str, Any],
    mode: str,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
) -> int:
    """The largest batch that fits into `memory` bytes; 0 if not even one image does."""

    def fits(batch: int) -> bool:
        return sum(needed(config, batch, mode, device, dtype, threads).values()) <= memory

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def readable(count: float) -> str:
    """Bytes with a unit, as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def report(
    model: str = "vim_tiny",
    weights: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = BATCHES,
    devices: Sequence[str] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> dict[str, Any]:
    """The memory needed by device, mode and batch size, and the largest batch that fits.

    Args:
        model: a key of `config.WIDTHS`.
        weights: a vimcore file, whose architecture is taken instead.
        size: (height, width) in pixels; default: 224 x 224, or the file's.
        devices: some of "cpu" and "cuda"; default: both, as far as they compute in `dtype`.
        dtype: of activations; default: those of `USUAL`.
        threads: on the cpu; default: all cores.
        memory: bytes to fit into; default on the cpu: this machine's.

    Raises:
        ValueError, vimcore.Error: activations are not of this type on one of the devices.
    """
    if devices is None:
        devices = [device for device in USUAL if dtype is None or _computes(dtype, device)]
    if weights:
        config = unpack(_core.safetensors_header(weights)[1], weights).config.to_dict()
    else:
        config = {"embed_dim": WIDTHS[model], "img_size": [224, 224]}
    if size:
        config["img_size"] = list(size)
    architecture = Config(**config)
    config, tokens = architecture.to_dict(), architecture.tokens
    threads = threads or len(os.sched_getaffinity(0))
    rows, largest = [], []
    for device in dict.fromkeys(devices):
        of_device = dtype or USUAL[device]
        limit = memory or (_core.machine_bytes() if device == "cpu" else None)
        for mode in MODES:
            case = {"device": device, "dtype": of_device, "mode": mode}
            for batch in dict.fromkeys(batches):
                parts = needed(config, batch, mode, device, of_device, threads)
                total = sum(parts.values())
                fits = None if limit is None else total <= limit
                rows.append({**case, "batch": batch, "bytes": total, "fits": fits, "parts": parts})
            if limit is not None:
                batch = largest_batch(limit, config, mode, device, of_device, threads)
                largest.append({**case, "memory": limit, "batch": batch})
    return {"config": config, "tokens": tokens, "threads": threads, "rows": rows, "largest": largest}


def _computes(dtype: str, device: str) -> bool:
    try:
        check_precision("dtype", dtype, device)
    except (ValueError, _core.Error):
        return False
    return True


def table(found: dict[str, Any]) -> Sequence[Sequence[str]]:
    """The rows of a printed table: a header, then one row per device and mode."""
    batches = list(dict.fromkeys(row["batch"] for row in found["rows"]))
    limits = {(row["device"], row["mode"]): row for row in found["largest"]}
    lines = [["device", "dtype", "mode", *(f"batch {b}" for b in batches), "largest batch that fits"]]
    for device, mode in dict.fromkeys((row["device"], row["mode"]) for row in found["rows"]):
        own = {row["batch"]: row for row in found["rows"] if (row["device"], row["mode"]) == (device, mode)}
        cells = [
            readable(own[b]["bytes"]) + ("" if own[b]["fits"] in (True, None) else " (no)") for b in batches
        ]
        last = "-"
        if limit := limits.get((device, mode)):
            count = limit["batch"]
            last = "none" if count == 0 else f"{count}{'+' if count >= MOST else ''}"
            last += f" in {readable(limit['memory'])}"
        lines.append([device, own[batches[0]]["dtype"], mode, *cells, last])
    return lines
