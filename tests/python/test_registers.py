# SPDX-License-Identifier: Apache-2.0
"""Registers (Mamba-R): the network against the reference, and against the published layout of tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import assert_matches_reference, build, images_for, small
from torch import Tensor
from vim_infer import picture
from vim_infer import run as vim_infer
from vimcore import _core
from vimcore.analysis.layers import Layers
from vimcore.autograd import draws
from vimcore.config import model_options
from vimcore.nn.plain import Plain
from vimcore.pretraining import MaskedImages, NextPatch
from vimcore.weights.convert import convert

REGISTERS = small(img_size=(12, 20), class_token="registers", registers=4)  # 15 patches: groups of 3
CASES = {
    "joined": {},
    "neck": {"neck_reduction": 2},
    "neck, layer norm": {"neck_reduction": 4, "norm": "layer"},
    "one": {"registers": 1},
    "without a head": {"neck_reduction": 2, "num_classes": 0},
    "without positions": {"pos_embed": False},
    "as many as fit": {"registers": 14},
    "pairs": {"directions": "block", "neck_reduction": 2},
}
NECK = reference.Config(**{**REGISTERS.arguments(), "neck_reduction": 2})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    config = reference.Config(**{**REGISTERS.arguments(), **CASES[name]})
    assert_matches_reference(config, 3, dtype)


# ---- the published networks --------------------------------------------------------------------------------

PUBLISHED = {  # width, depth, registers, reduction; parameters in millions, as the paper rounds them
    "tiny": (192, 24, 12, 1, 9),
    "small": (384, 24, 12, 2, 28),
    "base": (768, 24, 12, 4, 99),
    "large": (1024, 48, 16, 8, 341),
}
COUNTS = {"tiny": 9_264_232, "small": 27_801_064, "base": 99_301_096, "large": 341_222_376}


def layout(
    width: int, depth: int, registers: int, reduction: int, classes: int = 1000
) -> dict[str, list[int]]:
    """Keys and shapes in the order of the state dict that the authors' module has."""
    inner, rank = 2 * width, width // 16
    found = {
        "cls_token": [1, registers, width],
        "pos_embed_cls": [1, registers, width],
        "pos_embed": [1, 196, width],
        "patch_embed.proj.weight": [width, 3, 16, 16],
        "patch_embed.proj.bias": [width],
    }
    if reduction > 1:
        found["neck.weight"] = [width // reduction, width]
        found["norm_neck.weight"] = [width * registers // reduction]
    found["head.weight"] = [classes, width * (registers // reduction)]
    found["head.bias"] = [classes]
    for layer in range(depth):
        mixer = {"A_log": [inner, 16], "D": [inner], "A_b_log": [inner, 16], "D_b": [inner]}
        mixer["in_proj.weight"] = [2 * inner, width]
        for side in ("", "_b"):
            mixer[f"conv1d{side}.weight"], mixer[f"conv1d{side}.bias"] = [inner, 1, 4], [inner]
            mixer[f"x_proj{side}.weight"] = [rank + 32, inner]
            mixer[f"dt_proj{side}.weight"], mixer[f"dt_proj{side}.bias"] = [inner, rank], [inner]
        mixer["out_proj.weight"] = [width, inner]
        found.update({f"layers.{layer}.mixer.{key}": shape for key, shape in mixer.items()})
        found[f"layers.{layer}.norm.weight"] = [width]
    found["norm_f.weight"] = [width]
    return found


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_layout(size: str) -> None:
    width, depth, registers, reduction, millions = PUBLISHED[size]
    config = vimcore.Config(**model_options(f"mambar_{size}_patch16_224"))
    shapes = {key: list(shape) for key, shape in config.param_shapes().items()}
    wanted = layout(width, depth, registers, reduction)
    assert shapes == wanted
    assert config.average_directions
    count = sum(map(math.prod, shapes.values()))
    assert count == COUNTS[size]
    assert round(count / 1e6) == millions


def published_file(path: Path, **changes: list[int]) -> dict[str, Tensor]:
    """A checkpoint as the authors' training writes it, of fewer layers and channels."""
    generator = torch.Generator().manual_seed(5)
    shapes = {**layout(48, 2, 12, 4, classes=10), **changes}
    state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    torch.save({"model": state, "epoch": 3}, path)
    return state


def test_published_checkpoints_load_strictly(tmp_path: Path) -> None:
    state = published_file(tmp_path / "mambar.pth")
    options = {"embed_dim": 48, "depth": 2, "neck_reduction": 4, "num_classes": 10}
    model = vimcore.create_model("mambar_base_patch16_224", **options)
    assert list(model.state_dict()) == list(state)
    vimcore.load_checkpoint(model, tmp_path / "mambar.pth")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    truth = reference.forward(
        reference.Config(class_token="registers", registers=12, **options),
        {key: value.double() for key, value in state.items()},
        images.double(),
    )
    assert relative(model.eval()(images), truth.logits) < 1e-5

    config, assumptions = convert(str(tmp_path / "mambar.pth"), str(tmp_path / "F.safetensors"))
    assert config == {**model.config, "class_token": "registers", "registers": 12}
    assert any("average_directions=True" in text for text in assumptions)
    assert not any(text.startswith("class_token") for text in assumptions)
    assert torch.equal(vimcore.VisionMamba.load(tmp_path / "F.safetensors")(images), model(images))
    runtime = vimcore.Runtime(tmp_path / "F.safetensors")
    np.testing.assert_array_equal(runtime(images.numpy()), model(images).detach().numpy())

    published_file(tmp_path / "other.pth", **{"neck.weight": [24, 48]})
    with pytest.raises(ValueError, match=r"misshapen: neck.weight: expected \(12, 48\), got \(24, 48\)"):
        vimcore.load_checkpoint(model, tmp_path / "other.pth")


# ---- what depends on where class tokens stand --------------------------------------------------------------


def test_maps_features_and_the_plain_twin() -> None:
    weights, images = reference.random_weights(NECK), images_for(NECK, 2)
    model = build(NECK, weights, torch.float64).eval()
    truth = reference.forward(NECK, weights, images)
    with torch.no_grad():
        for found, wanted in zip(
            model.forward_intermediates(images, [0, 1]), truth.intermediates, strict=True
        ):
            assert found.shape == (2, 16, 3, 5)
            assert relative(found, wanted) < 1e-12
        tokens = model.forward_features(images)
        assert relative(Plain(model, lambda name, x: None).tokens(images), tokens) < 1e-12
        assert relative(model.forward_head(tokens), truth.logits) < 1e-12
    assert model._config.class_positions == reference.register_positions(NECK) == [3, 7, 11, 15]


def test_other_sizes() -> None:
    model = build(NECK).eval()
    model.dynamic_img_size = True
    larger, images = build(NECK).eval(), torch.randn(2, 3, 20, 24)
    larger.load_state_dict(model.state_dict())
    larger.set_input_size((20, 24))
    assert larger._config.class_positions == [6, 13, 20, 27]
    with torch.no_grad():
        assert relative(model(images), larger(images)) < 1e-6
    with pytest.raises(ValueError, match="registers: expected 1 to 3, fewer than the patches, got 4"):
        model(images[..., :8, :8])


def test_what_explains_reads_the_registers() -> None:
    model = build(NECK, dtype=torch.float64).eval()
    images = images_for(NECK, 1)
    net = Layers("test", model, images)
    with torch.no_grad():
        h, r = net.embed(net.patches()), None
        for layers in net.groups:
            h, r = net.group(layers, h, r)
        assert relative(net.last_norm(h + r), model.forward_features(images)) < 1e-12
    assert net.class_row().nonzero().flatten().tolist() == [3, 7, 11, 15]
    maps = vimcore.attention_maps(model, images)
    assert maps.shape == (1, 2, 2, 3, 5)
    assert vimcore.token_norms(model, images).shape == (1, 2, 3, 5)
    assert vimcore.attention_rollout(model, images).shape == (1, 3, 5)
    assert vimcore.relevance(model, images).shape == (1, 3, 5)
    assert vimcore.saliency(model, images).shape == (1, 12, 20)


def test_dropout_of_tokens_leaves_registers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    own = draws.exported
    monkeypatch.setattr(draws, "exported", lambda x: own(seen.append(x) or x))
    config = _core.Config(**{**NECK.arguments(), "drop_rate": 0.75})
    draws.draw(config, torch.randn(2, 3, 12, 20))
    dropout = seen[1]
    assert dropout is not None
    patches = [t for t in range(19) if t not in config.class_positions]
    assert bool((dropout[:, config.class_positions] == 1).all())
    assert set(dropout[:, patches].unique().tolist()) == {0.0, 4.0}


def test_dense_networks_and_pretraining_leave_registers_out() -> None:
    images = torch.randn(1, 3, 16, 16)
    backbone = vimcore.VisionMamba(
        img_size=16, patch_size=4, embed_dim=16, depth=4, class_token="registers", registers=3, num_classes=0
    )
    assert vimcore.segmentation.FCN(backbone, 5).eval()(images).shape == (1, 5, 16, 16)
    assert vimcore.segmentation.Segmenter(backbone, 5).eval()(images).shape == (1, 5, 16, 16)
    for learner in (MaskedImages(backbone), NextPatch(backbone)):
        learner(images).backward()
    with_neck = vimcore.VisionMamba(
        img_size=16, patch_size=4, embed_dim=16, depth=4, class_token="registers", registers=4,
        neck_reduction=2, num_classes=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"its neck \(neck_reduction=2\) would not be used"):
        vimcore.segmentation.FCN(with_neck, 5)
    with pytest.raises(ValueError, match=r"its neck \(neck_reduction=2\) would not be used"):
        MaskedImages(with_neck)


def test_timm() -> None:
    import timm
    import vimcore.timm  # noqa: F401

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "registers": 4, "num_classes": 3}
    model = timm.create_model("vimcore_mambar_small_patch16_224", **options).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert model.head_hidden_size == 32
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 32)
    torch.testing.assert_close(model.forward_head(tokens), model(images))
    found = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
    assert [tuple(x.shape) for x in found[0]] == [(2, 16, 4, 4), (2, 4, 16)]
    with pytest.raises(ValueError, match="global_pool: the head of registers reads 'token', got 'avg'"):
        model.reset_classifier(3, "avg")


def test_multiply_adds_of_neck_and_head() -> None:
    plain, neck = (
        vimcore.VisionMamba(**{**REGISTERS.arguments(), **CASES[name]}) for name in ("joined", "neck")
    )
    assert plain.flops() - neck.flops() == 3 * 4 * 16 - 3 * 4 * 8 - 4 * 16 * 8


def test_without_python(tmp_path: Path) -> None:
    options = {**NECK.arguments(), "img_size": (16, 24)}
    model = vimcore.VisionMamba(**options)
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "F.safetensors", ["a", "b", "c"])
    picture(40, 60, 1).save(tmp_path / "picture.png")
    found = vim_infer(
        "predict", "--weights", tmp_path / "F.safetensors", "--json", "--logits", tmp_path / "picture.png"
    )
    logits = json.loads(found.stdout)["logits"]
    from vimcore.tools.predict import predict

    (ours,) = predict(vimcore.Runtime(tmp_path / "F.safetensors"), [str(tmp_path / "picture.png")])
    np.testing.assert_allclose(logits, ours.logits, rtol=1e-5, atol=1e-6)
    about = vim_infer("info", tmp_path / "F.safetensors").stdout
    assert "4 x 6 patches, class tokens: 4" in about
    embedded = vim_infer(
        "features",
        "--weights",
        tmp_path / "F.safetensors",
        "--out",
        tmp_path / "f.safetensors",
        tmp_path / "picture.png",
    )
    assert embedded.returncode == 0, embedded.stderr
    (features,) = _core.read_safetensors(tmp_path / "f.safetensors")[0].values()
    assert features.shape == (1, 4 * 16)  # all registers, before the neck
