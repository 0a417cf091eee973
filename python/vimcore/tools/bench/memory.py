# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call: network, images and all that the call needs, measured in a process of its own.

On the CPU: the largest resident set during the call over the resident set before the network was made. On
CUDA: what the device has less of afterwards, since both torch and vimcore keep what a call has taken.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .common import Options, forward_call, training_call

SECONDS = 900.0  # for one measurement


def peak_bytes(options: Options, peer: str | None, side: int, batch: int, folder: Path | None) -> int | None:
    """Bytes; None where the call needs more memory than there is.

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

    from .networks import build, dtype_of, placed

    task: dict[str, Any] = json.load(sys.stdin)
    options = Options(**task["options"])
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.zeros(1, device=device).sum().item()  # what torch itself takes once
    before = _taken(device)
    folder = None if task["folder"] is None else Path(task["folder"])
    dtype = dtype_of(options, task["peer"])
    model = placed(build(options, task["peer"], task["side"], folder), device, dtype)
    images = torch.randn(task["batch"], 3, task["side"], task["side"], device=device).to(dtype)
    if options.train:
        call = training_call(model, images, torch.randint(1000, (task["batch"],), device=device))
    else:
        call = forward_call(model, images)
    _forget_peak(device)
    call()
    print(_taken(device, peak=True) - before)


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
