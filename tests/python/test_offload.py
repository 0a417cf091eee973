# SPDX-License-Identifier: Apache-2.0
"""Saved-tensor hooks: activations that leave between forward and backward, as offloading has it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from helpers import build, images_for, small
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from vimcore import _core

Hook = Callable[[], Any]


def gradients(model: vimcore.VisionMamba, images: Tensor, hook: Hook | None = None) -> list[Tensor]:
    """Of every parameter and of the images."""
    model.zero_grad(set_to_none=True)
    images = images.clone().requires_grad_()
    if hook is None:
        loss = model(images).square().sum()
    else:
        with hook():
            loss = model(images).square().sum()
    model(torch.full_like(images, 3.0)).sum()  # writes into memory that was given back too early
    loss.backward()
    assert images.grad is not None
    return [images.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def odd_address(tensor: Tensor) -> Tensor:
    """A copy that begins 4 bytes behind an aligned address."""
    room = torch.empty(tensor.numel() * tensor.element_size() + 64, dtype=torch.uint8)
    start = (-room.data_ptr() + 4) % 64
    place = room[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
    return place.view(tensor.shape).copy_(tensor)


def test_weights_stay_bound() -> None:
    """A hook that brings back copies of parameters makes no call bind the network again."""
    config = small()
    model, images = build(config, dtype=torch.float32), images_for(config, 2, torch.float32)
    wanted = gradients(model, images)
    core = model._core
    assert core is not None
    bound = core._bound
    for _ in range(2):
        found = gradients(
            model, images, lambda: saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)
        )
        assert core._bound is bound
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_parameters_gathered_elsewhere_between_forward_and_backward() -> None:
    """As sharded models do it: memory freed, had again at another address, no version counted."""
    config = small()
    model, images = build(config, dtype=torch.float32), images_for(config, 2, torch.float32)
    wanted = gradients(model, images)[1:]
    model.zero_grad(set_to_none=True)
    loss = model(images).square().sum()
    fillers = []
    for p in model.parameters():
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
            values, storage = p.detach().clone(), p.untyped_storage()
            size = storage.nbytes()
            storage.resize_(0)
            fillers.append(torch.full_like(values, 7.0))
            storage.resize_(size)
            p.copy_(values)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted))


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("kind", ["save_on_cpu", "clone", "disk", "odd address"])
def test_same_gradients(kind: str, memory: str, tmp_path: Path) -> None:
    files: list[Path] = []

    def store(tensor: Tensor) -> Path:
        files.append(tmp_path / f"{len(files)}.npy")
        np.save(files[-1], tensor.detach().numpy())
        return files[-1]

    hooks: dict[str, Hook] = {
        "save_on_cpu": save_on_cpu,
        "clone": lambda: saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
        "disk": lambda: saved_tensors_hooks(store, lambda path: torch.from_numpy(np.load(path))),
        "odd address": lambda: saved_tensors_hooks(lambda t: t.detach(), odd_address),
    }
    config = small(depth=3)
    model, images = build(config, dtype=torch.float32, memory=memory), images_for(config, 3, torch.float32)
    wanted = gradients(model, images)
    found = gradients(model, images, hooks[kind])
    assert len(found) == len(wanted) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    if kind == "disk":
        # the activations themselves were on the disk
        kept = _core.plan_bytes(_core.Config(**model.config), 3, memory)["saved"]
        assert max(path.stat().st_size for path in files) >= kept


@pytest.mark.slow
def test_what_left_is_given_back() -> None:
    """The memory of activations that a hook copied serves the next forward."""
    config = small(depth=2)
    model, images = build(config, dtype=torch.float32), images_for(config, 2, torch.float32)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            seen.append(tensor.data_ptr())
        return tensor.detach().clone()

    losses = []
    for _ in range(3):
        with saved_tensors_hooks(pack, lambda t: t):
            losses.append(model(images).sum())
        gc.collect()
    assert len(seen) == 3
    assert len(set(seen)) == 1
    for loss in losses:
        loss.backward()


def test_block() -> None:
    config = small(depth=1)
    layer = build(config, dtype=torch.float32).layers[0]
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 9, config.embed_dim, requires_grad=True)

    def run(hook: Hook) -> list[Tensor]:
        with hook():
            out, total = vimcore.ops.vim_block(x, parameters, memory="least")
        return list(torch.autograd.grad(out.sum() + total.square().sum(), [x, *parameters.values()]))

    wanted = run(lambda: saved_tensors_hooks(lambda t: t, lambda t: t))
    assert all(torch.equal(a, b) for a, b in zip(run(save_on_cpu), wanted))


@pytest.mark.parametrize("change", ["shorter", "type"])
def test_what_came_back_changed_is_an_error(change: str) -> None:
    config = small(depth=1)
    model, images = build(config, dtype=torch.float32), images_for(config, 2, torch.float32)

    def unpack(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        return tensor[64:].clone() if change == "shorter" else tensor.to(torch.int16)

    with saved_tensors_hooks(lambda t: t.detach(), unpack):
        loss = model(images).sum()
    with pytest.raises(
        ValueError, match=r"bytes that forward saved, got|saved: expected \(bytes\) u8 cpu, got"
    ):
        loss.backward()


def test_bytes_of_the_token() -> None:
    config = small(depth=2)
    model, images = build(config, dtype=torch.float32), images_for(config, 2, torch.float32)
    sizes: list[int] = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) if t.dtype == torch.uint8 else t, lambda t: t):
        model(images)
        model(images[:1])  # in the memory of the larger one
    assert sizes[0] > 1.5 * sizes[1]
