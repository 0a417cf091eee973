# SPDX-License-Identifier: Apache-2.0
"""Numbers of numpy and torch as arguments, the stride of other patches, a Runtime in other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from vimcore.io import load_model
from vimcore.utils import arguments

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
INTEGERS: dict[str, int] = {
    **SMALL,
    "stride": 4,
    "in_chans": 2,
    "d_state": 3,
    "d_conv": 2,
    "expand": 3,
    "dt_rank": 2,
    "rope_grid": 5,
}


class Index:
    """Counts as an integer, as numbers of other libraries do."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("kind", [np.int64, np.uint8, Index, lambda v: np.array(v), torch.tensor])
def test_integers_of_other_libraries(kind: Any) -> None:
    expected = vimcore.VisionMamba(**INTEGERS)
    found = vimcore.VisionMamba(**{name: kind(value) for name, value in INTEGERS.items()})
    assert found.config == expected.config
    assert all(type(v) is type(expected.config[k]) for k, v in found.config.items())
    assert (found.embed_dim, type(found.embed_dim)) == (16, int)
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    found.reset_classifier(kind(7))
    assert found.num_classes == 7


def test_numbers_and_truths_of_numpy() -> None:
    options = {
        "average_directions": np.bool_(False),
        "pos_embed": np.True_,
        "norm_eps": np.float32(0.5),
        "layer_scale": np.float64(0.25),
        "drop_rate": torch.tensor(0.5),
        "drop_path_rate": np.int64(0),
        "pool": np.str_("mean"),
    }
    config = vimcore.VisionMamba(**SMALL, **options).config
    assert config["average_directions"] is False
    assert config["pos_embed"] is True
    assert (config["norm_eps"], config["layer_scale"], config["drop_rate"]) == (0.5, 0.25, 0.5)


@pytest.mark.parametrize("size", [np.array([16, 24]), [np.int64(16), Index(24)], torch.tensor([16, 24])])
def test_sides_of_other_libraries(size: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    vimcore.VisionMamba(**SMALL).save(path)
    assert vimcore.VisionMamba(**{**SMALL, "img_size": size}).config["img_size"] == [16, 24]
    assert vimcore.VisionMamba.load(path, img_size=size).config["img_size"] == [16, 24]
    assert vimcore.Runtime(path, img_size=size).config["img_size"] == [16, 24]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [8.0, np.float32(8), True, np.True_, [8.5, 8.5], object(), b"8"])
def test_what_is_no_integer_is_named(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\[config\] {name}: expected "):
        vimcore.VisionMamba(**{**INTEGERS, name: value})


@pytest.mark.parametrize("value", [float("nan"), np.inf, "x", None, [0.1]])
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\[config\] drop_rate: expected "):
        vimcore.VisionMamba(**SMALL, drop_rate=value)


def test_arguments_of_loading(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    vimcore.VisionMamba(**SMALL).save(path)
    assert load_model(path, img_size=np.int64(24), stride=np.int8(4)).config["stride"] == 4
    runtime = vimcore.Runtime(path, threads=np.int64(1), img_size=np.int32(24))
    assert runtime.config["img_size"] == [24, 24]
    for size in (24.0, [24.0, 24], (24, 24, 24), "24", 0, (16, -1), True):
        for run in (
            lambda size=size: vimcore.VisionMamba.load(path, img_size=size),
            lambda size=size: vimcore.Runtime(path, img_size=size),
        ):
            with pytest.raises((TypeError, ValueError), match="img_size: expected"):
                run()
    for threads in (0, 1.0, "2", True):
        with pytest.raises((TypeError, ValueError), match=r"\[Runtime\] threads: expected"):
            vimcore.Runtime(path, threads=threads)  # type: ignore[arg-type]
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:\u0663", "cuda:99999999999", 0, None):
        with pytest.raises(ValueError, match=r"\[Runtime\] device: expected 'cpu', 'cuda' or 'cuda:N', got"):
            vimcore.Runtime(path, device=device)  # type: ignore[arg-type]
    for classes in (1.0, "2", -1):
        with pytest.raises((TypeError, ValueError), match="num_classes: expected"):
            vimcore.VisionMamba(**SMALL).reset_classifier(classes)  # type: ignore[arg-type]


def test_entries_of_other_libraries() -> None:
    model, images = vimcore.VisionMamba(**SMALL), torch.zeros(1, 3, 16, 16)
    for indices in (np.array([0, 1]), torch.tensor([0, -1]), [np.int64(0), Index(1)]):
        assert len(model.forward_intermediates(images, indices)) == 2  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\[VisionMamba\] indices: expected an integer, got 1.0"):
        model.forward_intermediates(images, [1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="memory"):
        vimcore.VisionMamba(**SMALL, memory=None)  # type: ignore[arg-type]
    same = created_by_timm("vim_tiny_patch16_224", img_size=32, embed_dim=16, depth=4)
    images = torch.zeros(1, 3, 32, 32)
    for indices in (np.int64(2), np.array([0, 3]), [Index(0), -1]):
        assert len(same.forward_intermediates(images, indices, intermediates_only=True)) == 2  # type: ignore


def test_a_whole_number() -> None:
    assert arguments.integer("x", np.uint64(3)) == 3
    with pytest.raises(ValueError, match="x: expected 4 or more, got 3"):
        arguments.integer("x", 3, 4)
    with pytest.raises(TypeError, match="x: expected an integer, got None"):
        arguments.integer("x", None)


# ---- patches -----------------------------------------------------------------------------------------------


def unread(model: vimcore.VisionMamba) -> float:
    """Share of the pixels that no logit depends on."""
    images = torch.randn(1, 3, *model.config["img_size"]).requires_grad_()
    model(images).sum().backward()
    assert images.grad is not None
    return float((images.grad.abs().sum(1) == 0).double().mean())


def created(name: str, **options: Any) -> vimcore.VisionMamba:
    return vimcore.create_model(name, **{"img_size": 64, "depth": 1, "num_classes": 4, **options})


def created_by_timm(name: str, **options: Any) -> vimcore.VisionMamba:
    timm = pytest.importorskip("timm")
    import vimcore.timm  # noqa: F401

    model: vimcore.VisionMamba = timm.create_model(
        f"vimcore_{name}", **{"img_size": 64, "depth": 1, "num_classes": 4, **options}
    )
    return model


@pytest.mark.parametrize("create", [created, created_by_timm])
def test_the_stride_follows_the_patch_size(create: Any) -> None:
    for patch in (8, np.int64(8), 32):
        model = create("vim_tiny_patch16_224", patch_size=patch)
        assert model.config["stride"] == model.config["patch_size"] == patch
        assert unread(model) == 0
    assert create("vim_tiny_patch16_224", patch_size=8, stride=4).config["stride"] == 4
    assert create("vim_tiny_patch16_224", patch_size=8, stride=None).config["stride"] == 8
    assert create("vim_tiny_patch16_224", stride=8).config["patch_size"] == 16
    long = "vim_tiny_patch16_stride8_224"
    assert create(long, patch_size=16).config["stride"] == 8
    assert create(long, patch_size=8, stride=4).config["stride"] == 4
    with pytest.raises(ValueError, match=r"patch_size: patches of .*stride8_224 overlap.*give stride too"):
        create(long, patch_size=8)
    with pytest.raises(ValueError, match=r"stride: expected at most patch_size, 8, got 16"):
        create("vim_tiny_patch16_224", patch_size=8, stride=16)


# ---- other processes ---------------------------------------------------------------------------------------


def test_a_runtime_pickles_as_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vimcore.VisionMamba(**SMALL).save("a.safetensors", labels=list("abcde"))
    runtime = vimcore.Runtime("a.safetensors", threads=1, img_size=(24, 32))
    images = np.random.default_rng(0).standard_normal((2, 3, 24, 32), dtype=np.float32)
    wanted = runtime(images)
    data = pickle.dumps(runtime)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    for again in (pickle.loads(data), copy.copy(runtime), copy.deepcopy(runtime)):
        assert again.labels == runtime.labels
        assert again.preprocess == runtime.preprocess
        assert np.array_equal(again(images), wanted)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(runtime, (images,)), wanted)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(vimcore.Error, match="cannot open"):
        pickle.loads(data)
