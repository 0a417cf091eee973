# SPDX-License-Identifier: Apache-2.0
"""Where a run computes, and how much memory it took."""

from __future__ import annotations

import resource

import torch

from .. import cuda_is_available
from ..utils.precision import check_precision


def choose_device(
    name: str, precision: str = "float32", local_rank: int = 0, what: str = "precision"
) -> torch.device:
    """Where to compute.

    Args:
        name: "auto", "cpu", "cuda" (that of this process) or "cuda:N".
        what: names the precision in messages.

    Raises:
        ValueError: there is no such device, or it does not compute in this type.
        vimcore.Error: this CPU has no unit for bfloat16.
    """
    found = cuda_is_available() and torch.cuda.is_available()
    kind, _, number = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu" or (name == "auto" and not found):
        check_precision(what, precision, "cpu")
        return torch.device("cpu")
    if not found:
        reason = "torch finds no GPU" if cuda_is_available() else "this build of vimcore finds no GPU"
        raise ValueError(f"device: {name}: {reason}; see vimcore doctor")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(f"device: cuda:{index}: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of the process on the CPU, of torch's allocations on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
