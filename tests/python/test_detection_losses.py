# SPDX-License-Identifier: Apache-2.0
"""Losses, gradients and detections, against slow loops and a plain backbone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from detection_helpers import TWO, detector, target
from torch import Tensor
from torchvision.ops import box_iou
from vimcore.nn.heads.cascade import OVERLAPS, WEIGHTS, Objects
from vimcore.nn.heads.masks import mask_targets
from vimcore.nn.heads.roi import pool
from vimcore.nn.heads.rpn import anchors_of


def overlap(a: Tensor, b: Tensor) -> float:
    return float(box_iou(a[None], b[None]))


def deltas_of(truth: Tensor, box: Tensor, weights: tuple[float, ...]) -> Tensor:
    (w, h), (v, u) = ((b[2:] - b[:2]).tolist() for b in (box, truth))
    x, y = ((truth[:2] + truth[2:] - box[:2] - box[2:]) / 2).tolist()
    values = (x / w, y / h, math.log(v / w), math.log(u / h))
    return torch.tensor([a * b for a, b in zip(weights, values)], dtype=box.dtype)


def moved(box: Tensor, deltas: Tensor, weights: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """A box after a stage, cut off at the edges of the image."""
    d = deltas / torch.tensor(weights)
    side, centre = box[2:] - box[:2], (box[2:] + box[:2]) / 2
    centre, side = centre + d[:2] * side, side * d[2:].clamp(max=math.log(1000 / 16)).exp()
    found = torch.cat([centre - side / 2, centre + side / 2])
    return found.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))


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
