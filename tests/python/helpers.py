# SPDX-License-Identifier: Apache-2.0
"""From a reference configuration to a network of ours, and comparisons against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import reference
import torch
import vimcore
from golden import relative
from torch import Tensor

SMALL = reference.Config(img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=2, d_state=5)


def small(**options: Any) -> reference.Config:
    """SMALL with other options."""
    return reference.Config(**{**SMALL.arguments(), **options})


def build(
    config: reference.Config,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    memory: str = "lean",
) -> vimcore.VisionMamba:
    """A network of ours in `dtype` with the given weights (random ones of the reference by default)."""
    weights = reference.random_weights(config) if weights is None else weights
    model = vimcore.VisionMamba(**config.arguments(), memory=memory).to(dtype)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights)
    with torch.no_grad():
        for key, value in weights.items():
            assert parameters[key].shape == value.shape, key
            parameters[key].copy_(value)
    return model


def images_for(
    config: reference.Config, batch: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    """Random images (B, C, H, W), or clips (B, C, T, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    frames = (config.frames,) if config.frames else ()
    shape = (batch, config.in_chans, *frames, config.height, config.width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(
    model: vimcore.VisionMamba, images: Tensor, probe: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of sum(logits * probe), per parameter and for "input"."""
    model.zero_grad(set_to_none=True)
    x = images.detach().clone().requires_grad_()
    logits = model(x)
    (logits.sum() if probe is None else (logits * probe).sum()).backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    return logits.detach(), grads | {"input": x.grad}


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Every gradient within `tolerance` of the truth, by norm.

    One that is a millionth of the largest is measured against that: rounding of what cancels is no failure.
    """
    assert set(found) == set(wanted)
    scale = max(float(v.double().norm()) for v in wanted.values())
    worst = {}
    for key, truth in wanted.items():
        assert found[key].shape == truth.shape, key
        small = float(truth.double().norm()) < 1e-6 * scale
        error = relative(found[key], truth)
        if small:
            error = float((found[key].double() - truth.double()).norm()) / (1e-6 * scale + 1e-300)
        if not error < tolerance:
            worst[key] = error
    assert not worst, worst


# What the reference found last: of tests that differ in what is kept for backward, one computes it.
_TRUTHS: dict[str | None, tuple[reference.Result, dict[str, Tensor]]] = {}


def assert_matches_reference(
    config: reference.Config,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    memory: str = "lean",
    draws: reference.Draws | None = None,
) -> None:
    """Logits, tokens and every gradient of ours against the reference in float64, training and inference."""
    weights = reference.random_weights(config)
    weights = {k: v.to(dtype).double() for k, v in weights.items()}  # the same numbers on both sides
    images = images_for(config, batch, dtype)
    model = build(config, weights, dtype, memory)
    with torch.no_grad():
        shape = model(images).shape
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    known = None if draws else repr((config, batch, dtype))
    if known is None or known not in _TRUTHS:
        _TRUTHS.clear()
        truth = reference.gradients(config, weights, images.double(), probe.double(), draws)
        _TRUTHS[known] = truth
    wanted, grads = _TRUTHS[known]
    logits, found = run(model, images, probe)
    forward_tolerance, grad_tolerance = (1e-10, 1e-8) if dtype == torch.float64 else (1e-5, 1e-4)
    assert logits.shape == wanted.logits.shape
    assert relative(logits, wanted.logits) < forward_tolerance
    assert_close(found, grads, grad_tolerance)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), logits)
        assert relative(model.forward_features(images), wanted.tokens) < forward_tolerance


def rand(*shape: int, grad: bool = True) -> Tensor:
    """Random float64 numbers, of a leaf with gradients."""
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)
