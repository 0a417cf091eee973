# SPDX-License-Identifier: Apache-2.0
"""Several processes, started by torchrun: who this one is, and the few numbers that they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 for the one that writes."""
    return dist.get_rank() if _initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def process_group(cuda: bool) -> Iterator[None]:
    """Joins the processes that torchrun started, by nccl on CUDA and gloo on CPUs; alone it does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def destroy_process_group() -> None:
    """Ends the group: what follows is done by this process alone."""
    if _initialized():
        dist.destroy_process_group()


def mean(value: float) -> float:
    """The mean of all processes."""
    return sums([value])[0] / world()


def sums(values: list[float]) -> list[float]:
    """The sums of all processes, in float64."""
    if not _initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return list(map(float, tensor.tolist()))


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; what pickle can send."""
    if not _initialized():
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def union(found: dict[str, str]) -> dict[str, str]:
    """What any of the processes found."""
    return {name: text for part in gather(found) for name, text in part.items()}


def on_gpus() -> bool:
    """Whether there are several processes, each with a GPU of its own."""
    return world() > 1 and dist.get_backend() == "nccl"


def share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's buffers, such as the statistics of BatchNorm."""
    if not _initialized():
        return
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
