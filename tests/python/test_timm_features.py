# SPDX-License-Identifier: Apache-2.0
"""Features of our models by timm's ways, beside what the networks compute."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import vimcore
from timm.models._features import FeatureGetterNet
from timm_helpers import NAME, SMALL, images, small

NormedFeatures = functools.partial(FeatureGetterNet, norm=True)


@pytest.mark.parametrize("token", ["none", "head", "middle", "double"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_forward_intermediates(token: str, norm: str) -> None:
    model = small(class_token=token, norm=norm).eval()
    ours = vimcore.VisionMamba(**model.config).eval()
    ours.load_state_dict(model.state_dict())
    x = images()
    wanted = ours.forward_intermediates(x, [1, 6])
    final, maps = model.forward_intermediates(x, indices=[1, -2])
    torch.testing.assert_close(final, ours.forward_features(x))
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    only = model.forward_intermediates(x, indices=[1, 6], intermediates_only=True, output_fmt="NLC")
    assert all(torch.equal(a, b.flatten(2).transpose(1, 2)) for a, b in zip(only, wanted))
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 8
    assert torch.equal(model.forward_intermediates(x, 2, intermediates_only=True)[0], wanted[1])

    normed = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True)[1][0]
    tokens = ours.forward_features(x)
    count = {"none": 0, "double": 2}.get(token, 1)
    if count:
        patches, prefix = normed
        at = {"head": [0], "middle": [8], "double": [0, 17]}[token]
        torch.testing.assert_close(prefix, tokens[:, at])
        torch.testing.assert_close(patches, tokens[:, [i for i in range(16 + count) if i not in at]])
    else:
        torch.testing.assert_close(normed, tokens)

    found = model.forward_intermediates(x, [3], output_dict=True, return_prefix_tokens=True, stop_early=True)
    assert ("image_intermediates_prefix" in found) == bool(count)
    stopped = vimcore.VisionMamba(**{**model.config, "depth": 4}).eval()
    stopped.load_state_dict({k: v for k, v in model.state_dict().items() if k in stopped.state_dict()})
    torch.testing.assert_close(found["image_features"], stopped.forward_features(x))


def test_intermediates_of_pairs_of_layers() -> None:
    model = small(directions="block").eval()
    assert [info["module"] for info in model.feature_info] == [f"layers.{i}" for i in (1, 3, 5, 7)]
    wide = timm.create_model(NAME, **SMALL, directions="block", features_only=True, out_indices=(0, 2))
    assert [tuple(y.shape) for y in wide(images())] == [(2, 16, 4, 4)] * 2
    assert len(wide.model.layers) == 6


@pytest.mark.parametrize("token", ["middle", "double", "none"])
def test_other_sizes(token: str) -> None:
    """dynamic_img_size and set_input_size, as timm's own transformers have them."""
    options = {**SMALL, "class_token": token}
    model = timm.create_model(NAME, **options, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 48, 80)
    final, maps = model.forward_intermediates(images, norm=True)
    assert {tuple(m.shape[2:]) for m in maps} == {(48 // 8, 80 // 8)}
    logits = model(images)
    assert torch.equal(model.forward_head(final), model.forward_head(model.forward_features(images)))
    assert (model.forward_head(final) - logits).abs().max() < 1e-5
    fixed = timm.create_model(NAME, **options).eval()
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size(img_size=(48, 80), patch_size=8)
    assert fixed.config["img_size"] == [48, 80]
    assert torch.equal(fixed(images), logits)
    fixed.set_input_size()
    assert torch.equal(fixed(images), logits)
    with pytest.raises(ValueError, match=r"set_input_size: patch_size stays 8, got 16"):
        fixed.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match=r"set_input_size\(\(32, 32\)\)"):
        fixed(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TypeError, match="dynamic_img_pad"):
        timm.create_model(NAME, **options, dynamic_img_pad=True)


def test_features_of_any_size() -> None:
    wide = timm.create_model(NAME, **SMALL, features_only=True, dynamic_img_size=True)
    for size in (32, 64):
        assert {tuple(m.shape[2:]) for m in wide(torch.zeros(1, 3, size, 40))} == {(size // 8, 5)}


@pytest.mark.parametrize("indices", [[8], [-9], 0, 9, []])
def test_indices_out_of_range(indices: Any) -> None:
    with pytest.raises(ValueError, match=r"\[VisionMamba\] indices"):
        small().forward_intermediates(images(), indices)


def test_features_only_trains_every_parameter_that_is_left() -> None:
    torch.manual_seed(2)
    whole = small(drop_path_rate=0.7).eval()
    wide = timm.create_model(NAME, **SMALL, drop_path_rate=0.7, features_only=True, out_indices=(1, 4))
    wide.model.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k in wide.model.state_dict()}, strict=True
    )
    assert (len(wide.model.layers), wide.model.num_classes) == (5, 0)
    assert wide.feature_info.channels() == [16, 16]
    assert wide.model.config["drop_path_rate"] == pytest.approx(0.4)  # what the fifth of eight layers had
    wide.eval()
    x = images()
    maps = wide(x)
    wanted = whole.forward_intermediates(x, [1, 4], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    sum(y.square().sum() for y in wide(x)).backward()
    assert all(p.grad is not None for p in wide.parameters())
    assert "model.norm_f.weight" in wide.state_dict()  # so that files still fit
    with pytest.raises(ValueError, match="normalisation was pruned"):
        wide.model.save("never.safetensors")
    torch.testing.assert_close(
        wide.model(x),
        wide.model.forward_intermediates(x, 1, return_prefix_tokens=True, norm=True, intermediates_only=True)[
            0
        ][1][:, 0],
    )
    normed = timm.create_model(
        NAME, **SMALL, features_only=True, out_indices=(1, 4), feature_cls=NormedFeatures
    ).eval()
    normed.model.load_state_dict(wide.model.state_dict())
    final = normed.model.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0]
    assert torch.equal(normed(x)[1], final)
    sum(y.square().sum() for y in normed(x)).backward()
    assert all(p.grad is not None for p in normed.parameters())
