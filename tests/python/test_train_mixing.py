# SPDX-License-Identifier: Apache-2.0
"""Batches that a classifier learns from: Mixup or CutMix of an image and its mirror place; soft targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vimcore.data.classes import Sample
from vimcore.tasks.classification.settings import ClassificationSettings
from vimcore.tasks.classification.task import Classification

SIZES: dict[str, Any] = {"data": "digits", "img_size": (16,), "patch_size": 8, "embed_dim": 16, "depth": 1}
CPU = torch.device("cpu")


def task_with(**changes: Any) -> Classification:
    task = Classification(ClassificationSettings().merged({**SIZES, "augment": "none", **changes}))
    task.data()
    return task


def batch() -> Sample:
    """No image is of the class of its mirror place."""
    return Sample(torch.rand(8, 1, 16, 16) + 1, torch.arange(8), torch.arange(8))


def mixed(task: Classification, seed: int) -> tuple[str, float, Tensor]:
    """What was done, the share of an image's own, and the targets; the images are checked."""
    given = batch()
    np.random.seed(seed)  # noqa: NPY002  timm draws from it
    images, targets = task.prepare(Sample(given.images.clone(), given.labels, given.indices), CPU)
    assert targets.shape == (8, 10)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    off = 0.1 / 10
    own = (targets[torch.arange(8), given.labels] - off) / 0.9
    share = float(own[0])
    assert torch.allclose(own, torch.full((8,), share), atol=1e-5)
    wanted = off + 0.9 * (
        share * F.one_hot(given.labels, 10) + (1 - share) * F.one_hot(given.labels.flip(0), 10)
    )
    assert torch.allclose(targets, wanted, atol=1e-5)
    other = given.images.flip(0)
    if torch.allclose(images, given.images * share + other * (1 - share), atol=1e-5):
        return "mixup", share, targets
    kept = images == given.images
    assert (kept | (images == other)).all()
    assert float(kept.float().mean()) == pytest.approx(share, abs=1e-5)
    return "cutmix", share, targets


def test_one_of_two_ways_for_every_batch() -> None:
    task = task_with()
    found = [mixed(task, seed)[:2] for seed in range(40)]
    assert 10 <= sum(kind == "mixup" for kind, _ in found) <= 30
    assert len({share for _, share in found}) > 30


@pytest.mark.parametrize(("off", "kind"), [("mixup", "cutmix"), ("cutmix", "mixup")])
def test_one_of_them_alone(off: str, kind: str) -> None:
    task = task_with(**{off: 0.0})
    assert {mixed(task, seed)[0] for seed in range(10) if mixed(task, seed)[1] < 1} == {kind}


def test_neither() -> None:
    """Labels stay numbers, smoothed by the loss."""
    task, given = task_with(mixup=0.0, cutmix=0.0), batch()
    images, labels = task.prepare(given, CPU)
    assert torch.equal(images, given.images)
    assert torch.equal(labels, given.labels)
    logits = torch.randn(8, 10)
    loss, _ = task.loss(torch.nn.Identity(), (logits, labels))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_loss_of_soft_targets() -> None:
    task, logits = task_with(), torch.randn(8, 10)
    targets = mixed(task, 0)[2]
    loss, _ = task.loss(torch.nn.Identity(), (logits, targets))
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(1)).sum(1).mean())
