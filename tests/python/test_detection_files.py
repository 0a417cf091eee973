# SPDX-License-Identifier: Apache-2.0
"""Detectors in files: ours, detectron2's layout, hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from detection_helpers import SMALL, backbone, detector
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from vimcore import _core, detection
from vimcore.cli import main
from vimcore.detection import CascadeMaskRCNN


def metadata(path: Path) -> dict[str, str]:
    return _core.safetensors_header(str(path))[1]


@torch.no_grad()
def test_a_file_gives_the_same_detector(tmp_path: Path) -> None:
    model = detector(vim={"rope": True, "pos_embed": False}, score=0.0, masks=True).eval()
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model.save(path, classes=["a", "b", "ü"], ids=[1, 5, 90], resize=(32, 32))
    loaded = detection.load(path)
    image = torch.randn(3, 32, 32)
    for name, value in model([image])[0].items():
        assert torch.equal(value, loaded([image])[0][name]), name
    assert loaded.options == model.options
    assert loaded.task is not None
    assert loaded.task.classes == ("a", "b", "ü")
    assert loaded.task.ids == (1, 5, 90)
    assert loaded.task.resize == (32, 32)
    loaded.save(again)  # says what its file said
    assert metadata(again) == metadata(path)
    large = detection.load(path, img_size=(32, 64))
    assert large.backbone.config["img_size"] == [32, 64]
    assert detection.load(path, dynamic_img_size=True)([torch.randn(3, 40, 70)])[0]["masks"].ndim == 4


def test_defaults_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    detector(vim={"img_size": (32, 64)}, masks=False).save(path)
    task = json.loads(metadata(path)["vimcore.task"])
    assert task["task"] == "detect"
    assert task["head"] == "cascade"
    assert task["classes"] == ["1", "2", "3"]
    assert task["ids"] is None
    assert task["resize"] == [32, 64]
    assert task["options"]["masks"] is False
    assert json.loads(metadata(path)["vimcore.preprocess"])["mean"] == [0.485, 0.456, 0.406]
    assert "vimcore.labels" not in metadata(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a"]}, "labels: expected 3, one for each class, got 1"),
        ({"ids": [1, 2]}, "ids: expected a list of 3"),
        ({"ids": [1, 2, 2]}, "ids: one is there twice"),
        ({"resize": (64, 32)}, r"resize: expected \[short, long\]"),
    ],
)
def test_what_a_file_could_not_say(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        detector().save(tmp_path / "x.safetensors", **change)
    assert not list(tmp_path.iterdir())


def test_another_module_in_its_place_is_not_saved(tmp_path: Path) -> None:
    model = detector()
    model.roi_heads.box_head[0].fc1 = nn.Sequential(model.roi_heads.box_head[0].fc1)
    with pytest.raises(ValueError, match=r"not described: roi_heads.box_head.0.fc1.0.bias"):
        model.save(tmp_path / "x.safetensors")


def spoilt(path: Path, to: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy with other metadata or tensors."""
    tensors, about = load_file(path), dict(metadata(path))
    task = json.loads(about["vimcore.task"])
    change(task, tensors)
    save_file(tensors, to, {**about, "vimcore.task": json.dumps(task)})
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task, _: task["options"].update(channels=1 << 16), "do not fit the metadata"),
        (lambda task, _: task["options"].update(channels=-1), "channels: expected 1 to 65536, got -1"),
        (lambda task, _: task["options"].update(depth=3), "'depth': no option of this detector"),
        (lambda task, _: task["options"].update(scales=[3]), "scales: expected powers of two up to 4, got 3"),
        (lambda task, _: task["options"].update(scales="x"), "scales: expected at least one, got 'x'"),
        (lambda task, _: task["options"].update(anchors=[1]), "anchors: expected 3 or 4"),
        (lambda task, _: task["options"].update(before_nms=[1]), "before_nms: expected one number for"),
        (lambda task, _: task["options"].update(masks=False), "unexpected: roi_heads.mask_head"),
        (lambda task, _: task["classes"].append("x"), "misshapen: roi_heads.box_predictor.0.cls_score"),
        (lambda _, tensors: tensors.pop("pyramid.simfp_2.0.weight"), "missing: pyramid.simfp_2.0.weight"),
        (
            lambda _, tensors: tensors.update(extra=np.zeros(2, np.float32)),
            "unexpected: extra",
        ),
    ],
)
def test_hostile_files(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    detector().save(path)
    bad = spoilt(path, tmp_path / "bad.safetensors", change)
    for read in (detection.load, lambda p: main(["info", str(p)]) and detection.load(p)):
        with pytest.raises((ValueError, TypeError), match=f"bad.safetensors: .*{message}|(?s:.*){message}"):
            read(bad)


def test_files_of_other_tasks(tmp_path: Path) -> None:
    vim, path = backbone(num_classes=3), tmp_path / "c.safetensors"
    vim.save(path)
    with pytest.raises(ValueError, match=r"holds a classifier or backbone; vimcore.VisionMamba.load"):
        detection.load(path)
    vimcore.segmentation.FCN(backbone(), 3).save(path)
    with pytest.raises(ValueError, match=r"a network for segmentation; vimcore.segmentation.load"):
        detection.load(path)
    detector().save(path)
    with pytest.raises(ValueError, match=r"holds a detector; vimcore.detection.load"):
        vimcore.segmentation.load(path)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = tmp_path / "d.safetensors", detector()
    model.save(path, ids=[2, 4, 8])
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == "detect"
    assert facts["ids"] == [2, 4, 8]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["flops"] == model.flops()
    assert main(["info", str(path)]) == 0
    assert "cascade" in capsys.readouterr().out


# ---- detectron2's layout -----------------------------------------------------------------------------------


def published(model: CascadeMaskRCNN, arrays: bool = False) -> dict[str, Any]:
    """The weights as the authors' training writes them."""
    found: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        name = name.replace("pyramid.simfp_", "backbone.simfp_")
        if name.startswith("backbone.") and "simfp" not in name:
            name = "backbone.net." + name.removeprefix("backbone.")
        if not name.startswith("backbone.net.norm_f"):
            found[name] = value.numpy() if arrays else value
    return found


def checkpoint(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"last_epoch": 3},
        "iteration": 2,
    }


def changed(model: CascadeMaskRCNN) -> CascadeMaskRCNN:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "numpy arrays"])
def test_published_layout(arrays: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rope": True, "rope_residual": True}
    model, other, path = changed(detector(vim=options)), detector(vim=options), tmp_path / "model_final.pth"
    torch.save(checkpoint(published(model, arrays)), path)
    notes = detection.load_checkpoint(other, path)
    assert any("backbone.net." in note for note in notes)
    wanted = {**model.state_dict(), "backbone.norm_f.weight": torch.ones(16)}
    found = other.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_our_own_state_dicts_load_as_well(tmp_path: Path) -> None:
    model, path = changed(detector()), tmp_path / "own.pth"
    for prefix in ("", "module.", "_orig_mod."):
        other = detector()
        torch.save({prefix + name: value for name, value in model.state_dict().items()}, path)
        detection.load_checkpoint(other, path)
        assert all(torch.equal(v, other.state_dict()[name]) for name, v in model.state_dict().items()), prefix
    model.save(tmp_path / "own.safetensors")
    detection.load_checkpoint(other := detector(), tmp_path / "own.safetensors")
    assert all(torch.equal(v, other.state_dict()[name]) for name, v in model.state_dict().items())


def test_position_tables_of_another_grid_are_resized(tmp_path: Path) -> None:
    model, path = changed(detector()), tmp_path / "d.pth"
    torch.save(published(model), path)
    large = detector(vim={"img_size": 64})
    detection.load_checkpoint(large, path)
    wanted = vimcore.io.resize_pos_embed(model.backbone.pos_embed.detach(), (8, 8), (16, 16), "none")
    torch.testing.assert_close(large.backbone.pos_embed, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.simfp_3.1.weight"), "missing: pyramid.simfp_3.1.weight"),
        (lambda w: w.update({"roi_heads.extra": torch.zeros(1)}), "unexpected: roi_heads.extra"),
        (lambda w: w.pop("backbone.net.layers.0.mixer.D"), "of the backbone: missing: layers.0.mixer.D"),
        (
            lambda w: w.update({"roi_heads.mask_head.deconv.bias": torch.zeros(8).long()}),
            "not floating point",
        ),
        (
            lambda w: w.update({"roi_heads.mask_head.deconv.bias": torch.zeros(9)}),
            "misshapen: roi_heads.mask",
        ),
        (
            lambda w: w.update({"roi_heads.mask_head.deconv.bias": np.array(["x"])}),
            "unsupported object, numpy",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    weights = published(detector())
    change(weights)
    torch.save(checkpoint(weights), tmp_path / "d.pth")
    other = changed(detector())
    before: dict[str, Tensor] = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        detection.load_checkpoint(other, tmp_path / "d.pth")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Bomb:
    """A pickle of it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a pickle was run",))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    torch.save({"model": {"roi_heads.x": Bomb()}}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="holds an unsupported object"):
        detection.load_checkpoint(detector(), tmp_path / "d.pth")
    array = np.array([Bomb], dtype=object)
    torch.save({"model": {"roi_heads.x": array}}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"unsupported object|damaged|something else"):
        detection.load_checkpoint(detector(), tmp_path / "d.pth")


def test_options_are_those_of_the_constructor() -> None:
    assert set(detector().options) == {"masks", "score", "detections", *SMALL}
