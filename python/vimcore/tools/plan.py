# SPDX-License-Identifier: Apache-2.0
"""`vimcore plan`: how much memory a network needs, and which batches fit, before any of it is taken.

Counted are weights and their packed or cast forms, images, scratch memory and, for training, what backward
keeps, gradients, and the two moments of AdamW, as float32; an upper estimate. Not counted: the interpreter
and torch, on a GPU the driver's own, and what the loss takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from .. import _core
from ..utils import options
from ..weights.metadata import unpack
from .bench.cpu import WIDTHS

MODES = {"inference": "", "training, least": "least", "training, lean": "lean", "training, fast": "fast"}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16", "float16")}
BATCHES = (1, 8, 32, 128)
MOST = 1 << 20  # images of the largest batch that is looked for


def parse_bytes(text: str) -> int:
    """Type of an option: "80G", "512M", "1.5T" or plain bytes, by powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    value = float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected bytes such as 80G or 512M, got {text!r}")
    return int(value)


def parse_size(text: str) -> tuple[int, int]:
    """Type of an option: "224", or height x width as "512x1024"."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected pixels such as 224 or 512x1024, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(WIDTHS), default="vim_tiny", help="default: %(default)s")
    parser.add_argument("--weights", metavar="FILE", help="the architecture of this vimcore file instead")
    parser.add_argument(
        "--size", type=parse_size, metavar="PIXELS", help="224, or 512x1024 (default: 224 or the file's)"
    )
    parser.add_argument(
        "--batch",
        type=options.positive,
        nargs="+",
        metavar="N",
        help=f"default: {' '.join(map(str, BATCHES))}",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), nargs="+", default=["cpu", "cuda"], help="default: both"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES["cuda"],
        default="bfloat16",
        help="of activations on cuda (default: %(default)s)",
    )
    parser.add_argument("--threads", type=options.threads, help="on the cpu (default: all cores)")
    parser.add_argument(
        "--device-memory",
        type=parse_bytes,
        metavar="BYTES",
        help="80G, 512M, ...: say what fits (cpu: this machine's)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with the parts of every sum")


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
        dtype: of activations: "float32", on cuda also "bfloat16" or "float16".
        threads: on the cpu.
    """
    if dtype not in DTYPES[device]:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES[device])} on {device}, got {dtype!r}")
    text = _core.config_normalize(json.dumps(config))
    normal = json.loads(text)
    parts = _core.plan_bytes(text, batch, MODES[mode], dtype, threads, device == "cuda")
    weights, half = parts["weights"], dtype != "float32"
    # the CPU packs every weight; CUDA casts to 16 bits, and in float32 puts pairs side by side
    parts["packed"] = weights if device == "cpu" else weights // 2 if half else weights // 8
    height, width = normal["img_size"]
    pixels = batch * normal["in_chans"] * height * width
    parts["images"] = pixels * (6 if half else 4)  # float32, and cast
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
    """The most images that fit into so many bytes; 0 if not one does."""

    def fits(batch: int) -> bool:
        return sum(needed(config, batch, mode, device, dtype, threads).values()) <= memory

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def shown(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def report(args: argparse.Namespace) -> dict[str, Any]:
    """The whole plan: a row for each device, mode and batch, and what fits."""
    if args.weights:
        config = unpack(_core.safetensors_header(args.weights)[1], args.weights)[0]
    else:
        config = {"embed_dim": WIDTHS[args.model], "img_size": [224, 224]}
    if args.size:
        config["img_size"] = list(args.size)
    config = json.loads(_core.config_normalize(json.dumps(config)))
    facts = _core.config_facts(json.dumps(config))
    threads = args.threads or len(os.sched_getaffinity(0))
    rows, largest = [], []
    for device in dict.fromkeys(args.device):
        dtype = args.dtype if device == "cuda" else "float32"
        memory = args.device_memory or (_core.machine_bytes() if device == "cpu" else None)
        for mode in MODES:
            where = {"device": device, "dtype": dtype, "mode": mode}
            for batch in dict.fromkeys(args.batch or BATCHES):
                parts = needed(config, batch, mode, device, dtype, threads)
                total = sum(parts.values())
                fits = None if memory is None else total <= memory
                rows.append({**where, "batch": batch, "bytes": total, "fits": fits, "parts": parts})
            if memory is not None:
                batch = largest_batch(memory, config, mode, device, dtype, threads)
                largest.append({**where, "memory": memory, "batch": batch})
    return {"config": config, "tokens": facts["tokens"], "threads": threads, "rows": rows, "largest": largest}


def table(found: dict[str, Any]) -> Sequence[Sequence[str]]:
    """The plan as rows of cells: a line for each device and mode."""
    batches = list(dict.fromkeys(row["batch"] for row in found["rows"]))
    limits = {(row["device"], row["mode"]): row for row in found["largest"]}
    lines = [["device", "dtype", "mode", *(f"batch {b}" for b in batches), "largest batch that fits"]]
    for device, mode in dict.fromkeys((row["device"], row["mode"]) for row in found["rows"]):
        own = {row["batch"]: row for row in found["rows"] if (row["device"], row["mode"]) == (device, mode)}
        cells = [
            shown(own[b]["bytes"]) + ("" if own[b]["fits"] in (True, None) else " (no)") for b in batches
        ]
        last = "-"
        if limit := limits.get((device, mode)):
            count = limit["batch"]
            last = "none" if count == 0 else f"{count}{'+' if count >= MOST else ''}"
            last += f" in {shown(limit['memory'])}"
        lines.append([device, own[batches[0]]["dtype"], mode, *cells, last])
    return lines
