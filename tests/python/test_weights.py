# SPDX-License-Identifier: Apache-2.0
"""Weights that change: whoever writes to them and however, the next call computes with what is there."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import runpy
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import vimcore
from helpers import SMALL, build, images_for, small
from torch import Tensor, nn

SQUARE = small(num_classes=16)  # of the width of the network: a square head
Write = Callable[[vimcore.VisionMamba], object]


def fresh(model: vimcore.VisionMamba, images: Tensor) -> Tensor:
    """What the present weights give in a network that never saw others."""
    other = vimcore.VisionMamba(**model.config).to(images.dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other.eval()(images)


def optimizer(kind: type[torch.optim.Optimizer], **options: object) -> Write:
    def write(model: vimcore.VisionMamba) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        kind(model.parameters(), lr=0.1, **options).step()  # type: ignore[call-arg]

    return write


def of_head(write: Callable[[Tensor], object]) -> Write:
    return lambda model: write(model.head.weight)


def numpy_view(weight: Tensor) -> None:
    weight.detach().numpy()[1, 2] += 3


def transposed(weight: Tensor) -> None:
    weight.data = weight.data.t()


def exchanged(weight: Tensor) -> None:
    """As averaging does for an evaluation: other memory, changed through an alias, and back."""
    own = weight.data
    weight.data = own.clone()
    own.mul_(2)
    weight.data = own


def two_swapped(weight: Tensor) -> None:
    """64 words apart: the sums of a checksum in lanes would be the same."""
    flat = weight.data.view(-1)
    flat[[0, 64]] = flat[[64, 0]]


def without_a_trace(weight: Tensor) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(1.5)


def forked(weight: Tensor) -> None:
    """One number, by another process."""
    weight.data.share_memory_()
    child = os.fork()
    if child == 0:
        weight.detach().numpy()[2, 3] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def flat_vector(model: vimcore.VisionMamba) -> None:
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    nn.utils.vector_to_parameters(vector, model.parameters())
    model(images_for(SQUARE, 1, vector.dtype))
    vector[-7] += 1
    vector.mul_(1.1)


WRITES: dict[str, Write] = {
    "SGD, fused": optimizer(torch.optim.SGD, fused=True),
    "Adam, fused": optimizer(torch.optim.Adam, fused=True),
    "AdamW, fused": optimizer(torch.optim.AdamW, fused=True),
    "Adagrad, fused": optimizer(torch.optim.Adagrad, fused=True),
    "AdamW, foreach": optimizer(torch.optim.AdamW, foreach=True),
    "a row of .data": of_head(lambda w: w.data[3].fill_(1)),
    "one number of .data": of_head(lambda w: w.data[5, 5:6].add_(1e-3)),
    "all signs of .data": of_head(lambda w: w.data.neg_()),
    "all of .data": lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 1.1),
    "two numbers of .data change places": of_head(two_swapped),
    "a numpy view": of_head(numpy_view),
    "the transpose as .data": of_head(transposed),
    ".data there and back": of_head(exchanged),
    "no version counted": of_head(without_a_trace),
    "another process": of_head(forked),
    "a flat vector": flat_vector,
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen(write: Write, layout: torch.memory_format) -> None:
    images = images_for(SQUARE, 2, torch.float32)
    for differentiated in (False, True):
        model = build(SQUARE).eval().to(memory_format=layout)
        with torch.set_grad_enabled(differentiated):
            before = model(images)
            write(model)
            after = model(images)
        assert torch.equal(after, fresh(model, images))
        assert not torch.equal(after, before)


def test_a_fused_optimizer_learns_as_the_others() -> None:
    images, labels = images_for(SMALL, 4, torch.float32), torch.tensor([0, 1, 2, 1])
    losses = []
    for options in ({"fused": True}, {"foreach": True}):
        model = build(SMALL)
        step = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        course = []
        for _ in range(4):
            step.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            step.step()
            course.append(loss.item())
        losses.append(course)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@torch.no_grad()
def test_constant_weights() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with model.constant_weights():
        assert torch.equal(model(images), wanted)


def within(model: vimcore.VisionMamba, write: Write) -> None:
    with model.constant_weights():
        write(model)


def fails(model: vimcore.VisionMamba) -> None:
    model.head.weight.data.mul_(2)
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["a row of .data", "assigned", "AdamW, fused", "another process"])
def test_a_write_within_constant_weights_is_told(name: str) -> None:
    model, images = build(SQUARE).eval(), images_for(SQUARE, 2, torch.float32)
    with pytest.raises(RuntimeError, match="weights changed within constant_weights"):
        within(model, WRITES[name])
    assert torch.equal(model(images), fresh(model, images))
    with pytest.raises(RuntimeError, match="weights changed within constant_weights"):
        within(model, lambda m: setattr(m, "head", nn.Linear(16, 16)))
    with pytest.raises(RuntimeError, match="weights changed within constant_weights"):
        within(model, lambda m: m.reset_classifier(3))
    with pytest.raises(ZeroDivisionError):  # not hidden by what is found on leaving
        within(model, fails)
    assert torch.equal(model(images), fresh(model, images))


@torch.no_grad()
def test_an_announced_write_within_constant_weights() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    model.weights_changed()  # nothing is kept yet
    model(images)
    with model.constant_weights():
        before = model(images)
        model.head.weight.data.mul_(2)
        assert torch.equal(model(images), before)  # as announced
        model.weights_changed()
        assert torch.equal(model(images), fresh(model, images))
    assert torch.equal(model(images), fresh(model, images))


@torch.no_grad()
def test_constant_weights_are_left_in_any_order() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    first, second = model.constant_weights(), model.constant_weights()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    model.head.weight.data.mul_(2)
    assert torch.equal(model(images), fresh(model, images))
    with model.constant_weights(), model.constant_weights():
        model.head.weight.data.mul_(2)
        model.weights_changed()  # to both
        assert torch.equal(model(images), fresh(model, images))


@torch.no_grad()
def test_an_announced_write_to_what_is_computed_or_replaced() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    nn.utils.parametrizations.weight_norm(model.layers[0].mixer.in_proj)
    other = build(SMALL).eval()
    with model.constant_weights():
        model.layers[0].mixer.in_proj.parametrizations.weight.original0.data.mul_(2)
        model.head.weight = nn.Parameter(2 * model.head.weight)
        model.weights_changed()
        found = model(images)
    other.head.weight.mul_(2)
    other.layers[0].mixer.in_proj.weight.mul_(2)
    assert (found - other(images)).abs().max() < 1e-5


def test_constant_weights_are_differentiated() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    found = []
    for constant in (False, True):
        x = images.clone().requires_grad_()
        if constant:
            with model.constant_weights():
                model(x).sum().backward()
        else:
            model(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_constant_weights_that_are_computed_are_differentiated() -> None:
    """Also after entering without gradients, and more than once."""
    images, found = images_for(SMALL, 2, torch.float32), []
    for constant in (False, True):
        model = build(SMALL).eval()
        nn.utils.parametrizations.weight_norm(model.layers[0].mixer.in_proj)
        with contextlib.ExitStack() as stack:
            with torch.no_grad():
                stack.enter_context(model.constant_weights() if constant else contextlib.nullcontext())
            for _ in range(2):
                model(images).sum().backward()
        found.append(model.layers[0].mixer.in_proj.parametrizations.weight.original1.grad)
    assert torch.equal(*found)


@pytest.mark.slow
def test_a_network_is_freed_at_once() -> None:
    """Not when the collector next runs: on a GPU that would be device memory."""
    gc.collect()
    gc.disable()
    try:
        model = build(SMALL)
        model(images_for(SMALL, 1, torch.float32)).sum().backward()
        with model.constant_weights():
            model.forward_features(images_for(SMALL, 1, torch.float32))
        gone, core = weakref.ref(model), weakref.ref(model._core)
        del model
        assert gone() is None
        assert core() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_threads_share_a_network() -> None:
    """Of which every call binds other, not contiguous weights: nobody frees what another one reads."""

    class Strided(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.t().contiguous().t()

    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    for layer in model.layers:
        for linear in (layer.mixer.in_proj, layer.mixer.out_proj):
            nn.utils.parametrize.register_parametrization(linear, "weight", Strided())
    wanted = copy.deepcopy(model)(images)

    def calls(_: int) -> list[Tensor]:
        with torch.no_grad():
            return [model(images) for _ in range(50)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [y for ys in pool.map(calls, range(4)) for y in ys]
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(y, wanted) for y in found)


def test_another_size_at_the_same_address_is_refused() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    model(images)
    model.head.weight.data = model.head.weight.data[:2]
    with pytest.raises(ValueError, match=r"head\.weight: expected \(3, 16\) .*, got \(2, 16\)"):
        model(images)
    model = build(SMALL).eval()
    model(images)
    weight = model.layers[0].mixer.x_proj.weight
    weight.data = weight.data.view(weight.shape[::-1])
    with pytest.raises(ValueError, match=r"x_proj\.weight: expected \(11, 32\) .*, got \(32, 11\)"):
        model(images)


def test_weights_that_are_no_array_are_refused() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    with pytest.raises(ValueError, match=r"cls_token: expected a tensor on the cpu or cuda, got .* meta"):
        within(build(SMALL).to("meta"), lambda m: None)
    with pytest.raises(ValueError, match=r"cls_token: expected a tensor on the cpu or cuda, got .* meta"):
        within(model, lambda m: m.to("meta"))
    model = build(SMALL)
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    with pytest.raises(TypeError, match=r"head\.weight: expected a dense tensor, got .*sparse_coo"):
        model(images)


def test_freed_memory_is_refused() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    model.head.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"head\.weight: .* without its memory"):
        model(images)


@pytest.mark.slow
def test_the_benchmark_of_looking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parents[1] / "bench" / "constant_weights.py"
    monkeypatch.setattr("sys.argv", [str(script), "--pairs", "1", "--threads", "1"])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["checksum_ms"] < found["ms"]
    assert found["megabytes"] == 28.6
