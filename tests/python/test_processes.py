# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` compiled, in many threads, in forked workers, in two processes, and learning."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ddp
import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, run, small
from torch import Tensor, nn
from vimcore import _core

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_compile() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    wanted, grads = run(model, images)
    compiled = torch.compile(model, backend="eager")
    x = images.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    logits = compiled(x)
    assert torch.equal(logits, wanted)
    logits.sum().backward()
    assert torch.equal(x.grad, grads["input"])
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(
            torch.compile(lambda t: model(t).softmax(1), backend="eager")(images), wanted.softmax(1)
        )


def test_many_threads_give_the_same_bits() -> None:
    """One module, twelve callers: inference and whole training steps of their own inputs."""
    torch.set_num_threads(2)
    model = build(SMALL)
    inputs = [images_for(SMALL, 1 + i % 3, torch.float32, seed=i) for i in range(12)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    gradients = [run(model, x)[1]["input"].clone() for x in inputs]

    def infer(i: int) -> Tensor:
        with torch.no_grad():
            return model(inputs[i])

    def train(i: int) -> Tensor:
        x = inputs[i].clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]

    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            found = list(pool.map(infer, range(12)))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            found = list(pool.map(train, range(12)))
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


class Predictions(torch.utils.data.Dataset[Tensor]):
    """Runs the model, forward and backward, where the data is loaded: in forked workers."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], threads: int) -> None:
        self.model, self.inputs, self.threads = model, inputs, threads

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(self.threads)
        x = self.inputs[index].clone().requires_grad_()
        logits = self.model(x)
        (grad,) = torch.autograd.grad(logits.sum(), x)
        return torch.cat([logits.detach().flatten(), grad.flatten()])


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers(threads: int) -> None:
    torch.set_num_threads(2)
    model = build(SMALL)
    data = Predictions(model, [images_for(SMALL, 1, torch.float32, seed=i) for i in range(6)], threads)
    wanted = [data[i] for i in range(6)]  # the parent's worker threads are running before the fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for _ in range(2):
        found = list(loader)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(data[0], wanted[0])  # and the parent goes on


def ddp_worker(rank: int, folder: str) -> None:
    """One process of two: a step on its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    try:
        model = nn.parallel.DistributedDataParallel(build(SMALL, dtype=torch.float64))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        images = images_for(SMALL, 4).chunk(2)[rank]
        for _ in range(2):
            optimiser.zero_grad()
            model(images).square().mean().backward()
            optimiser.step()
        torch.save(model.module.state_dict(), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def workers(rank: int, folder: str) -> None:
    """What one process of two does, one thing after the other: torch is imported once."""
    for name in ("step", "autocast", "sharded"):
        (Path(folder) / name).mkdir(exist_ok=True)
    ddp_worker(rank, f"{folder}/step")
    ddp.worker(rank, f"{folder}/autocast", 2, "gloo", "cpu", torch.bfloat16, 4)
    ddp.sharded_worker(rank, f"{folder}/sharded", 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(workers, (str(folder),), nprocs=2)
    return folder


def test_distributed_step_is_the_step_of_one_process(two: Path) -> None:
    model, images = build(SMALL, dtype=torch.float64), images_for(SMALL, 4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimiser.zero_grad()
        model(images).square().mean().backward()
        optimiser.step()
    first, second = ddp.found(two / "step", 2)
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert relative(first[key] - start[key], value - start[key]) < 1e-9, key


def test_distributed_gradients_are_those_of_the_joined_batch(two: Path) -> None:
    """Under autocast; tests/gpu/test_cuda.py has the same on a GPU."""
    truth = ddp.alone("cpu", torch.bfloat16)
    ddp.assert_agree(ddp.found(two / "autocast", 2), truth, 1e-4)


def test_sharded_networks_learn_as_one_and_broadcasts_are_seen(two: Path) -> None:
    """FSDP2 puts the gathered weights into the same modules for the time of a call."""
    model, images, losses = build(SMALL), images_for(SMALL, 4, torch.float32), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(ddp.STEPS + 1):
        optimizer.zero_grad()
        losses.append(ddp.losses_of(model, images, torch.float32))
        losses[-1].backward()
        optimizer.step()
    doubled = build(SMALL)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
        wanted = doubled(torch.ones_like(images[:1]))
    for found in ddp.found(two / "sharded", 2):
        assert relative(torch.stack(found["losses"]), torch.stack(losses).detach()) < 1e-5
        assert torch.equal(found["broadcast"], wanted)


def test_training_learns() -> None:
    """A few steps of AdamW fit eight images."""
    config = small(embed_dim=24, num_classes=4)
    model = vimcore.VisionMamba(**config.arguments())
    images, targets = images_for(config, 8, torch.float32), torch.arange(8) % 4
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    assert (model.eval()(images).argmax(1) == targets).all()


def test_chunk_lengths_are_those_documented() -> None:
    assert (_core.Saved.chunk("lean"), _core.Saved.chunk("fast")) == (64, 16)
