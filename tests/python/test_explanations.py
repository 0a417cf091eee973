# SPDX-License-Identifier: Apache-2.0
"""Rollout, relevance, receptive field, feature colours, token norms and curves against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import vimcore
from golden import relative
from helpers import build, images_for, small
from torch import Tensor
from vimcore.analysis.curves import by_pixel, deletion_insertion
from vimcore.analysis.receptive_field import erf_shown, erf_sides
from vimcore.analysis.rollout import rollouts

# ---- rollout -----------------------------------------------------------------------------------------------


def mean_maps(model: vimcore.VisionMamba, images: Tensor) -> Tensor:
    """All maps (layers, L, L, E) of a network without class tokens, both directions added."""
    height, width = model.config["img_size"][0] // 4, model.config["img_size"][1] // 4
    tokens = [(row, column) for row in range(height) for column in range(width)]
    rows = [vimcore.attention_maps(model, images, t, reduce=None)[0].sum(1) for t in tokens]
    return torch.stack(rows, 1).transpose(2, 3)


@pytest.mark.parametrize("options", [{}, {"pool": "last"}, {"directions": "block", "depth": 4}])
def test_rollout_is_the_product(options: dict[str, object]) -> None:
    config = small(class_token="none", **options)
    model, images = build(config, dtype=torch.float64), images_for(config, 2)
    paired = config.directions == "block"
    start, count = (2, 2) if paired else (0, 1)
    for image in range(2):
        maps = mean_maps(model, images[image : image + 1])
        eye = torch.eye(config.tokens, dtype=torch.float64)
        product, signed = eye, eye
        for i in range(start, config.depth, count):
            layers = maps[i : i + count]
            steps = layers.abs().mean(-1) + eye
            product = (steps / steps.sum(-1, keepdim=True)).mean(0) @ product
            signed = (layers.mean(-1) + eye).sum(0) @ signed
        read = eye[-1] if config.pool == "last" else torch.full_like(eye[0], 1 / config.tokens)
        found = vimcore.attention_rollout(model, images, start)[image].flatten()
        assert (found - read @ product).abs().max() < 1e-12
        assert float(found.sum()) == pytest.approx(1)
        found = vimcore.attention_rollout(model, images, start, signed=True)[image].flatten()
        assert (found - read @ signed).abs().max() < 1e-12


def test_rollout_for_a_class() -> None:
    config = small(class_token="none", depth=3)
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 1)
    h, r, outputs = reference.embed(config, weights, images, reference.Draws()).requires_grad_(), None, []
    for i in range(config.depth):
        h, r = reference.layer(config, weights, i, h, r, None)
        h.retain_grad()
        outputs.append(h)
    tokens = reference.normalise(config, weights, "norm_f", r + h)
    logits = reference.read_out(config, weights, tokens, reference.Draws())
    logits[0, 2].backward()

    def scaled(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    row = torch.full((1, config.tokens), 1 / config.tokens, dtype=torch.float64)
    maps = mean_maps(model, images).clamp(min=0).mean(-1)
    for i in (2, 1):
        strength = outputs[i].grad[0].clamp(min=0).amax(-1)
        step = scaled(maps[i]) * scaled(strength) + torch.eye(config.tokens)
        row = row @ (step / step.sum(-1, keepdim=True))
    found = vimcore.attention_rollout(model, images, 1, target=2)
    assert (found.flatten() - row).abs().max() < 1e-9
    assert torch.equal(rollouts(model, images, 1, [None, [2]])[1], found)


def test_rollout_errors() -> None:
    long = vimcore.VisionMamba(33 * 4, 4, num_classes=2, embed_dim=8, depth=1, d_state=2).eval()
    images = torch.zeros(1, 3, 132, 132)
    with pytest.raises(ValueError, match=r"at most 1024 tokens.*got 1090; remedy: signed=True"):
        vimcore.attention_rollout(long, images)
    assert vimcore.attention_rollout(long, images, signed=True).shape == (1, 33, 33)
    model, images = build(small(directions="block", depth=4)), torch.zeros(1, 3, 8, 12)
    with pytest.raises(ValueError, match="start: expected an even layer"):
        vimcore.attention_rollout(model, images, 1)
    with pytest.raises(ValueError, match="signed: only without a target"):
        vimcore.attention_rollout(model, images, target=0, signed=True)
    with pytest.raises(ValueError, match=r"\[attention_rollout\] target: expected 0 .. 2, got \[3\]"):
        vimcore.attention_rollout(model, images, target=3)


# ---- relevance ---------------------------------------------------------------------------------------------


def lrp(config: reference.Config, w: dict[str, Tensor], images: Tensor, target: int) -> Tensor:
    """Relevance by the rules, with the reference's operations and `detach`: (B, h, w)."""

    def held_norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt().detach()
        return x * scale * w[name + ".weight"] + w.get(name + ".bias", torch.tensor(0.0))

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x).detach()

    def mixer(m: str, v: Tensor) -> Tensor:
        x, z = (v @ w[m + "in_proj.weight"].T).chunk(2, -1)
        y: Tensor | float = 0.0
        ways = {"ssm_conv": [("", "", 0, 0), ("_b", "_b", 1, 0)], "ssm": [("", "", 0, 0), ("", "_b", 0, 1)]}
        for s, a, flip, reverse in ways[config.directions]:
            turned = x.flip(1) if flip else x
            u = silu(reference.causal_conv(turned, w[m + f"conv1d{s}.weight"], w[m + f"conv1d{s}.bias"]))
            _, raw, B, C = (t.detach() for t in reference.branch_inputs(config, w, m, s, turned))
            delta = F.softplus(raw + w[m + f"dt_proj{s}.bias"])
            A, D = -w[m + f"A{a}_log"].exp(), w[m + f"D{s}"]
            part = reference.scan(u, delta, A, B, C, D, reverse=bool(reverse))
            y = y + (part.flip(1) if flip else part)
        gate = silu(z) * (0.5 if config.directions == "ssm_conv" and config.average_directions else 1.0)
        out = (y * gate.detach() + y.detach() * gate) / 2 @ w[m + "out_proj.weight"].T
        return out * w[m + "gamma"] if config.layer_scale is not None else out

    images = images.clone().requires_grad_()
    h, r = reference.embed(config, w, images, reference.Draws()), None
    for i in range(config.depth):
        r = h if r is None else r + h
        h = mixer(f"layers.{i}.mixer.", held_norm(f"layers.{i}.norm", r))
    logits = reference.read_out(config, w, held_norm("norm_f", r + h), reference.Draws())
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), images)
    by_pixel = (images * gradient).sum(1, keepdim=True)
    return F.avg_pool2d(by_pixel, config.patch_size)[:, 0] * config.patch_size**2


LRP = {
    "middle": small(),
    "ssm, double": small(directions="ssm", class_token="double", average_directions=False),
    "layer norm, scaled": small(norm="layer", layer_scale=0.5, class_token="none"),
}


@pytest.mark.parametrize("name", LRP)
def test_relevance_follows_the_rules(name: str) -> None:
    config = LRP[name]
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 2)
    found = vimcore.relevance(model, images, 1)
    assert relative(found, lrp(config, weights, images, 1).detach()) < 1e-9
    assert torch.equal(
        vimcore.relevance(model, images), vimcore.relevance(model, images, model(images).argmax(1))
    )


@pytest.mark.parametrize(
    "options", [{}, {"directions": "block", "class_token": "none"}, {"norm": "layer", "stride": 2}]
)
def test_relevance_adds_up_to_the_logit(options: dict[str, object]) -> None:
    config = small(**options)
    weights = reference.random_weights(config)
    for key, value in weights.items():
        if key.startswith(("cls_token", "pos_embed")) or (key.endswith("bias") and "dt_proj" not in key):
            value.zero_()
    model, images = build(config, weights, torch.float64).eval(), images_for(config, 2)
    found = vimcore.relevance(model, images, [0, 2])
    assert (found.sum((1, 2)) - model(images)[[0, 1], [0, 2]]).abs().max() < 1e-10


def test_relevance_errors() -> None:
    images = torch.zeros(1, 3, 8, 12)
    with pytest.raises(ValueError, match=r"\[relevance\] model: .*without a head"):
        vimcore.relevance(build(small(num_classes=0)), images)
    with pytest.raises(ValueError, match=r"got \(1, 6, 4\), one for every token"):
        vimcore.relevance(build(small(class_token="none", pool="all", num_classes=4)), images)


# ---- receptive field, features -----------------------------------------------------------------------------


def test_receptive_field_is_the_gradient() -> None:
    config = small()
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64).train(), images_for(config, 2)
    for layer, position in ((-1, None), (0, (1, 2))):
        inputs = images.clone().requires_grad_()
        row, column = position or (1, 1)
        maps = reference.forward(config, weights, inputs).intermediates[layer]
        (gradient,) = torch.autograd.grad(maps[:, :, row, column].relu().sum(), inputs)
        found = vimcore.effective_receptive_field(model, images, layer, position)
        assert relative(found, gradient.relu().sum((0, 1))) < 1e-9
    assert model.training
    with pytest.raises(ValueError, match=r"position: expected a row of 0 .. 1"):
        vimcore.effective_receptive_field(model, images, position=(2, 0))
    with pytest.raises(ValueError, match="images: expected at least one"):
        vimcore.effective_receptive_field(model, images[:0])
    with pytest.raises(ValueError, match="images: expected"):
        vimcore.effective_receptive_field(model, images[0])


def test_receptive_field_table() -> None:
    field = np.zeros((9, 11))
    field[3:6, 4:7] = 1.0
    assert [side for _, side, _ in erf_sides(field, (0.1, 0.2, 1.0))] == [1, 3, 3]
    assert erf_sides(field, (1.0,))[0][2] == pytest.approx(9 / 99)
    assert erf_sides(field, (1.0,), centre=(0, 0))[0][1] == 13
    assert erf_sides(field * 0, (0.5,)) == [(0.5, None, None)]
    assert erf_shown(np.array([[0.0, 9.0, 99.0]])).tolist() == [[0, 0.5, 1]]


def test_feature_colours_are_principal_components() -> None:
    config = small(img_size=(16, 20))
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 3)
    found = vimcore.feature_pca(model, images, 0, foreground=False)
    assert found.shape == (3, 4, 5, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    stream = reference.forward(config, weights, images).intermediates[0].flatten(2).transpose(1, 2)
    tokens = reference.normalise(config, weights, "norm_f", stream).flatten(0, 1)
    u, s, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    for k, channel in enumerate(found.flatten(0, 2).T):
        inside = (channel > 0) & (channel < 1)  # between the percentiles
        both = torch.stack([channel[inside], (u * s)[inside, k]])
        assert abs(float(torch.corrcoef(both)[0, 1])) == pytest.approx(1, abs=1e-6)
    cut = vimcore.feature_pca(model, images)
    black = (cut == 0).all(-1)
    assert 0 < black.sum() < black.numel()
    border = torch.ones(4, 5, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert black[:, border].double().mean() >= 0.5
    assert torch.equal(vimcore.feature_pca(model, images), cut)
    flat = vimcore.feature_pca(build(small(pos_embed=False, directions="none")), torch.zeros(1, 3, 8, 12))
    assert torch.isfinite(flat).all()


def test_token_norms() -> None:
    config = small(directions="block", depth=4, class_token="double")
    model, images = build(config, dtype=torch.float64), images_for(config, 2)
    found = vimcore.token_norms(model, images)
    maps = model.forward_intermediates(images, [1, 3])
    assert (found - torch.stack([m.norm(dim=1) for m in maps], 1)).abs().max() < 1e-12
    assert torch.equal(vimcore.token_norms(model, images, [-1, 1]), found[:, [1, 0]])
    with pytest.raises(
        ValueError, match=r'with directions="block" there are outputs after odd layers, got 2'
    ):
        vimcore.token_norms(model, images, 2)


# ---- curves ------------------------------------------------------------------------------------------------


def test_curves_go_from_the_image_to_nothing_and_back() -> None:
    config = small()
    model, images = build(config, dtype=torch.float64).eval(), images_for(config, 1)
    evidence = vimcore.relevance(model, images)[0]
    curves = deletion_insertion(model, images[0], evidence, steps=6)
    even = images.mean((2, 3), keepdim=True).expand_as(images)
    p = [model(x).softmax(1)[0].detach() for x in (images, even)]
    index = int(p[0].argmax())
    ends = [float(p[0][index]), float(p[1][index])]
    assert [curves.deletion[0], curves.deletion[-1]] == pytest.approx(ends)
    assert [curves.insertion[-1], curves.insertion[0]] == pytest.approx(ends)
    first = by_pixel(evidence == evidence.max(), 4, 4, 8, 12)
    gone = torch.where(first, even, images)
    assert curves.deletion[1] == pytest.approx(float(model(gone).detach().softmax(1)[0, index]))
    assert curves.deletion_area == pytest.approx(np.trapezoid(curves.deletion, curves.shares))
    with pytest.raises(ValueError, match=r"evidence: expected \(8, 12\) or \(2, 3\), got \(4, 4\)"):
        deletion_insertion(model, images[0], torch.zeros(4, 4))


def test_pixels_belong_to_the_nearest_patch() -> None:
    grid = torch.arange(3.0)[None].expand(2, 3)
    assert by_pixel(grid, 4, 4, 8, 12)[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert by_pixel(grid, 4, 2, 6, 9)[0].tolist() == [0] * 3 + [1] * 2 + [2] * 4
