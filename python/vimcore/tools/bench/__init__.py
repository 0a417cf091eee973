# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench`: speed against peers, on the CPU and on CUDA."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...utils.extras import required
from ...utils.files import literal
from .common import NECKS, PEERS, USUAL_PEERS, Options, environment, machine, versions
from .peers import peers_folder

__all__ = ["NECKS", "PEERS", "USUAL_PEERS", "Options", "run"]

Measure = Callable[[Options, int, int, "Path | None", "dict[str, str]"], "list[dict[str, Any]]"]


def run(options: Options) -> dict[str, Any]:
    """Measures every image size and batch; prints a row of the table after each.

    Returns:
        The report: date, machine, versions and build, settings, rows with their samples, skipped peers.

    Raises:
        FileNotFoundError: there are no peers in ``peers_dir``.
        RuntimeError: torch is not installed, or there is no such device.
    """
    import vimcore

    with required("the benchmark", "torch"):
        import torch
    folder = peers_folder(options.peers_dir)
    measure, header, where = _of_device(options)
    if folder is None and options.peers:
        print("no peers: they live in tests/bench of a source checkout; give --peers-dir", file=sys.stderr)
    skipped: dict[str, str] = {}
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "build": vimcore.build_info(),
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "neck": options.neck,
        "rows": [],
    }
    mode = f"forward and backward ({options.memory})" if options.train else "forward"
    if options.neck != "none":
        mode = f"backbone and {options.neck} pyramid, {mode}"
    print(f"{options.model}, {mode}, {options.dtype}, {where}", file=options.table)
    if given := environment():
        shown = ", ".join(f"{name}={literal(value)}" for name, value in given.items())
        print(f"set in the environment, which may change times: {shown}", file=sys.stderr)
    print("  ".join(header), file=options.table, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for side in options.sizes:
            for batch in options.batch:
                report["rows"] += measure(options, side, batch, folder, skipped)
    finally:
        torch.set_num_threads(threads)
    for name, why in skipped.items():
        print(f"{name}: {why}", file=sys.stderr)
    report["skipped"] = skipped
    return report


def _of_device(options: Options) -> tuple[Measure, Sequence[str], str]:
    """What measures one image size and batch, the titles of its columns, and the device in words."""
    if options.device == "cpu":
        from . import cpu

        return cpu.measure, cpu.HEADER, f"{options.threads} threads, {machine()['cpu']}"
    from . import cuda

    where = cuda.prepare(options)
    return cuda.measure, cuda.HEADER, where
