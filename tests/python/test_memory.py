# SPDX-License-Identifier: Apache-2.0
"""What backward keeps: the documented number of bytes, and how it compares with plain autograd."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import reference
import torch
from helpers import build, images_for
from torch import Tensor
from vimcore import _core

TINY = reference.Config(depth=1)  # one block of Vim-Ti: 197 tokens of 192


def formula(config: reference.Config, memory: str, batch: int, size: int) -> int:
    """Bytes of a block: the norm's input, outputs of in_proj and x_proj, a state per chunk and direction."""
    scans = {"ssm": 2, "ssm_conv": 2}.get(config.directions, 1)
    projections = 2 if config.directions == "ssm_conv" else 1
    chunk = 16 if memory == "fast" else 64
    length, inner, state = config.tokens, config.inner, config.d_state
    xz = 0 if memory == "least" else 2 * inner
    per_token = config.embed_dim + xz + projections * (config.rank + 2 * state)
    return size * batch * (length * per_token + scans * -(-length // chunk) * state * inner)


def as_config(config: reference.Config) -> _core.Config:
    return _core.Config(**config.arguments())


CASES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "large": {"img_size": 512},
    "ssm": {"directions": "ssm"},
    "one direction": {"directions": "none"},
    "odd": {"img_size": (50, 34), "embed_dim": 20, "d_state": 5, "dt_rank": 3, "expand": 3, "patch_size": 2},
}


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_planned_bytes(name: str, memory: str) -> None:
    """One block and the last residual, and up to a cache line of padding for each of the five tensors."""
    config = reference.Config(depth=1, **CASES[name])
    for batch in (1, 3):
        planned = _core.plan_bytes(as_config(config), batch, memory)["saved"]
        wanted = formula(config, memory, batch, 4) + 4 * batch * config.tokens * config.embed_dim
        assert wanted <= planned <= wanted + 5 * 64


def saved_bytes(config: reference.Config, memory: str, batch: int) -> int:
    """What a forward of the whole network really holds."""
    network, place = _core.BoundNetwork(as_config(config)), _core.Place(1)
    parameters = ordered(config)  # the core holds views: they must outlive the call
    weights = network.bind(parameters)
    saved = network.saved(memory, place)
    images = images_for(config, batch, torch.float32)
    logits = torch.empty(batch, config.num_classes)
    network.forward(weights, images, _core.Outputs(logits), _core.Draws(), place, saved)
    assert torch.isfinite(logits).all()
    return saved.bytes


def ordered(config: reference.Config) -> list[Tensor]:
    parameters = dict(build(config).named_parameters())
    return [parameters[name].detach() for name in as_config(config).param_shapes()]


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
def test_held_bytes_are_the_documented_ones(memory: str) -> None:
    config = reference.Config(img_size=(96, 64), patch_size=8, embed_dim=64, num_classes=5, depth=2)
    deeper = reference.Config(**{**config.arguments(), "depth": 5})
    block = formula(config, memory, 2, 4)
    held = saved_bytes(config, memory, 2)
    difference = saved_bytes(deeper, memory, 2) - held
    assert 3 * block <= difference <= 3 * (block + 16 * 64)  # at most a cache line of padding for each tensor
    assert held <= 2 * block + 4 * 2 * config.tokens * config.embed_dim + 64 * 64


class Scan(torch.autograd.Function):
    """The scan of plain autograd without its (B, L, E, N) states: it keeps its arguments and nothing else."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return torch.zeros_like(arguments[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def plain_autograd_bytes(config: reference.Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that autograd saves for one block of the reference, each piece once, parameters not."""

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        b: Tensor,
        c: Tensor,
        D: Tensor,
        z: Tensor,
        bias: Tensor,
        softplus: bool,
    ) -> Tensor:
        delta = torch.nn.functional.softplus(delta + bias)
        return (Scan.apply(u, delta, A, b, c) + D * u) * torch.nn.functional.silu(z)

    monkeypatch.setattr(reference, "scan", scan)
    weights = {
        k: v.requires_grad_() for k, v in reference.random_weights(config, dtype=torch.float32).items()
    }
    h = torch.randn(1, config.tokens, config.embed_dim, requires_grad=True)
    r = torch.randn(1, config.tokens, config.embed_dim, requires_grad=True)
    own = {w.untyped_storage().data_ptr() for w in weights.values()}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() >= config.tokens:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, total = reference.layer(config, weights, 0, h, r, None)
    assert out.requires_grad
    assert total.requires_grad
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(("memory", "limit"), [("least", 0.2), ("lean", 0.3), ("fast", 0.5)])
@pytest.mark.parametrize("size", [224, 512])
def test_less_than_plain_autograd(
    size: int, memory: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reference.Config(img_size=size, depth=1)
    plain = plain_autograd_bytes(config, monkeypatch)
    ours = formula(config, memory, 1, 4)
    assert ours <= limit * plain, (ours, plain, ours / plain)


@pytest.mark.slow
def test_training_steps_do_not_grow() -> None:
    """The memory of a step is reused by the next."""
    config = reference.Config(img_size=64, patch_size=8, embed_dim=64, num_classes=5, depth=2)
    model, images = build(config), images_for(config, 2, torch.float32)

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def steps(count: int) -> None:
        for _ in range(count):
            model.zero_grad(set_to_none=True)
            model(images).sum().backward()

    steps(10)
    before = resident()
    steps(100)
    grown = resident() - before
    assert grown < 40 * formula(config, "lean", 2, 4), grown
