# SPDX-License-Identifier: Apache-2.0
"""Recipes of segmentation: learning rates, which parameters learn how fast, options that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vimcore
from vimcore.tasks.segmentation.settings import SegmentationSettings
from vimcore.tasks.segmentation.task import Segmentation, sight_of
from vimcore.train.optimizer import create_optimizer
from vimcore.train.presets import recipe, task_of
from vimcore.train.schedule import Schedule, peak_lr

NAMES = ("seg-tiny-released", "seg-tiny-paper", "seg-small-released", "seg-small-paper")
SMALL: dict[str, Any] = {"img_size": (32,), "patch_size": 4, "embed_dim": 16, "depth": 3, "head_channels": 8}


def settings(name: str, **typed: Any) -> SegmentationSettings:
    assert task_of(name) == "segment"
    return recipe(SegmentationSettings, name, typed)[0]


@pytest.mark.parametrize(
    ("name", "world", "images", "peak", "updates", "decay"),
    [
        ("seg-tiny-released", 4, 32, 2e-4, 60_000, 0.1),
        ("seg-small-released", 4, 32, 1e-4, 60_000, 0.05),
        ("seg-tiny-paper", 2, 16, 6e-5, 160_000, 0.01),
        ("seg-small-paper", 2, 16, 6e-5, 160_000, 0.01),
    ],
)
def test_learning_rates(name: str, world: int, images: int, peak: float, updates: int, decay: float) -> None:
    """Warm-up over 1500 updates multiplies a rate that falls to 0 on a line."""
    s = settings(name)
    assert s.batch_size * s.accumulate * world == images
    assert (s.updates, s.weight_decay) == (updates, decay)
    assert peak_lr(s, world) == pytest.approx(peak, rel=1e-12)
    schedule = Schedule(s, peak_lr(s, world), 631, updates)
    for t in (0, 1, 750, 1499, 1500, 30_000, updates - 1):
        wanted = peak * (1 - t / updates) * (1 - (1 - min(t / 1500, 1)) * (1 - 1e-6))
        assert schedule(t) == pytest.approx(wanted, rel=1e-9), t
    if name == "seg-tiny-released":
        points = ((0, 2.0e-10), (750, 9.875e-5), (1500, 1.95e-4), (30_000, 1.0e-4), (59_999, 3.3e-9))
        for t, wanted in points:
            assert schedule(t) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(("name", "width"), [("seg-tiny-segmenter", 192), ("seg-small-segmenter", 384)])
def test_recipe_of_segmenter(name: str, width: int) -> None:
    """SGD without decay or warm-up, 64 epochs of 8 images, windows side by side."""
    s = settings(name, in_chans=3)
    assert (s.batch_size, s.accumulate, s.epochs, s.updates, s.weight_decay) == (8, 1, 64, None, 0)
    assert peak_lr(s, 1) == pytest.approx(1e-3)
    schedule = Schedule(s, peak_lr(s, 1), 2527)  # 20,210 images
    for t in (0, 1, 80_000, 64 * 2527 - 1):
        assert schedule(t) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - t / (64 * 2527)) ** 0.9, rel=1e-9), t
    task = Segmentation(s)
    task.classes = [str(i) for i in range(150)]
    model, _ = task.build()
    assert type(model) is vimcore.segmentation.Segmenter
    assert (model.backbone.embed_dim, model.options["layers"]) == (width, 2)
    assert model.backbone.config["drop_path_rate"] == 0.1
    optimizer = create_optimizer(model, s, 1e-3, task.layers(), task.layer_decay())
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 0)}
    sight = sight_of(model, s, torch.float32)
    assert (sight.window, sight.stride, s.loss_average) == ((512, 512), (512, 512), "valid")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_make_their_networks(name: str) -> None:
    """At the sizes of the paper's table, without computing."""
    s = settings(name)
    task = Segmentation(s.merged({"in_chans": 3}))
    task.classes = [str(i) for i in range(150)]
    model, _ = task.build()
    assert type(model) is vimcore.segmentation.UperNet
    released = name.endswith("released")
    assert model.backbone.config["class_token"] == ("none" if released else "middle")
    assert model.options["taps"] == ("mixer" if name == "seg-tiny-released" else "stream")
    if name == "seg-tiny-released":
        assert sum(p.numel() for p in model.parameters()) == 12_311_276
    if name == "seg-small-released":
        assert sum(p.numel() for p in model.parameters()) == 45_448_364
        assert model.backbone.config["rope"]
    sight = sight_of(model, s, torch.float32)
    assert (sight.window, sight.stride) == ((512, 512), (341, 341))
    assert s.resize == (512, 2048)
    assert s.reduce_zero_label
    assert s.loss_average == ("all" if released else "valid")


def optimizer_of(**changes: Any) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate and weight decay of each parameter."""
    values = {**SMALL, "in_chans": 3, "weight_decay": 0.1, "layer_decay": 0.5, **changes}
    task = Segmentation(SegmentationSettings().merged(values))
    task.classes = ["a", "b"]
    model, _ = task.build()
    optimizer = create_optimizer(model, task.settings, 1.0, task.layers(), task.layer_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [(p, g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    found = {names[id(p)]: (scale, decay) for p, scale, decay in groups}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


def test_layer_decay_as_intended() -> None:
    """rate^(25 - group) with 24 blocks; of 3, neck and heads are group 4; positions do not decay."""
    for name, (scale, decay) in optimizer_of().items():
        if name.startswith(("backbone.pos_embed", "backbone.patch_embed", "backbone.cls_token")):
            group = 0
        elif name.startswith("backbone.layers."):
            group = int(name.split(".")[2]) + 1
        else:
            group = 4
        assert scale == 0.5 ** (4 - group), name
        if name in ("backbone.pos_embed", "backbone.cls_token") or name.endswith("bias"):
            assert decay == 0, name
        if name.endswith(("in_proj.weight", "conv.weight")):
            assert decay == 0.1, name


def test_layer_decay_as_released() -> None:
    """Positions and patches alone, and the table is decayed."""
    for name, (scale, decay) in optimizer_of(optimizer_groups="released", class_token="none").items():
        stem = name.startswith(("backbone.pos_embed", "backbone.patch_embed"))
        assert scale == (0.5**4 if stem else 1), name
        if name in ("backbone.pos_embed", "backbone.patch_embed.proj.weight"):
            assert decay == 0.1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head": "fcn", "head_layers": 2}, "head_layers: an option of the head segmenter, not of fcn"),
        ({"head": "segmenter", "head_channels": 8}, "head_channels: an option of the head fcn or uper"),
        ({"head": "mlp"}, "head: expected one of fcn"),
        ({"resize": (2048, 512)}, "resize: expected 2 numbers above 0, the smaller first"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"window": (1, 2, 3)}, "window: expected 1 or 2 numbers"),
        ({"whole": True, "window": (32,)}, "whole: there are no windows"),
        ({"hflip": 1.5}, "hflip"),
        ({"crop_share": 0.0}, "crop_share"),
        ({"classes": 256}, "classes: expected 1 to 255"),
        ({"scenes": 0}, "scenes"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SegmentationSettings(**changes)


def test_windows_with_gaps_are_refused() -> None:
    s = SegmentationSettings().merged({**SMALL, "in_chans": 3, "window_stride": (64,)})
    task = Segmentation(s)
    task.classes = ["a", "b"]
    model, _ = task.build()
    with pytest.raises(ValueError, match="leaves gaps between windows"):
        sight_of(model, s, torch.float32)
