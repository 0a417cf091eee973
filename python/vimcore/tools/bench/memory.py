# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call: network, images and all that the call needs, measured in a process of its own.

On the CPU: the largest resident set during the call over the resident set before the network was made, once a
small call of the same kind has loaded what every call needs. On CUDA: what the device has less of afterwards,
since both torch and vimcore keep what a call has taken.

Measured is the torch module; of our network also `vimcore.Runtime` on its file, which is how a trained
network is used: in bfloat16 it has most weights in that type alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .common import Call, Options, forward_call, training_call

if TYPE_CHECKING:
    import torch

SECONDS = 900.0  # for one measurement
SMALL = 32  # pixels a side of the call before


def peak_bytes(
    options: Options, peer: str | None, side: int, batch: int, folder: Path | None, *, runtime: bool = False
) -> int | None:
    """Bytes; None where the call needs more memory than there is.

    Args:
        runtime: of `vimcore.Runtime` instead of the module.

    Raises:
        RuntimeError: the process failed for another reason, or took too long.
    """
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "table"}
    values["peers_dir"] = None
    task = {
        "options": values,
        "peer": peer,
        "side": side,
        "batch": batch,
        "folder": None if folder is None else str(folder),
        "runtime": runtime,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"memory of {peer or 'vimcore'}, {side} px: no result in {SECONDS:g} s") from None
    text = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -9 or "out of memory" in done.stderr.lower() or "MemoryError" in text:
        return None
    if done.returncode:
        raise RuntimeError(f"memory of {peer or 'vimcore'}, {side} px: {text}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """Reads the task from stdin, prints the bytes."""
    import torch

    task: dict[str, Any] = json.load(sys.stdin)
    options = Options(**task["options"])
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.zeros(1, device=device).sum().item()  # what torch itself takes once
    print(_of_runtime(task, options) if task["runtime"] else _of_module(task, options, device))


def _of_module(task: dict[str, Any], options: Options, device: torch.device) -> int:
    import torch

    from .networks import build, dtype_of, placed

    folder = None if task["folder"] is None else Path(task["folder"])

    def call_of(side: int, batch: int) -> Call:
        dtype = dtype_of(options, task["peer"])
        model = placed(build(options, task["peer"], side, folder), device, dtype)
        images = torch.randn(batch, 3, side, side, device=device).to(dtype)
        if options.train:
            return training_call(model, images, torch.randint(1000, (batch,), device=device))
        return forward_call(model, images)

    if device.type == "cpu":  # a device would keep what this takes
        call_of(SMALL, 1)()
        _give_back()
    before = _taken(device)
    call = call_of(task["side"], task["batch"])
    _forget_peak(device)
    call()
    return _taken(device, peak=True) - before


def _of_runtime(task: dict[str, Any], options: Options) -> int:
    import numpy as np
    import torch

    from ...nn.vision_mamba import VisionMamba
    from ...runtime import Runtime
    from .networks import build

    cpu = torch.device("cpu")
    dtype = "float32" if task["peer"] == "vimcore-float32" else options.dtype
    with TemporaryDirectory() as place:
        path = Path(place) / "network.safetensors"
        network = build(options, None, task["side"], None)
        assert isinstance(network, VisionMamba)
        network.save(path)
        del network

        def call(side: int, batch: int) -> None:
            images = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
            runtime = Runtime(path, threads=options.threads, img_size=side, dtype=dtype)
            _forget_peak(cpu)
            runtime(images)

        call(SMALL, 1)
        _give_back()
        before = _taken(cpu)
        call(task["side"], task["batch"])
        return _taken(cpu, peak=True) - before


def _give_back() -> None:
    """Returns freed memory to the system, so that what is measured cannot take it unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _taken(device: Any, peak: bool = False) -> int:
    """Bytes that are in use, or were at most since `_forget_peak`."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {wanted}")


def _forget_peak(device: Any) -> None:
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
