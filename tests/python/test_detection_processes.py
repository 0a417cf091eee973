# SPDX-License-Identifier: Apache-2.0
"""The detector under `DistributedDataParallel`: two processes, a picture each, beside one with both.

Every process divides its losses by its own counts of anchors and boxes, and DDP takes the mean. Where counts
are equal, that is the loss of the joined batch. Otherwise it is the mean of the pictures' losses, while the
joined batch weighs a picture by its boxes: as in detectron2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detection_helpers import detector, target
from torch import Tensor, nn
from vimcore.detection import CascadeMaskRCNN

pytestmark = pytest.mark.slow

# Counts that nothing reaches: all anchors and boxes are taken, none drawn at random.
ALL = {"anchors_sampled": 2000, "boxes_sampled": 400, "proposals": 8}
CASES: dict[str, dict[str, Any]] = {"equal counts": {"masks": False}, "masks": {"masks": True}}
TARGETS = [target((2, 3, 14, 20), (10, 8, 30, 28)), target((5, 5, 21, 17), (1, 18, 12, 31))]
STEPS = 2


def pictures() -> list[Tensor]:
    return list(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def network(case: str) -> CascadeMaskRCNN:
    return detector(**{**ALL, **CASES[case]}).double()


def step(model: nn.Module, which: list[int]) -> dict[str, Tensor]:
    """Losses by name, and gradients, of these pictures."""
    images, targets = pictures(), TARGETS
    model.zero_grad()
    losses = model([images[i].double() for i in which], [targets[i] for i in which])
    torch.stack(list(losses.values())).sum().backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in trained(model) if p.grad is not None}
    return {**{name: loss.detach() for name, loss in losses.items()}, **gradients}


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]


def learn(model: nn.Module, which: list[int]) -> list[dict[str, Tensor]]:
    """A few steps, and the weights after the last."""
    optimizer, found = torch.optim.SGD([p for _, p in trained(model)], lr=0.01), []
    for _ in range(STEPS):
        found.append(step(model, which))
        optimizer.step()
    return [*found, {name: p.detach().clone() for name, p in trained(model)}]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    try:
        for case in CASES:
            model = nn.parallel.DistributedDataParallel(network(case))
            torch.save(learn(model, [rank]), Path(folder) / f"{case} {rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    path = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(worker, (str(path),), nprocs=2)
    return path


def close(found: Tensor, wanted: Tensor, name: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_mean_of_the_processes(folder: Path, case: str) -> None:
    found = [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)]
    alone = [step(network(case), [i]) for i in range(2)]
    for rank in range(2):
        assert found[rank][0].keys() == alone[rank].keys()
        for name, value in found[rank][0].items():
            of_both = torch.stack([x[name] for x in alone]).mean(0)
            close(value, of_both if name.startswith("gradient of ") else alone[rank][name], name)
    assert sum(name.startswith("gradient of ") for name in alone[0]) == len(trained(network(case)))
    first, second = (x[-1] for x in found)
    start = dict(trained(network(case)))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, start[name]), name


def test_equal_counts_make_it_the_step_of_the_joined_batch(folder: Path) -> None:
    case = "equal counts"
    joined = learn(network(case), [0, 1])
    found = [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)]
    for at in range(STEPS):
        for name, value in joined[at].items():
            close(torch.stack([x[at][name] for x in found]).mean(0), value, name)
    for name, value in joined[-1].items():
        close(found[0][-1][name], value, name)


def test_the_joined_batch_weighs_pictures_by_their_boxes(folder: Path) -> None:
    """Which the mean of the processes does not; the proposals' losses, over equal counts, agree."""
    joined = step(network("masks"), [0, 1])
    found = [torch.load(folder / f"masks {rank}.pt")[0] for rank in range(2)]
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        close(torch.stack([x[name] for x in found]).mean(0), joined[name], name)
    low, high = sorted(float(x["loss_mask"]) for x in found)
    assert low < float(joined["loss_mask"]) < high
