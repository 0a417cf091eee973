# SPDX-License-Identifier: Apache-2.0
"""The torch module on CUDA without a GPU (shim.py): forward and types."""

from __future__ import annotations

import gc
import re
from typing import Any

import golden
import pytest
import torch
from golden import relative
from helpers import SMALL, build, images_for, small
from shim import TOLERANCE, Graph, autocast, runtime, twin, vimcore_shim


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["v2_middle", "v2_double", "none_pairs_middle", "v2_rope_residual_head", "v2_max"]
)
def test_module_golden(name: str, gpu: dict[str, Any]) -> None:
    g = golden.load(name)
    cpu = build(g.config, g.weights).eval()
    model, images = twin(cpu), g.input
    assert relative(model(images), g.logits) < 1e-5
    tokens = model.forward_features(images)
    assert relative(tokens, cpu.forward_features(images)) < 1e-5
    assert relative(model.forward_head(tokens), g.logits) < 1e-5
    for found, wanted in zip(model.forward_intermediates(images), cpu.forward_intermediates(images)):
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_types_of_activations(
    dtype: torch.dtype, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a 16-bit type, and autocast, compute in that type beside float32 parameters."""
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    direct = model(images.to(dtype))
    assert direct.dtype == dtype
    assert relative(direct, cpu(images)) < TOLERANCE[dtype]
    autocast(monkeypatch, dtype)
    assert torch.equal(model(images), direct)
    tokens, layer = model.forward_features(images), model.forward_intermediates(images, [1])[0]
    assert tokens.dtype == layer.dtype == dtype
    assert relative(tokens, cpu.forward_features(images)) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"class_token": "double"}, {"class_token": "head", "rope": True}])
def test_sizes(options: dict[str, Any], gpu: dict[str, Any]) -> None:
    """Sizes other than the position table's, by turns; a write to the table is seen at each."""
    cpu = build(small(**options)).eval()
    model = twin(cpu)
    cpu.dynamic_img_size = model.dynamic_img_size = True
    for _ in range(2):
        for size in ((20, 16), (8, 12), (4, 8)):
            images = images_for(small(img_size=size), 2, torch.float32)
            assert relative(model(images), cpu(images)) < 1e-5
            found, wanted = (net.forward_intermediates(images, [1])[0] for net in (model, cpu))
            assert found.shape[2:] == (size[0] // 4, size[1] // 4)
            assert relative(found, wanted) < 1e-5
        for net in (cpu, model):
            net.pos_embed.data.mul_(-1.5)


def test_training_draws_without_gradients(gpu: dict[str, Any]) -> None:
    cpu = build(small(drop_rate=0.2, drop_path_rate=0.5, directions="sequence", class_token="random")).train()
    model, images = twin(cpu), images_for(SMALL, 4, torch.float32)
    torch.manual_seed(3)
    wanted = cpu(images)
    torch.manual_seed(3)
    assert relative(model(images), wanted) < 1e-5
    assert relative(model(images.bfloat16()), wanted) < 2  # other draws; the factors stay float32


def test_weights_that_change(gpu: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    before = model(images.bfloat16())  # weights are cast, and the casts kept
    for net in (cpu, model):
        net.layers[0].mixer.in_proj.weight.mul_(1.5)
        net.head.weight.add_(0.25)
    after = model(images.bfloat16())
    assert relative(after, before) > 0.05
    assert relative(after, cpu(images)) < TOLERANCE[torch.bfloat16]


def test_wrong_types_and_devices(gpu: dict[str, Any]) -> None:
    model, images = twin(build(SMALL)), images_for(SMALL, 2, torch.float32)
    with pytest.raises(
        ValueError, match=re.escape("images: expected (B, 3, 8, 12) f32, bf16 or f16 cpu, got (2,")
    ):
        model(images.double())
    with pytest.raises(ValueError, match=r"images: expected .* got .* f32 meta"):
        model(images.to("meta"))
    model.head.bias = torch.nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match=re.escape("head.bias: expected a tensor on cpu, got (3,) f32 meta")):
        model(images)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float64, "f64")):
        with pytest.raises(ValueError, match=f"parameters: expected .*f32 on cuda, got .* {name}.*autocast"):
            twin(build(SMALL)).to(dtype)(images.to(dtype))


def test_streams_and_captures(gpu: dict[str, Any]) -> None:
    """A captured call keeps its scratch memory; the first use of a weight cannot be captured."""
    model, images = twin(build(SMALL).eval()), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    for gpu["capturing"] in (True, True, False):
        assert torch.equal(model(images), wanted)
    vimcore_shim._core.release_memory()
    assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_recorded_inference(dtype: torch.dtype, gpu: dict[str, Any]) -> None:
    """Every replay reads the weights as they are, and eager calls between replays see them, too."""
    model, images = twin(build(SMALL).eval()), images_for(SMALL, 2, dtype)
    wanted = model(images)
    model.layers[0].mixer.in_proj.weight.data.mul_(1.5)  # the recording brings casts up to date
    with Graph(gpu) as graph:
        found = model(images)
    graph.replay()
    assert torch.equal(found, twin(model)(images))
    assert not torch.equal(found, wanted)
    for factor in (1.5, 0.5):
        for p in model.parameters():
            p.data.mul_(factor)
        graph.replay()
        assert torch.equal(found, twin(model)(images))
        assert torch.equal(found, model(images))
    vimcore_shim._core.release_memory()


@torch.no_grad()
def test_a_recorded_inference_keeps_its_weights(gpu: dict[str, Any]) -> None:
    """Parameters that moved are bound again; what a graph reads stays where it was."""
    model, images = twin(build(SMALL).eval()), images_for(SMALL, 2, torch.bfloat16)
    gc.collect()  # networks of other tests
    model(images)
    with Graph(gpu) as graph:
        found = model(images)
    graph.replay()
    wanted, used = found.clone(), runtime().vimcore_shim_used_bytes()
    for p in model.parameters():
        p.data = 2 * p.data
    model(images)
    gc.collect()
    assert runtime().vimcore_shim_used_bytes() > used  # casts of both
    rubbish = [
        torch.full_like(p, 7.0) for p in model.parameters()
    ]  # where the old ones were, if they were freed
    graph.replay()
    assert torch.equal(found, wanted)
    del rubbish
    vimcore_shim._core.release_memory()
    gc.collect()
    assert runtime().vimcore_shim_used_bytes() < used


def test_batch_of_nothing(gpu: dict[str, Any]) -> None:
    assert twin(build(SMALL)).eval()(torch.zeros(0, 3, 8, 12)).shape == (0, 3)
