# SPDX-License-Identifier: Apache-2.0
"""The detector: published sizes and names, its pieces against formulas, its losses against slow loops."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import vimcore
from detection_helpers import SMALL, backbone, detector, target
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from vimcore.config import model_options
from vimcore.detection import CascadeMaskRCNN
from vimcore.nn.heads.cascade import OVERLAPS, WEIGHTS, Objects
from vimcore.nn.heads.masks import mask_targets, paste
from vimcore.nn.heads.roi import aligned, levels_of, pool, products
from vimcore.nn.heads.rpn import RATIOS, anchors_of
from vimcore.weights.detector import checked_options, detector_flops, detector_shapes

TWO = [target((2, 3, 14, 20), (10, 8, 30, 28)), target((5, 5, 12, 17))]


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


# ---- pieces ------------------------------------------------------------------------------------------------


def test_anchors_are_torchvisions_without_rounding() -> None:
    sizes, strides = (9.0, 17.5), (4, 8)
    maps = [torch.zeros(1, 1, 6, 10), torch.zeros(1, 1, 3, 5)]
    theirs = AnchorGenerator(tuple((s,) for s in sizes), (RATIOS,) * 2)
    theirs.cell_anchors = [
        torch.tensor([[-1 / r**0.5, -(r**0.5), 1 / r**0.5, r**0.5] for r in RATIOS]) * size / 2
        for size in sizes
    ]
    wanted = theirs(ImageList(torch.zeros(1, 3, 24, 40), [(24, 40)]), maps)[0]
    found = anchors_of([(6, 10), (3, 5)], strides, sizes, torch.zeros(1))
    torch.testing.assert_close(found, wanted)


def test_pooling_of_a_ramp() -> None:
    """A bin's mean is the value at its centre, less the half pixel between centres and corners."""
    stride = 4
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    boxes = torch.tensor([[8.0, 12.0, 40.0, 36.0], [13.5, 9.0, 61.0, 44.0]], dtype=torch.float64)
    found = pool([torch.stack([y, x])[None].double()], [stride], [boxes], 7)
    for box, values in zip(boxes, found):
        for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
            centres = (low + (high - low) * (torch.arange(7).double() + 0.5) / 7) / stride - 0.5
            wanted = centres[:, None].expand(7, 7) if axis == 0 else centres.expand(7, 7)
            torch.testing.assert_close(values[axis], wanted)


def test_products_are_torchvisions_pooling() -> None:
    """Values and gradients, of boxes within, partly and wholly outside, of less than a pixel, of none."""
    chance = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, 9, 13, dtype=torch.float64, generator=chance, requires_grad=True)
    low = torch.rand(60, 2, dtype=torch.float64, generator=chance) * 80 - 20
    size = torch.rand(60, 2, dtype=torch.float64, generator=chance) ** 2 * 70
    size[0] = 0
    index = torch.tensor([0] * 30 + [2] * 30, dtype=torch.float64)  # none on the second image
    rois = torch.cat([index[:, None], low, low + size], 1)
    probe = torch.randn(60, 4, 7, 7, dtype=torch.float64, generator=chance)
    results = []
    for function in (products, aligned):
        found = function(maps, rois, 7, 0.25)
        (gradient,) = torch.autograd.grad((found * probe).sum(), maps)
        results.append((found, gradient))
        assert function(maps, rois[:0], 7, 0.25).shape == (0, 4, 7, 7)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_levels() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.0, 448.0, 5000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert levels_of(boxes, [4, 8, 16, 32]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert levels_of(boxes, [16, 32]).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_boxes_read_their_level_and_image() -> None:
    maps = [
        torch.full((2, 1, 64, 64), float(i)) + torch.tensor([0.0, 10.0])[:, None, None, None] for i in (0, 1)
    ]
    small, large = [0.0, 0.0, 30.0, 30.0], [0.0, 0.0, 150.0, 150.0]
    boxes = [torch.tensor([large, small]), torch.tensor([small, large, large])]
    assert pool(maps, [4, 8], boxes, 2)[:, 0, 0, 0].tolist() == [1, 0, 10, 11, 11]


@pytest.mark.parametrize("box", [(3.0, 4.0, 13.0, 9.0), (2.4, 1.2, 20.6, 19.3), (-3.0, 10.0, 8.2, 30.0)])
def test_a_full_mask_fills_the_pixels_whose_centres_it_covers(box: tuple[float, ...]) -> None:
    pasted = paste(torch.ones(1, 28, 28, dtype=torch.float64), torch.tensor([box]).double(), (24, 26))
    y, x = (torch.arange(n) + 0.5 for n in (24, 26))
    wanted = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))
    assert torch.equal(pasted[0] >= 0.5, wanted)


def test_pasting_is_a_sample_of_the_whole_image() -> None:
    """Only the surroundings of boxes are computed: nothing is lost."""
    masks = torch.rand(3, 28, 28, dtype=torch.float64)
    boxes = torch.tensor([[1.0, 2.0, 25.0, 23.0], [-30.0, -5.0, 60.0, 90.0], [9.3, 9.3, 9.4, 12.0]]).double()
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (24, 30))
    for mask, box, found in zip(masks, boxes, paste(masks, boxes, (24, 30))):
        v, u = (y - box[1]) / (box[3] - box[1]) * 2 - 1, (x - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack([u.expand(24, 30), v[:, None].expand(24, 30)], 2)
        wanted = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        torch.testing.assert_close(found, wanted)


def test_mask_targets() -> None:
    """1 where half of a bin is covered, and 0 below: of a half-covered box the first half."""
    masks = torch.zeros(2, 40, 40)
    masks[0, 6:20, :], masks[1] = 1, 1
    tops = torch.tensor([6.0, 6.0, 6.5, 6.7])
    boxes = torch.stack([0 * tops, tops, 0 * tops + 28, tops + 28], 1)
    first, full, shifted, further = mask_targets(masks, torch.tensor([0, 1, 0, 0]), boxes, 28)
    assert full.min() == 1
    assert torch.equal(first[:14], torch.ones(14, 28))
    assert first[14:].max() == 0
    assert torch.equal(shifted, first)  # the row that is covered by half counts
    assert torch.equal(further[:13], torch.ones(13, 28))
    assert further[13:].max() == 0  # by less than half does not


def test_zero_deltas_return_the_proposals() -> None:
    model = detector().eval()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    torch.nn.init.zeros_(model.roi_heads.box_predictor[2].cls_score.weight)
    model.roi_heads.score = 0.0
    with torch.no_grad():
        maps, sizes = model.features([torch.randn(3, 32, 32)])
        proposals = torch.tensor([[2.0, 3.0, 20.0, 30.0], [0.0, 0.0, 9.5, 7.25]])
        found = model.roi_heads.detect(maps, [proposals], sizes)[0]
    assert len(found.boxes) == 6  # of each class
    for box, score, label in zip(found.boxes, found.scores, found.classes):
        assert torch.isclose(proposals, box, atol=1e-5).all(1).any(), (score, label)


def moved(box: Tensor, deltas: Tensor, weights: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """A box after a stage, cut off at the edges of the image."""
    d = deltas / torch.tensor(weights)
    side, centre = box[2:] - box[:2], (box[2:] + box[:2]) / 2
    centre, side = centre + d[:2] * side, side * d[2:].clamp(max=math.log(1000 / 16)).exp()
    found = torch.cat([centre - side / 2, centre + side / 2])
    return found.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))


@torch.no_grad()
def test_detections_step_by_step() -> None:
    """Boxes of the last stage, scores of all three, and of boxes of one class that overlap the best."""
    model = detector(score=0.1, detections=24).double().eval()
    heads, images = model.roi_heads, [torch.randn(3, 32, 32, dtype=torch.float64)]
    maps, sizes = model.features(images)
    proposals = model.proposal_generator(maps, sizes)[0]
    found = heads.detect(maps, proposals, sizes)[0]
    boxes, scores = proposals[0], torch.zeros(len(proposals[0]), 4, dtype=torch.float64)
    for i in range(3):
        pooled = pool(maps, heads.strides, [boxes], 7)
        logits, deltas = heads.box_predictor[i](heads.box_head[i](pooled))
        scores += logits.softmax(1) / 3
        boxes = torch.stack([moved(*pair, WEIGHTS[i], sizes[0]) for pair in zip(boxes, deltas)])
    rows = [(float(scores[j, k]), j, k) for j in range(len(boxes)) for k in range(3) if scores[j, k] > 0.1]
    kept: list[tuple[float, int, int]] = []
    for score, j, k in sorted(rows, reverse=True):
        if all(k != other or overlap(boxes[j], boxes[at]) <= 0.5 for _, at, other in kept):
            kept.append((score, j, k))
    best = kept[:24]
    across = [(a, b) for a in best for b in best if a[2] != b[2] and overlap(boxes[a[1]], boxes[b[1]]) > 0.5]
    assert len(rows) > len(kept) > 24
    assert across  # of other classes they stay
    assert found.classes.tolist() == [k for _, _, k in best]
    assert found.scores.tolist() == pytest.approx([score for score, _, _ in best])
    torch.testing.assert_close(found.boxes, boxes[[j for _, j, _ in best]])
    assert heads.mask_head is not None
    assert found.masks is not None
    drawn = heads.mask_head(pool(maps, heads.strides, [found.boxes], 14)).sigmoid()
    torch.testing.assert_close(found.masks, torch.stack([x[k] for x, (_, _, k) in zip(drawn, best)]))


# ---- losses ------------------------------------------------------------------------------------------------


def overlap(a: Tensor, b: Tensor) -> float:
    return float(box_iou(a[None], b[None]))


def deltas_of(truth: Tensor, box: Tensor, weights: tuple[float, ...]) -> Tensor:
    (w, h), (v, u) = ((b[2:] - b[:2]).tolist() for b in (box, truth))
    x, y = ((truth[:2] + truth[2:] - box[:2] - box[2:]) / 2).tolist()
    values = (x / w, y / h, math.log(v / w), math.log(u / h))
    return torch.tensor([a * b for a, b in zip(weights, values)], dtype=box.dtype)


def test_losses_of_the_proposals() -> None:
    """Sums over all anchors, one by one: a sample that takes everything has no chance."""
    model = detector(anchors_sampled=10_000).double()
    rpn, images = model.proposal_generator, [torch.randn(3, 32, 32, dtype=torch.float64) for _ in TWO]
    truth = [t["boxes"].double() for t in TWO]
    maps, sizes = model.features(images)
    _, losses = rpn(maps, sizes, truth)
    logits, deltas = rpn.rpn_head(maps)
    anchors = anchors_of([(x.shape[2], x.shape[3]) for x in maps], rpn.strides, rpn.sizes, maps[0])
    expected = torch.zeros(2, dtype=torch.float64)
    for i, boxes in enumerate(truth):
        logit = torch.cat([x[i].permute(1, 2, 0).reshape(-1) for x in logits])
        delta = torch.cat([x[i].unflatten(0, (3, 4)).permute(2, 3, 0, 1).reshape(-1, 4) for x in deltas])
        every = box_iou(boxes, anchors)
        best = every.max(1).values
        for j, anchor in enumerate(anchors):
            own, place = every[:, j].max(0)
            if own >= 0.7 or (every[:, j] == best).any():
                expected[0] += F.softplus(-logit[j])
                expected[1] += (delta[j] - deltas_of(boxes[place], anchor, (1, 1, 1, 1))).abs().sum()
            elif own < 0.3:
                expected[0] += F.softplus(logit[j])
    found = torch.stack([losses["loss_objectness"], losses["loss_rpn_box_reg"]])
    torch.testing.assert_close(found, expected / (2 * 10_000))


def test_losses_of_the_stages() -> None:
    """Every stage takes all that the one before left; boxes of the truth are added once."""
    model = detector(boxes_sampled=1000).double()
    heads, images = model.roi_heads, [torch.randn(3, 32, 32, dtype=torch.float64) for _ in TWO]
    maps, sizes = model.features(images)
    proposals = [
        torch.tensor([[1.0, 2.0, 15.0, 19.0], [20.0, 1.0, 31.0, 9.0], [8.0, 9.0, 28.0, 27.0]]).double(),
        torch.tensor([[4.0, 6.0, 13.0, 18.0], [0.0, 0.0, 5.0, 5.0]]).double(),
    ]
    truth = [Objects(t["boxes"].double(), t["labels"] - 1, t["masks"]) for t in TWO]
    found = heads.losses(maps, proposals, truth, sizes)
    boxes = [torch.cat([p, t.boxes]) for p, t in zip(proposals, truth)]
    first: list[tuple[int, Tensor, int, int]] = []
    for i in range(3):
        pooled = pool(maps, heads.strides, boxes, 7)
        logits, deltas = heads.box_predictor[i](heads.box_head[i](pooled))
        cross, distance, at = torch.zeros(()).double(), torch.zeros(()).double(), 0
        following: list[list[Tensor]] = [[], []]
        for j, (image, objects) in enumerate(zip(boxes, truth)):
            for box in image:
                overlaps = [overlap(box, other) for other in objects.boxes]
                best = max(range(len(overlaps)), key=overlaps.__getitem__)
                label = 3
                if overlaps[best] >= OVERLAPS[i]:
                    label = int(objects.classes[best])
                    distance += (deltas[at] - deltas_of(objects.boxes[best], box, WEIGHTS[i])).abs().sum()
                    if i == 0:
                        first.append((j, box, label, best))
                cross += logits[at].logsumexp(0) - logits[at][label]
                after = moved(box, deltas[at].detach(), WEIGHTS[i], (32, 32))
                if (after[2:] > after[:2]).all():
                    following[j].append(after)
                at += 1
        torch.testing.assert_close(found[f"loss_classifier_{i + 1}"], cross / at)
        torch.testing.assert_close(found[f"loss_box_reg_{i + 1}"], distance / at)
        boxes = [torch.stack(x) for x in following]
    assert heads.mask_head is not None
    assert len(first) >= 5
    total = torch.zeros(()).double()
    for j, box, label, best in first:
        of = [box[None] if k == j else box.new_zeros(0, 4) for k in range(2)]
        logits = heads.mask_head(pool(maps, heads.strides, of, 14))[0, label]
        masks = truth[j].masks
        assert masks is not None
        wanted = mask_targets(masks, torch.tensor([best]), box[None], 28)[0]
        total += (F.softplus(logits) - logits * wanted).mean()
    torch.testing.assert_close(found["loss_mask"], total / len(first))


def test_stages_share_the_gradient_of_the_maps() -> None:
    """A third each; the masks' is whole; the heads' own is whole."""
    model = detector()
    heads = model.roi_heads
    maps, sizes = model.features([torch.randn(3, 32, 32)])
    maps = [x.detach().requires_grad_() for x in maps]
    truth = [Objects(TWO[0]["boxes"], TWO[0]["labels"] - 1, TWO[0]["masks"])]
    proposals = [torch.tensor([[1.0, 2.0, 15.0, 19.0], [20.0, 1.0, 31.0, 9.0]])]

    def gradients(scaled: bool, name: str) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if not scaled:
                patch.setattr("vimcore.nn.heads.cascade.ScaledGradient.apply", lambda x, _: x)
            torch.manual_seed(1)
            loss = heads.losses(maps, proposals, truth, sizes)[name]
        return list(torch.autograd.grad(loss, [maps[0], *heads.parameters()], allow_unused=True))

    for name, share in (("loss_classifier_2", 1 / 3), ("loss_box_reg_3", 1 / 3), ("loss_mask", 1.0)):
        ours, whole = gradients(True, name), gradients(False, name)
        assert whole[0].abs().max() > 0
        torch.testing.assert_close(ours[0], whole[0] * share)
        assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(ours[1:], whole[1:]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_whole_detector_against_a_plain_backbone(dtype: torch.dtype, tolerance: float) -> None:
    """Losses and gradients of every parameter, against float64 with the backbone written for reading."""
    options: dict[str, Any] = {"rope": True, "rope_residual": True, "class_token": "none"}
    ours, plain = detector(vim=options).to(dtype), detector(vim=options).double()
    config = reference.Config(img_size=32, patch_size=4, embed_dim=16, depth=2, num_classes=0, **options)
    vim = plain.backbone
    weights = dict(vim.named_parameters())
    vim.forward_intermediates = lambda x, _: [  # type: ignore[method-assign]
        reference.forward(config, weights, x).intermediates[-1]
    ]
    images = [torch.randn(3, 32, 28), torch.randn(3, 25, 32)]
    targets = [target((2, 3, 14, 20), (9, 8, 27, 28), size=(32, 28)), target((5, 5, 12, 17), size=(25, 32))]
    losses = []
    for model, kind in ((ours, dtype), (plain, torch.float64)):
        torch.manual_seed(3)
        found = model([x.to(kind) for x in images], targets)
        sum(found.values()).backward()
        losses.append({name: value.item() for name, value in found.items()})
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None and q.grad is not None:
            difference = (p.grad.double() - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)
            assert difference <= tolerance * 10, name


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
