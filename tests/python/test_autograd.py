# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` in torch's autograd: frozen weights, accumulation, several graphs, memory layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, run


def test_frozen_parameters() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    _, all_grads = run(model, images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("head.weight", "layers.1.mixer.conv1d.weight", "cls_token"))
    model.zero_grad(set_to_none=True)
    model(images).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, all_grads[name]), name
        else:
            assert parameter.grad is None, name
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(images).requires_grad
    x = images.clone().requires_grad_()
    model(x).sum().backward()
    assert torch.equal(x.grad, all_grads["input"])


def test_gradient_accumulation() -> None:
    model = build(SMALL, dtype=torch.float64)
    a, b = images_for(SMALL, 2), images_for(SMALL, 3, seed=9)
    first, second = ({k: v.clone() for k, v in run(model, x)[1].items()} for x in (a, b))
    model.zero_grad(set_to_none=True)
    model(a).sum().backward()
    model(b).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, first[name] + second[name]) < 1e-13, name


def test_two_graphs_at_once() -> None:
    """Two forwards before the first backward, in either order, with other work in between."""
    model = build(SMALL)
    a, b = images_for(SMALL, 2, torch.float32), images_for(SMALL, 4, torch.float32, seed=9)
    wanted = [run(model, x)[1]["input"].clone() for x in (a, b)]
    for order in ((0, 1), (1, 0)):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        losses = [model(x).sum() for x in leaves]
        model.eval()(a)
        model.train()
        for i in order:
            losses[i].backward()
        assert all(torch.equal(x.grad, w) for x, w in zip(leaves, wanted, strict=True))


def test_retained_graph_and_second_backward() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_weights_changed_between_forward_and_backward() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    loss = model(images).sum()
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    _, wanted = run(model, images)
    model.zero_grad(set_to_none=True)
    x = images.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, wanted["input"])
    assert all(torch.equal(p.grad, wanted[k]) for k, p in model.named_parameters())


def test_input_that_wants_a_gradient_is_not_written() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    before = x.detach().clone()
    model(x).sum().backward()
    assert torch.equal(x, before)
    y = (x * 1).mul_(2)  # not a leaf, made in place
    model(y).sum().backward()
    assert torch.equal(y, 2 * before)


def test_outputs_are_the_callers_own() -> None:
    """Nothing that is returned is scratch memory of the next call."""
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    with torch.no_grad():
        first, tokens = model(images), model.forward_features(images)
        copies = first.clone(), tokens.clone()
        model(-images), model.forward_features(-images)
    assert torch.equal(first, copies[0])
    assert torch.equal(tokens, copies[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.flip(3).flip(3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 0)[::2].clone().repeat_interleave(2, 0)[::2],
        lambda x: torch.stack([x, -x], -1)[..., 0],
    ],
)
def test_non_contiguous_images(make: Any) -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    images[1] = images[0]
    wanted, _grads = run(model, images)
    x = images.clone().requires_grad_()
    logits = model(make(x))
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, -x], -1)[..., 0],
        lambda x: torch.complex(x, -x).conj().imag,  # torch negates it when it is read
        lambda x: torch._neg_view(-x),  # likewise, and contiguous
    ],
)
def test_operators_take_views(make: Any) -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    view = make(x)
    assert view.is_neg() or not view.is_contiguous()
    assert torch.equal(vimcore.ops.rms_norm(view, weight), vimcore.ops.rms_norm(x, weight))


def test_expanded_batch_and_broadcast_gradient() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    x = images.clone().requires_grad_()
    logits = model(x.expand(3, -1, -1, -1))
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[:1], model(images))
    logits.sum().backward()  # an expanded gradient of ones
    assert relative(x.grad, 3 * run(model, images)[1]["input"]) < 1e-6
