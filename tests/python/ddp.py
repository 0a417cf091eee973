# SPDX-License-Identifier: Apache-2.0
"""Training steps under `DistributedDataParallel`, on the CPU or a GPU, for the tests of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import SMALL, build, images_for
from torch import Tensor, nn

STEPS = 2


def losses_of(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over the batch; 16-bit types through autocast."""
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype, enabled=half):
        logits = model(images)
    return logits.float().square().mean()


def steps(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of the first of a few steps, and the weights after the last, on the CPU."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses_of(model, images, dtype).backward()
        if step == 0:
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                found[f"gradient of {name.removeprefix('module.')}"] = p.grad.cpu().clone()
        optimizer.step()
    return found | {n.removeprefix("module."): p.detach().cpu() for n, p in model.named_parameters()}


def alone(device: str, dtype: torch.dtype, batch: int = 4) -> dict[str, Tensor]:
    """What one process finds with the whole batch."""
    images = images_for(SMALL, batch, torch.float32).to(device)
    return steps(build(SMALL).to(device), images, dtype)


def worker(
    rank: int, folder: str, world: int, backend: str, device: str, dtype: torch.dtype, batch: int
) -> None:
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, f"file://{folder}/store", world_size=world, rank=rank)
    try:
        model = nn.parallel.DistributedDataParallel(build(SMALL).to(device))
        images = images_for(SMALL, batch, torch.float32).chunk(world)[rank].to(device)
        torch.save(steps(model, images, dtype), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def found(folder: Path, world: int) -> list[dict[str, Any]]:
    """What each process left."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def together(
    folder: Path, world: int, backend: str, device: str, dtype: torch.dtype, batch: int = 4
) -> list[dict[str, Tensor]]:
    """What each of `world` processes finds, each with its part of the batch; a worker's error is raised here.

    Several processes share the one GPU, which nccl refuses and gloo allows.
    """
    arguments = (str(folder), world, backend, device, dtype, batch)
    torch.multiprocessing.spawn(worker, arguments, nprocs=world)
    return found(folder, world)


def assert_agree(found: list[dict[str, Tensor]], truth: dict[str, Tensor], tolerance: float) -> None:
    """All processes have the same bits, close to those of one process."""
    start = {name: p.detach() for name, p in build(SMALL).named_parameters()}
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    assert found[0].keys() == truth.keys()
    largest = max(float(v.norm()) for name, v in truth.items() if name.startswith("gradient of "))
    for name, value in truth.items():
        error, size = float((found[0][name] - value).norm()), float(value.norm())
        if name in start:  # a weight: how far it went
            size = float((value - start[name]).norm())
            assert size > 0, name
        assert error <= tolerance * max(size, 1e-3 * largest), name


def sharded_worker(rank: int, folder: str, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        images = images_for(SMALL, 2 * world, torch.float32).chunk(world)[rank]
        model = fully_shard(build(SMALL), mesh=mesh)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(STEPS + 1):
            optimizer.zero_grad()
            loss = losses_of(model, images, torch.float32)
            loss.backward()
            optimizer.step()
            dist.all_reduce(loss := loss.detach().clone())
            losses.append(loss / world)
        # a broadcast writes without being counted
        plain = build(SMALL)
        with torch.no_grad():
            plain(images)
            for p in plain.parameters():
                p.mul_(1 + rank)
                plain(images)
                dist.broadcast(p.data, world - 1)
            torch.save(
                {"losses": losses, "broadcast": plain(torch.ones_like(images[:1]))},
                Path(folder) / f"{rank}.pt",
            )
    finally:
        dist.destroy_process_group()
