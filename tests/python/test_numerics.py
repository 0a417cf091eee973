# SPDX-License-Identifier: Apache-2.0
"""Where floating point is hard: long sequences, large and tiny steps, empty inputs, NaN and infinity."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import build, images_for, run
from torch import Tensor

SMALL = reference.Config(img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=2)


def scan_case(length: int, delta: float, A: float, state: int = 16, inner: int = 24) -> dict[str, Tensor]:
    """float64 arguments with steps around `delta` and decay rates around `A`."""
    generator = torch.Generator().manual_seed(length)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "u": rand(1, length, inner),
        "delta": delta * (1 + 0.1 * rand(1, length, inner)).abs(),
        "A": A * (1 + 0.1 * rand(inner, state)).abs(),
        "B": rand(1, length, state),
        "C": rand(1, length, state),
    }


CASES = {
    "long memory": (3000, 0.01, -0.01),
    "large steps": (100, 50.0, -8.0),
    "huge steps": (40, 1e6, -1.0),
    "tiny steps": (200, 1e-8, -1.0),
    "A near zero": (300, 0.05, -1e-20),
    "A zero": (300, 0.05, 0.0),
    "denormal decay": (100, 1.0, -90.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_scan_extremes(name: str, reverse: bool) -> None:
    inputs = {k: v.float().double() for k, v in scan_case(*CASES[name]).items()}
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    truth = reference.scan(*leaves.values(), reverse=reverse)
    probe = torch.randn(truth.shape, dtype=torch.float64).float().double()
    wanted = torch.autograd.grad((truth * probe).sum(), list(leaves.values()))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        ours = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
        out = vimcore.ops.selective_scan(**ours, reverse=reverse)
        assert relative(out, truth) < tolerance
        found = torch.autograd.grad((out * probe.to(dtype)).sum(), list(ours.values()))
        for key, a, b in zip(inputs, found, wanted, strict=True):
            assert torch.isfinite(a).all(), key
            if float(b.norm()) > 1e-25:  # what a float32 can hold
                assert relative(a, b) < 10 * tolerance, key


@pytest.mark.parametrize("value", [-200.0, -50.0, 15.0, 19.9, 20.1, 50.0, 1000.0])
def test_softplus_far_from_zero(value: float) -> None:
    """log1p(exp(v)) neither overflows nor loses the small values."""
    inputs = scan_case(20, 1.0, -0.01)
    delta = torch.full_like(inputs["delta"], value)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        ours = {k: v.to(dtype) for k, v in inputs.items()} | {
            "delta": delta.to(dtype, copy=True).requires_grad_()
        }
        truth_delta = ours["delta"].detach().double().requires_grad_()
        args = [inputs["u"], truth_delta, inputs["A"], inputs["B"], inputs["C"]]
        truth = reference.scan(*args, delta_softplus=True)
        out = vimcore.ops.selective_scan(**ours, delta_softplus=True)
        assert torch.isfinite(out).all()
        if value > -80 or dtype == torch.float64:
            assert relative(out, truth) < tolerance
            truth.sum().backward()
            out.sum().backward()
            assert relative(ours["delta"].grad, truth_delta.grad) < 10 * tolerance


@pytest.mark.slow
def test_model_on_a_long_sequence() -> None:
    config = reference.Config(
        img_size=(2, 2 * 2500), patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=1
    )
    weights = {k: v.float().double() for k, v in reference.random_weights(config).items()}
    images = images_for(config, 1, torch.float32)
    wanted, grads = reference.gradients(config, weights, images.double())
    logits, found = run(build(config, weights), images)
    assert relative(logits, wanted.logits) < 1e-5
    assert max(relative(found[k], grads[k]) for k in grads) < 1e-4


@pytest.mark.parametrize("class_token", ["none", "middle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_patch(class_token: str, dtype: torch.dtype) -> None:
    config = reference.Config(
        img_size=4, patch_size=4, num_classes=3, embed_dim=8, depth=2, class_token=class_token
    )
    weights = {k: v.to(dtype).double() for k, v in reference.random_weights(config).items()}
    images = images_for(config, 1, dtype)
    wanted, grads = reference.gradients(config, weights, images.double())
    logits, found = run(build(config, weights, dtype), images)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative(logits, wanted.logits) < tolerance
    assert max(relative(found[k], grads[k]) for k in grads) < 10 * tolerance


def test_empty_batch() -> None:
    model = build(SMALL)
    images = torch.empty(0, 3, 8, 12)
    with torch.no_grad():
        assert model.eval()(images).shape == (0, 3)
        assert model.forward_features(images).shape == (0, SMALL.tokens, SMALL.embed_dim)
    logits, grads = run(model.train(), images)
    assert logits.shape == (0, 3)
    assert grads["input"].shape == images.shape
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_pixels_stay_in_their_image(bad: float, dtype: torch.dtype) -> None:
    model, images = build(SMALL, dtype=dtype), images_for(SMALL, 3, dtype)
    with torch.no_grad():
        clean = model(images)
        images[1, 0, 2, 3] = bad
        logits = model(images)
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])
    assert logits[1].isnan().all()
    run(model, images)  # and nothing crashes on the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_maximum_of_tokens_with_a_nan_is_one(dtype: torch.dtype) -> None:
    """In one direction the last patch reaches the last token alone."""
    options = {"directions": "none", "pool": "max", "class_token": "none"}
    model = build(reference.Config(**{**SMALL.arguments(), **options}), dtype=dtype).eval()
    images = images_for(SMALL, 2, dtype)
    images[0, :, -1, -1] = math.nan
    assert model.forward_features(images)[0].isnan().any(1).tolist() == [False] * 5 + [True]
    logits = model(images)
    assert bool(logits[0].isnan().all())
    assert bool(logits[1].isfinite().all())


@pytest.mark.parametrize("key", ["layers.0.mixer.A_log", "layers.1.mixer.dt_proj.bias", "pos_embed"])
def test_bad_weights_reach_the_output(key: str) -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    with torch.no_grad():
        dict(model.named_parameters())[key].view(-1)[0] = math.nan
        assert model(images).isnan().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e15])
def test_pixel_scales(scale: float) -> None:
    """The norm takes any scale out; neither its squares nor anything behind it overflow."""
    weights = {k: v.float().double() for k, v in reference.random_weights(SMALL).items()}
    images = (images_for(SMALL, 2, torch.float32) * scale).float()
    truth = reference.forward(SMALL, weights, images.double()).logits
    logits, grads = run(build(SMALL, weights), images)
    assert relative(logits, truth) < 1e-4
    assert all(torch.isfinite(g).all() for g in grads.values())
