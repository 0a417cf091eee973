# SPDX-License-Identifier: Apache-2.0
"""Masked images and next patches: losses by hand, no leak, every weight learns, overfitting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vimcore
from torch import Tensor
from vimcore.pretraining import MaskedImages, NextPatch, clusters, patches

SMALL: dict[str, Any] = {
    "img_size": (16, 24),
    "patch_size": 4,
    "in_chans": 2,
    "num_classes": 0,
    "embed_dim": 16,
    "depth": 2,
    "d_state": 4,
}


def backbone(**changes: Any) -> vimcore.VisionMamba:
    torch.manual_seed(3)
    model = vimcore.VisionMamba(**{**SMALL, **changes}).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "token" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 2, model: vimcore.VisionMamba | None = None) -> Tensor:
    height, width = (16, 24) if model is None else model.config["img_size"]
    return torch.randn(count, 2, height, width, dtype=torch.float64)


def test_patches_are_those_of_the_embedding() -> None:
    model, x = backbone(), images()
    found = patches.patches(x, 4)
    proj = model.patch_embed.proj
    by_hand = found @ proj.weight.flatten(1).T + proj.bias
    by_conv = torch.nn.functional.conv2d(x, proj.weight, proj.bias, 4).flatten(2).transpose(1, 2)
    assert torch.allclose(by_hand, by_conv, atol=1e-12)
    assert torch.equal(patches.unpatched(found, model._config), x)


@pytest.mark.parametrize("token", ["none", "head", "middle", "double", "random"])
def test_loss_of_masked_patches_by_hand(token: str) -> None:
    model, x = MaskedImages(backbone(class_token=token)).double(), images()
    mask = model.draw(2)
    assert mask.sum(1).tolist() == [round(0.6 * 24)] * 2
    with torch.no_grad():
        model.mask_pixels.normal_()
        found, same = model.reconstruct(x, mask)
    assert torch.equal(same, mask)
    errors = []
    for image, new, row in zip(x, found, mask):
        for at in range(24):
            i, j = divmod(at, 6)
            part = slice(None), slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            if row[at]:
                errors.append((image[part] - new[part]).square().mean())
            else:
                assert torch.equal(image[part], new[part])
    assert torch.allclose(model(x, mask), torch.stack(errors).mean(), rtol=1e-12)


def test_masked_pixels_are_not_seen() -> None:
    model, x = MaskedImages(backbone(), power=1).double(), images().requires_grad_()
    mask = model.draw(2)
    model._predicted(x, mask).sum().backward()
    assert x.grad is not None
    seen = patches.patches(x.grad, 4).abs().amax(2) > 0
    assert torch.equal(seen, ~mask)


def test_normalised_targets_come_back() -> None:
    """A perfect prediction of normalised patches reconstructs the image."""
    model, x = MaskedImages(backbone(), norm_target=True, norm_floor=1e-2).double(), images()
    target = model._targets(x)
    variance = patches.patches(x, 4).var(2, correction=0)
    assert torch.allclose(target.square().mean(2), variance / (variance + 1e-2), atol=1e-12)
    model._predicted = lambda *_: target  # type: ignore[method-assign]
    assert torch.allclose(model.reconstruct(x)[0], x, atol=1e-12)
    assert model(x) == 0


def test_masked_images_give_gradients_of_finite_differences() -> None:
    model, x = MaskedImages(backbone(depth=1)).double(), images(1)
    mask = model.draw(1)
    model(x, mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                values.append(model(x, mask))
                parameter.sub_(direction, alpha=step)
        numeric = (values[0] - values[1]) / 2e-6
        exact = (parameter.grad * direction).sum()
        assert torch.allclose(numeric, exact, rtol=1e-5, atol=1e-8), name


def _leaks(model: NextPatch, x: Tensor, which: int) -> list[list[bool]]:
    """For every prediction t whether it depends on patch k."""
    x = x.clone().requires_grad_()
    predictions = model.predict(x)[which][0]
    found = []
    for prediction in predictions:
        (grad,) = torch.autograd.grad(prediction.square().sum(), x, retain_graph=True, allow_unused=True)
        parts = patches.patches(torch.zeros_like(x) if grad is None else grad, 4)[0]
        parts = parts if model.order is None else parts[model.order]
        found.append((parts != 0).any(1).tolist())
    return found


def test_no_patch_leaks_into_its_prediction() -> None:
    """f at t has seen exactly the patches up to t; g at t exactly those from t on."""
    model = NextPatch(backbone()).double()
    x = images(1)
    assert _leaks(model, x, 0) == [[k <= t for k in range(24)] for t in range(24)]
    assert _leaks(model, x, 1) == [[k >= t for k in range(24)] for t in range(24)]


def test_no_cluster_leaks_into_its_prediction() -> None:
    """With clusters of 2 x 2, what is predicted at t depends on whole clusters, up to t's or from t's on."""
    model = NextPatch(backbone(), cluster=2, decoder_dim=16, decoder_depth=2).double()
    x = images(1)
    ahead, behind = _leaks(model, x, 0), _leaks(model, x, 1)
    assert ahead[:20] == [[k // 4 <= t // 4 for k in range(24)] for t in range(20)]
    assert behind[4:] == [[k // 4 >= t // 4 for k in range(24)] for t in range(4, 24)]
    assert not any(map(any, ahead[20:] + behind[:4]))


def test_loss_of_next_patches_by_hand() -> None:
    model, x = NextPatch(backbone(norm="layer")).double(), images()
    y = patches.patches(x, 4)
    f, g = model.predict(x)
    ahead = torch.stack([(f[:, t] - y[:, t + 1]).square().mean() for t in range(23)]).mean()
    behind = torch.stack([(g[:, t] - y[:, t - 1]).square().mean() for t in range(1, 24)]).mean()
    assert torch.allclose(model(x), (ahead + behind) / 2, rtol=1e-12)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("norm_target", [False, True])
def test_pictures_of_next_patches(cluster: int, norm_target: bool) -> None:
    """Perfect predictions give the image back, from either side."""
    size = {"cluster": cluster, "decoder_dim": 16, "decoder_depth": 1}
    model, x = NextPatch(backbone(), norm_target, 1e-2, **size).double(), images()
    y = patches.patches(x, 4)
    y = patches.normalised(y, 1e-2) if norm_target else y
    y = y if model.order is None else y[:, model.order]
    step = cluster**2
    model._predictions = lambda _: (y.roll(-step, 1), y.roll(step, 1))  # type: ignore[method-assign]
    assert model(x) == 0
    for picture in model.reconstruct(x):
        assert torch.allclose(picture, x, atol=1e-12)


def test_clusters_are_squares_in_rows() -> None:
    order = clusters.cluster_order("NextPatch", (4, 6), 2).tolist()
    assert order[:8] == [0, 1, 6, 7, 2, 3, 8, 9]
    assert sorted(order) == list(range(24))


@pytest.mark.parametrize("cluster", [1, 2])
def test_next_patches_train_every_weight_but_the_class_token(cluster: int) -> None:
    model = NextPatch(backbone(), cluster=cluster, decoder_dim=16, decoder_depth=2).double()
    model(images()).backward()
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == ("cls_token" not in name), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mim", "ar2", "clusters"])
def test_two_images_are_learnt_by_heart(objective: str) -> None:
    model: MaskedImages | NextPatch
    if objective == "mim":
        model = MaskedImages(backbone(embed_dim=32)).float()
    else:
        size = {"cluster": 2, "decoder_dim": 32, "decoder_depth": 2} if objective == "clusters" else {}
        model = NextPatch(backbone(embed_dim=32), **size).float()
    x = images().float()
    arguments = (model.draw(2),) if isinstance(model, MaskedImages) else ()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    first = None
    for _ in range(100):
        loss = model(x, *arguments)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_classes": 3}, r"reset_classifier\(0\)"),
        ({"stride": 2}, "patches that overlap"),
        ({"img_size": (18, 24)}, "sides that patches of 4 divide"),
    ],
)
def test_backbones_that_cannot_learn_so(changes: dict[str, Any], text: str) -> None:
    for kind in (MaskedImages, NextPatch):
        with pytest.raises(ValueError, match=text):
            kind(backbone(**changes))


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"directions": "none"}, {}, "expected directions ssm_conv"),
        ({"rope": True, "class_token": "none"}, {}, "rotary positions are not supported"),
        ({"drop_path_rate": 0.1}, {}, "drop_path_rate 0"),
        ({}, {"cluster": 4}, "cuts 4 x 6 patches into several"),
        ({}, {"cluster": 2, "decoder_dim": 100, "decoder_depth": 1}, "a multiple of 64"),
        ({}, {"cluster": 2, "decoder_depth": 3}, "expected at most 2"),
    ],
)
def test_next_patches_that_cannot_be(changes: dict[str, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NextPatch(backbone(**changes), **options)


def test_masks_that_cannot_be() -> None:
    for ratio in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="masks some and leaves some"):
            MaskedImages(backbone(), mask_ratio=ratio)
    model = MaskedImages(backbone()).double()
    for mask in (
        torch.zeros(2, 24, dtype=torch.bool),
        torch.ones(2, 23, dtype=torch.bool),
        torch.ones(2, 24),
    ):
        with pytest.raises(ValueError, match="mask: expected"):
            model(images(), mask)
    with pytest.raises(TypeError, match="expected a VisionMamba, got Linear"):
        MaskedImages(torch.nn.Linear(2, 2))
