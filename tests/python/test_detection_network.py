# SPDX-License-Identifier: Apache-2.0
"""The detector: published sizes and names, what training and pictures of any size give, what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import vimcore
from detection_helpers import SMALL, TWO, backbone, detector, target
from torch import Tensor
from vimcore.config import model_options
from vimcore.detection import CascadeMaskRCNN
from vimcore.nn.heads.rpn import anchors_of
from vimcore.weights.detector import checked_options, detector_flops, detector_shapes

# ---- sizes and names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [("vim_tiny_patch16_224", 60_080_078, 627.3), ("vim_small_patch16_224", 79_918_142, 710.3)],
)
def test_published_sizes(name: str, parameters: int, giga: float) -> None:
    """The norm behind the backbone's last block, which nothing uses, is no parameter there."""
    published = {"class_token": "none", "rope": True, "rope_residual": True, "num_classes": 0}
    config = vimcore.Config(**model_options(name, {"img_size": 1024, **published}))
    options = checked_options({}, config)
    shapes = {**config.param_shapes(), **detector_shapes(options, 80, config)}
    assert sum(math.prod(shape) for name, shape in shapes.items() if name != "norm_f.weight") == parameters
    heads = detector_flops(options, 80, config, 1000, 100)
    assert (config.flops() + heads) / 1e9 == pytest.approx(giga, abs=0.05)
    boxes = 49 * 4 * 589_824 + 12_544 * 1024 + 1024 * 85
    drawn = 196 * (4 * 589_824 + 262_144) + 784 * 256 * 80
    assert heads - detector_flops(options, 80, config, 0, 0) == 3 * 1000 * boxes + 100 * drawn
    maps = [(1024 // s, 1024 // s) for s in (4, 8, 16, 32, 64)]
    assert len(anchors_of(maps, (4, 8, 16, 32, 64), options["anchors"], torch.zeros(1))) == 261_888


def count(
    name: str, cost: dict[str, int], rows: dict[str, int], module: Any, x: tuple[Tensor], y: Tensor
) -> None:
    """Multiply-adds of a layer, and for how many boxes."""
    pixels = x[0] if isinstance(module, torch.nn.ConvTranspose2d) else y
    cost[name] = cost.get(name, 0) + module.weight.numel() * pixels[:, 0].numel()
    rows[name] = len(y)


@torch.no_grad()
def test_a_model_has_the_tensors_and_the_cost_of_its_description() -> None:
    for model in (detector(), detector(masks=False, anchors=(8, 16, 24, 32)), detector(box_convs=0)):
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == model.shapes()
        assert not model.backbone.norm_f.weight.requires_grad
        cost: dict[str, int] = {}
        rows: dict[str, int] = {}
        for name, module in model.named_modules():
            kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
            if isinstance(module, kinds) and not name.startswith("backbone."):
                module.register_forward_hook(partial(count, name, cost, rows))
        model.eval()([torch.randn(3, 32, 32)])
        boxes, masks = rows["roi_heads.box_head.0.fc1"], rows.get("roi_heads.mask_head.predictor", 0)
        assert boxes > 5
        assert sum(cost.values()) == model.flops(proposals=boxes, detections=masks) - model.backbone.flops()


def test_published_names() -> None:
    model = detector(box_convs=4, mask_convs=4)
    normed = ["weight", "norm.weight", "norm.bias"]
    names = {
        *(f"proposal_generator.rpn_head.conv.conv{i}" for i in range(2)),
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        *(f"roi_heads.box_head.{i}.fc1" for i in range(3)),
        *(f"roi_heads.box_predictor.{i}.{leaf}" for i in range(3) for leaf in ("cls_score", "bbox_pred")),
        "roi_heads.mask_head.deconv",
        "roi_heads.mask_head.predictor",
    }
    expected = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
    expected |= {
        f"roi_heads.box_head.{i}.conv{j}.{n}" for i in range(3) for j in (1, 2, 3, 4) for n in normed
    }
    expected |= {f"roi_heads.mask_head.mask_fcn{j}.{n}" for j in (1, 2, 3, 4) for n in normed}
    found = {name for name in model.state_dict() if not name.startswith(("backbone.", "pyramid."))}
    assert found == expected


# ---- what users give ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "vim", "targets"),
    [
        (3, {}, [target()]),
        (3, {}, [target(), target((2, 3, 14, 20))]),
        (1, {}, [target((2, 3, 14, 20), labels=(1,))]),
        (3, {"in_chans": 4}, [target((2, 3, 14, 20), (3, 3, 4, 4))]),
        (2, {"img_size": (32, 64)}, [target((2, 3, 14, 20), size=(32, 64))]),
    ],
    ids=["no object", "no object on one of two", "one class, one image", "4 channels", "not square"],
)
def test_every_parameter_learns(classes: int, vim: dict[str, Any], targets: list[dict[str, Tensor]]) -> None:
    model = detector(classes, vim)
    images = [torch.randn(vim.get("in_chans", 3), *t["masks"].shape[1:]) for t in targets]
    losses = model(images, targets)
    assert all(value.isfinite() for value in losses.values())
    assert len(losses) == 9
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert name == "backbone.norm_f.weight" or (p.grad is not None and p.grad.isfinite().all()), name
    model.eval()
    with torch.no_grad():
        found = model(images)
    for result, image in zip(found, images):
        count = len(result["scores"])
        assert result["boxes"].shape == (count, 4)
        assert result["masks"].shape == (count, 1, *image.shape[1:])
        assert ((result["labels"] >= 1) & (result["labels"] <= classes)).all()
        assert (result["scores"].diff() <= 0).all()


def test_without_masks() -> None:
    model = detector(masks=False)
    target_without = {k: v for k, v in TWO[0].items() if k != "masks"}
    assert "loss_mask" not in model([torch.randn(3, 32, 32)], [target_without])
    assert not any("mask" in name for name in model.state_dict())
    with torch.no_grad():
        assert set(model.eval()([torch.randn(3, 32, 32)])[0]) == {"boxes", "labels", "scores"}
    assert model.flops() < detector().flops()


@torch.no_grad()
def test_images_do_not_see_each_other() -> None:
    """Alone or with others, padded to the same size: the same results."""
    model = detector(score=0.0).eval()
    images = [torch.randn(3, 32, 32), torch.randn(3, 20, 27)]
    together = model(images)
    for image, found in zip(images, together):
        alone = model([image])[0]
        assert len(alone["scores"]) > 3
        for name, value in alone.items():
            torch.testing.assert_close(value, found[name], atol=1e-4, rtol=1e-4)
    assert (together[1]["boxes"].amax(0) <= torch.tensor([27.0, 20.0, 27.0, 20.0])).all()


@torch.no_grad()
def test_results_for_pictures_of_another_size() -> None:
    model = detector(score=0.0).eval()
    image = torch.randn(3, 32, 24)
    small, large = model([image])[0], model([image], sizes=[(64, 72)])[0]
    torch.testing.assert_close(large["boxes"], small["boxes"] * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    assert large["masks"].shape[2:] == (64, 72)
    assert torch.equal(large["labels"], small["labels"])
    with pytest.raises(ValueError, match="sizes: expected one for each of 1 images, got 2"):
        model([image], sizes=[(1, 1)] * 2)


@torch.no_grad()
def test_images_of_any_size() -> None:
    model = detector(vim={"dynamic_img_size": True}).eval()
    seen = []
    of, images = model.backbone.forward_intermediates, [torch.randn(3, 33, 40), torch.randn(3, 16, 70)]
    model.backbone.forward_intermediates = lambda x, at: seen.append(x.shape) or of(x, at)  # type: ignore
    assert len(model(images)) == 2
    assert seen == [(2, 3, 48, 80)]  # multiples of 16, the coarsest stride


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.tensor([0])},
            r"labels from 1 to 3, as torchvision counts \(0 is the background\), got 0",
        ),
        ({"labels": torch.tensor([4])}, "labels from 1 to 3.*got 4"),
        ({"labels": torch.tensor([1, 2])}, r"boxes \(N, 4\) and whole labels \(N,\)"),
        ({"labels": torch.tensor([1.0])}, "whole labels"),
        ({"boxes": torch.tensor([[5.0, 5.0, 5.0, 9.0]])}, r"x1 < x2 and y1 < y2, got \[5.0, 5.0, 5.0, 9.0\]"),
        ({"boxes": torch.tensor([[5.0, 5.0, math.inf, 9.0]])}, "x1 < x2"),
        ({"masks": torch.zeros(1, 8, 8)}, r"masks \(1, 32, 32\), got \(1, 8, 8\)"),
        ({"masks": None}, "expected tensors boxes, labels, masks|expected tensors masks"),
    ],
)
def test_wrong_targets(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"target 0: .*{message}|target 0: {message}"):
        detector()([torch.randn(3, 32, 32)], [{**target((2, 3, 14, 20)), **change}])


def test_wrong_calls() -> None:
    model = detector()
    image = torch.randn(3, 32, 32)
    with pytest.raises(ValueError, match="targets: needed in training"):
        model([image])
    with pytest.raises(ValueError, match="targets: expected one for each of 1 images, got 2"):
        model([image], TWO)
    model.eval()
    for images, message in (
        ([], "expected at least one"),
        ([torch.randn(1, 32, 32)], r"image 0: expected a tensor \(3, h, w\), got \(1, 32, 32\)"),
        ([image, "x"], "image 1: .*got str"),
        (
            [torch.randn(3, 33, 32)],
            "at most 32 x 32 pixels, got 33 x 32; make them smaller, or set backbone.dyn",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected 1 or more, got 0"),
        ({"anchors": (8, 16)}, "anchors: expected 3 or 4, one for each level, got 2"),
        ({"anchors": (8, 16, -1)}, "anchors: expected numbers above 0, got -1"),
        ({"before_nms": (5,)}, "before_nms: expected one number for training and one for inference"),
        ({"score": 1.0}, "score: expected 0 or more and less than 1, got 1.0"),
        ({"box_convs": -1}, "box_convs: expected 0 to 256, got -1"),
        ({"masks": "yes"}, "masks: expected True or False"),
        ({"backbone": torch.nn.Identity()}, "backbone: expected a VisionMamba, got Identity"),
        (
            {"backbone": backbone(num_classes=5)},
            r"has a head for 5 classes, which would not be used; backbone.reset_classifier\(0\)",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        CascadeMaskRCNN(**{"backbone": backbone(), "num_classes": 3, **SMALL, **options})
