# SPDX-License-Identifier: Apache-2.0
"""Training through torch on CUDA without a GPU (shim.py)."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import golden
import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, small
from shim import GRADIENTS, Graph, agree, autocast, gradients, runtime, twin, vimcore_shim
from torch import Tensor


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["least", "fast"])
def test_activations_that_left_and_came_back(memory: str, training: dict[str, Any]) -> None:
    model = twin(build(small(depth=2), dtype=torch.float32, memory=memory))
    images, found = images_for(SMALL, 3, torch.float32), []
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach().clone())
        return kept[-1]

    for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)):
        with hooks:
            loss = model(images).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert any(t.dtype == torch.uint8 and t.numel() > 1000 for t in kept)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize(
    "name", ["v2_middle", "v2_double", "none_pairs_middle", "v2_rope_residual_head", "v2_layer_scale"]
)
def test_gradients_golden(name: str, memory: str, training: dict[str, Any]) -> None:
    g = golden.load(name)
    model = twin(build(g.config, g.weights))
    model.memory = memory
    images = g.input.clone().requires_grad_()
    model(images).backward(g.probe)
    assert relative(images.grad, g.grads["input"]) < 1e-4
    for key, p in model.named_parameters():
        assert relative(p.grad, g.grads[key]) < 1e-4, key


@pytest.mark.parametrize("options", [{}, {"class_token": "head", "rope": True, "rope_residual": True}])
def test_gradients_at_two_sizes(options: dict[str, Any], training: dict[str, Any]) -> None:
    """Those of the position table come back through its resize, and add up."""
    cpu = build(small(**options), dtype=torch.float64)
    model = twin(build(small(**options)))
    cpu.dynamic_img_size = model.dynamic_img_size = True
    for size in ((20, 16), (4, 8)):
        images = images_for(small(img_size=size), 3)
        cpu(images).square().sum().backward()
        model(images.float()).square().sum().backward()
    agree(gradients(model), gradients(cpu), GRADIENTS[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(GRADIENTS))
def test_autocast_and_accumulation(
    dtype: torch.dtype, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches under autocast, float16 with a scaler, against the CPU in float64."""
    cpu, model = build(SMALL).eval().double(), twin(build(SMALL).eval())
    images, labels = images_for(SMALL, 4, torch.float32).requires_grad_(), torch.tensor([0, 1, 2, 1])
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wanted = images.detach().double().requires_grad_()
    for part in (slice(0, 2), slice(2, 4)):
        torch.nn.functional.cross_entropy(cpu(wanted[part]), labels[part]).backward()
        autocast(monkeypatch, dtype if dtype != torch.float32 else None)
        logits = model(images[part])
        autocast(monkeypatch, None)
        assert logits.dtype == dtype
        scaler.scale(torch.nn.functional.cross_entropy(logits.float(), labels[part])).backward()
    scaler.unscale_(optimizer)
    assert images.grad is not None
    assert images.grad.dtype == torch.float32
    agree(gradients(model), gradients(cpu), GRADIENTS[dtype])
    assert relative(images.grad / scaler.get_scale(), wanted.grad) < GRADIENTS[dtype]


def test_overflow_reaches_the_scaler(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(build(SMALL))
    autocast(monkeypatch, torch.float16)
    logits = model(images_for(SMALL, 2, torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(logits.float().square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_runs_and_two_passes_before_backward(training: dict[str, Any]) -> None:
    """The same bits; what one forward saved is not written by the next."""
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 4, torch.float32)
    runs = []
    for _ in range(2):
        model.zero_grad()
        first, second = model(images[:2]), model(images[2:].bfloat16())
        (first.square().sum() + second.float().sum()).backward()
        runs.append(gradients(model))
    assert all(torch.equal(g, runs[1][name]) for name, g in runs[0].items())
    model.zero_grad()
    model(images[:2]).square().sum().backward()
    model(images[2:].bfloat16()).float().sum().backward()
    agree(gradients(model), runs[0], 1e-6)


def test_frozen_parameters_and_other_outputs(training: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    for net in (cpu, model):
        net.layers[0].requires_grad_(False)
        net.pos_embed.requires_grad_(False)
        tokens, maps = net.forward_features(images), net.forward_intermediates(images, [0, 1])
        (tokens.square().sum() + maps[0].sum() + maps[1].square().sum()).backward()
    agree(gradients(model), gradients(cpu), 1e-4)
    assert model.pos_embed.grad is None


@pytest.mark.slow
def test_training_follows_the_cpu(training: dict[str, Any]) -> None:
    """Steps of AdamW with dropout and drop path: the loss falls as it does on the CPU, also in 16 bits."""
    configuration = small(drop_rate=0.1, drop_path_rate=0.2)
    images, labels = images_for(SMALL, 6, torch.float32), torch.tensor([0, 1, 2, 0, 1, 2])

    def curve(model: Any, dtype: torch.dtype) -> Tensor:
        model.train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    wanted = curve(build(configuration), torch.float32)
    assert wanted[-1] < 0.7 * wanted[0]
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        assert float((curve(twin(build(configuration)), dtype) - wanted).abs().max()) < most


def test_a_captured_step_keeps_its_memory(training: dict[str, Any]) -> None:
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 2, torch.float32)
    wanted = []
    for training["capturing"] in (False, True, False, True, False):
        model.zero_grad()
        model(images).square().sum().backward()
        wanted.append(gradients(model))
    assert all(torch.equal(g[name], wanted[0][name]) for g in wanted for name in g)
    vimcore_shim._core.release_memory()


@pytest.mark.parametrize("dtype", list(GRADIENTS))
def test_a_recorded_step(dtype: torch.dtype, training: dict[str, Any]) -> None:
    """Forward and backward, replayed with weights and images as they are by then: the bits of an eager step.

    Without a GPU torch records nothing: the zeros that gradients are added to come from the test.
    """
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 3, dtype)
    parameters, probe = list(model.parameters()), torch.randn(3, 3).to(dtype)

    def step(net: Any) -> tuple[Tensor, ...]:
        logits = net(images)
        return logits, *torch.autograd.grad(logits, list(net.parameters()), probe, retain_graph=True)

    step(model)
    with Graph(training) as graph:
        found = step(model)
    assert not any(g.any() for g in found[1:])
    for _ in range(3):
        for g in found[1:]:
            g.zero_()
        graph.replay()
        for net in (twin(model), model):  # eager steps between replays, of the same network, too
            assert all(torch.equal(a, b) for a, b in zip(found, step(net), strict=True))
        for p, g in zip(parameters, found[1:], strict=True):
            p.data.sub_(g, alpha=0.1)
        images.add_(0.25)
    vimcore_shim._core.release_memory()


@pytest.mark.parametrize("memory", ["least", "fast"])
def test_recorded_steps_side_by_side(memory: str, training: dict[str, Any]) -> None:
    """Two graphs of one network, replayed in turn, share nothing that they write to."""
    model = twin(build(small(depth=2), dtype=torch.float32, memory=memory))
    batches = [images_for(SMALL, count, torch.float32) for count in (2, 3)]
    graphs, found, wanted = [], [], []
    for images in batches:
        wanted.append(torch.autograd.grad(model(images).sum(), list(model.parameters())))
        with Graph(training) as graph:
            logits = model(images)
            probe = torch.ones_like(logits)
            found.append(torch.autograd.grad(logits, list(model.parameters()), probe, retain_graph=True))
        graphs.append((graph, logits, probe))  # what a pool of torch's would keep
    for _ in range(2):
        for (graph, *_), gradients_, expected in zip(graphs, found, wanted, strict=True):
            for g in gradients_:
                g.zero_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(gradients_, expected, strict=True))
    vimcore_shim._core.release_memory()


def test_memory_that_others_give_back(training: dict[str, Any]) -> None:
    """A device without memory asks once whoever holds some; without an answer the error names the amounts."""
    model, images, library = twin(build(SMALL)), images_for(SMALL, 2, torch.bfloat16), runtime()
    wanted = gradients_of(model, images)
    asked: list[tuple[int, int]] = []

    def give(device: int, needed: int) -> bool:
        asked.append((device, needed))
        library.vimcore_shim_set_memory(8 << 30)
        return True

    try:
        for answer in (None, lambda device, needed: False):
            vimcore_shim._core.set_give_back_memory(answer)
            library.vimcore_shim_set_memory(0)
            vimcore_shim._core.release_memory()
            message = r"CUDA out of memory. cuda:0 \(.* was asked for .* free are"
            with pytest.raises(vimcore_shim.Error, match=message):
                gradients_of(model, images)
        vimcore_shim._core.set_give_back_memory(give)
        found = gradients_of(model, images)
    finally:
        library.vimcore_shim_set_memory(8 << 30)
        vimcore_shim._core.set_give_back_memory(vimcore_shim.autograd.memory.give_back)
    assert len(asked) == 1
    assert asked[0][0] == 0
    assert asked[0][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_memory_of_torch(dtype: torch.dtype, training: dict[str, Any]) -> None:
    """So `record_stream` of a hook that copies it on a side stream has effect, and graphs have their pool."""
    model, images = twin(build(SMALL)), images_for(SMALL, 3, dtype)
    for _ in range(3):
        gradients_of(model, images)  # scratch memory, casts, what renews casts
    gc.collect()  # networks of other tests
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    used, alive = runtime().vimcore_shim_used_bytes(), []
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            alive.append(model(images))
    assert runtime().vimcore_shim_used_bytes() == used
    tokens = [t for t in kept if t.dtype == torch.uint8]
    assert len(tokens) == 3
    assert len({t.data_ptr() for t in tokens}) == 3
    assert all(t.untyped_storage().resizable() and t.untyped_storage().nbytes() == t.numel() for t in tokens)


def gradients_of(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(images).float().square().sum(), list(model.parameters()))


def test_torch_gives_back_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it holds and does not use; nothing before it used a device, or while it records a graph."""
    held, state = [300, 100], {"initialized": False, "recording": False}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: state["initialized"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["recording"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.pop(0) if len(held) > 1 else None)
    give_back = vimcore.autograd.memory.give_back
    assert not give_back(0, 50)
    state.update(initialized=True, recording=True)
    assert not give_back(0, 50)
    assert held == [300, 100]
    state["recording"] = False
    assert give_back(0, 50)
    assert not give_back(0, 50)
    assert held == [100]


def test_saliency_and_second_derivatives(training: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    wanted = vimcore.saliency(cpu, images, steps=2)
    assert relative(vimcore_shim.saliency(model, images, steps=2), wanted) < 1e-4
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


# ---- weights that change -----------------------------------------------------------------------------------


def writes() -> dict[str, Any]:
    def without_a_trace(model: Any) -> None:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(model.head.weight):
            model.head.weight.mul_(1.5)

    def fused(model: Any) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()

    return {
        "fused": fused,
        "a row of .data": lambda model: model.layers[0].mixer.in_proj.weight.data[3].fill_(1),
        "all of .data": lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 1.3),
        "no version counted": without_a_trace,
        "channels_last": lambda model: model.patch_embed.proj.weight.data.mul_(1.5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(GRADIENTS))
@pytest.mark.parametrize("write", writes().values(), ids=writes())
def test_every_write_is_seen(write: Any, dtype: torch.dtype, training: dict[str, Any]) -> None:
    """Nothing tells a device that weights changed: every call casts them anew."""
    images = images_for(SMALL, 2, dtype)
    for grad in (False, True):
        model = twin(build(SMALL)).eval().to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(grad):
            before = model(images)
            write(model)
            after = model(images)
            wanted = twin(model)(images)
        assert torch.equal(after, wanted)
        assert not torch.equal(after, before)


@pytest.mark.slow
def test_a_fused_optimizer_learns_as_the_others(training: dict[str, Any]) -> None:
    images, labels = images_for(SMALL, 4, torch.bfloat16), torch.tensor([0, 1, 2, 1])
    losses: list[list[float]] = []
    for options in ({"fused": True}, {"foreach": True}):
        model = twin(build(SMALL))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        losses.append([])
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert torch.equal(model.eval()(images), twin(model)(images))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][-1] < losses[0][0] / 2


@torch.no_grad()
def test_constant_weights(training: dict[str, Any]) -> None:
    """The casts of the first call are kept; writes that torch counts are told on leaving."""
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 2, torch.bfloat16)
    wanted = model(images)
    with model.constant_weights():
        assert torch.equal(model(images), wanted)
        model.layers[0].mixer.in_proj.weight.data.mul_(2)
        assert torch.equal(model(images), wanted)
        model.weights_changed()
        changed = model(images)
    assert torch.equal(changed, twin(model)(images))
    assert not torch.equal(changed, wanted)

    def write() -> None:
        with model.constant_weights():
            model.head.weight.mul_(2)

    with pytest.raises(RuntimeError, match="weights changed within constant_weights"):
        write()
