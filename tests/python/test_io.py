# SPDX-License-Identifier: Apache-2.0
"""Weights: vimcore files, checkpoints of the authors, position tables between grids."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vimcore
from vimcore import _core
from vimcore.io import load_checkpoint, load_model, resize_pos_embed, save_model
from vimcore.positions import rope_tables

SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


def small(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, **options}).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# ---- vimcore files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (16, 40), "class_token": "double", "norm": "layer", "stride": 4},
        {"class_token": "none", "pool": "max", "directions": "ssm", "layer_scale": 0.1},
        {
            "class_token": "head",
            "rope": True,
            "rope_residual": True,
            "rope_grid": 3,
            "average_directions": False,
        },
        {"in_chans": 5, "num_classes": 0, "d_state": 3, "dt_rank": 2, "d_conv": 2, "expand": 3},
        {"directions": "block", "class_token": "random", "pos_embed": False},
    ],
)
def test_saved_models_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small(**options)
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = vimcore.VisionMamba.load(path)
    assert again.config == model.config
    assert not again.training
    same_weights(model, again)
    images = torch.randn(3, model.config["in_chans"], *model.config["img_size"])
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(again(images), expected)
    assert np.array_equal(vimcore.Runtime(path)(images.numpy()), expected.numpy())
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(small(), path, ["a", "b", "c", "d", "\u00e9"])
    _, metadata = _core.read_safetensors(str(path))
    assert json.loads(metadata["vimcore.labels"]) == ["a", "b", "c", "d", "\u00e9"]
    assert json.loads(metadata["vimcore.config"])["embed_dim"] == 16
    preprocess = json.loads(metadata["vimcore.preprocess"])
    assert preprocess["crop"] == [24, 24]
    assert preprocess["resize"] == 27
    assert preprocess["mean"] == [0.485, 0.456, 0.406]
    runtime = vimcore.Runtime(path)
    assert runtime.labels == ["a", "b", "c", "d", "\u00e9"]
    assert runtime.preprocess["std"] == [0.229, 0.224, 0.225]


def test_half_precision_is_stored_exactly(tmp_path: Path) -> None:
    model = small().to(torch.bfloat16)
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    for name, value in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], value.float()), name


def test_wrong_labels_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = small()
    save_model(model, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected 5, one for each class, got 2"):
        save_model(model, path, ["a", "b"])
    assert path.read_bytes() == before


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(small(), path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(_core.Error):
            load_model(path)
    _core.write_safetensors(str(path), {"x": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match=r"no vimcore.config in the metadata"):
        load_model(path)
    with pytest.raises((OSError, _core.Error)):
        load_model(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("class_token", ["middle", "double", "none", "head"])
@pytest.mark.parametrize("size", [40, (16, 56), (32, 24)])
def test_loading_at_another_size(tmp_path: Path, class_token: str, size: int | tuple[int, int]) -> None:
    model = small(class_token=class_token)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    larger = load_model(path, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    expected = resize_pos_embed(model.pos_embed.detach(), (3, 3), (height // 8, width // 8), class_token)
    assert torch.equal(larger.pos_embed, expected)
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        logits = larger(images).numpy()
    runtime = vimcore.Runtime(path, img_size=size)(images.numpy())  # resizes by itself, in C++
    assert np.linalg.norm(runtime - logits) <= 1e-5 * np.linalg.norm(logits)


def test_preprocessing_of_another_size(tmp_path: Path) -> None:
    """As in the file, with the crop of the size that is asked for."""
    save_model(small(), tmp_path / "m.safetensors")
    stored = vimcore.Runtime(tmp_path / "m.safetensors").preprocess
    larger = vimcore.Runtime(tmp_path / "m.safetensors", img_size=(48, 40)).preprocess
    assert stored["crop"] == [24, 24]
    assert larger == {**stored, "resize": 45, "crop": [48, 40]}


# ---- position tables ---------------------------------------------------------------------------------------


def bicubic(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(h, w, D) -> (h', w', D) by the textbook formula (a = -0.75, borders repeated), sample by sample."""

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = torch.zeros(*size, grid.shape[2], dtype=torch.float64)
    for axis_values in np.ndindex(*size):
        centre = [(v + 0.5) * grid.shape[i] / size[i] - 0.5 for i, v in enumerate(axis_values)]
        for dy in range(-1, 3):
            for dx in range(-1, 3):
                y, x = int(np.floor(centre[0])) + dy, int(np.floor(centre[1])) + dx
                share = weight(centre[0] - y) * weight(centre[1] - x)
                cell = grid[min(max(y, 0), grid.shape[0] - 1), min(max(x, 0), grid.shape[1] - 1)]
                out[axis_values] += share * cell
    return out


@pytest.mark.parametrize(("old", "new"), [((3, 3), (5, 5)), ((4, 6), (3, 9)), ((2, 8), (4, 4))])
@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none", "random"])
def test_resized_table(old: tuple[int, int], new: tuple[int, int], class_token: str) -> None:
    patches, wanted = old[0] * old[1], new[0] * new[1]
    grid = torch.randn(*old, 4, dtype=torch.float64)
    tokens = torch.randn(2, 4, dtype=torch.float64)

    def place(rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        if class_token == "none":
            return rows[None]
        if class_token == "double":
            return torch.cat([tokens[:1], rows, tokens[1:]])[None]
        at = count // 2 if class_token == "middle" else 0
        return torch.cat([rows[:at], tokens[:1], rows[at:]])[None]

    table = place(grid.reshape(patches, 4))
    expected = place(bicubic(grid, new).reshape(wanted, 4))
    found = resize_pos_embed(table, old, new, class_token)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(resize_pos_embed(table, old, old, class_token), table)


def test_the_authors_way_keeps_the_first_row_and_resizes_the_rest() -> None:
    table = torch.randn(1, 14 * 14 + 1, 3, dtype=torch.float64)
    found = resize_pos_embed(table, (14, 14), (27, 27), "middle", "authors")
    slots = table[0, 1:].reshape(14, 14, 3).permute(2, 0, 1)[None]
    resized = F.interpolate(slots, size=(27, 27), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(found[0, 0], table[0, 0])  # really patch 0
    assert torch.allclose(found[0, 1:], resized, rtol=0, atol=1e-13)
    correct = resize_pos_embed(table, (14, 14), (27, 27), "middle", "correct")
    assert torch.equal(correct[0, 364], table[0, 98])
    assert not torch.allclose(correct, found)
    head = resize_pos_embed(table, (14, 14), (27, 27), "head", "authors")
    assert torch.equal(head, resize_pos_embed(table, (14, 14), (27, 27), "head", "correct"))


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 10, D\).*got \(1, 9, 4\)"):
        resize_pos_embed(torch.zeros(1, 9, 4), (3, 3), (4, 4), "middle")
    with pytest.raises(ValueError, match="'correct' or 'authors'"):
        resize_pos_embed(torch.zeros(1, 10, 4), (3, 3), (4, 4), "middle", "nearest")
    with pytest.raises(ValueError, match="class_token"):
        resize_pos_embed(torch.zeros(1, 10, 4), (3, 3), (4, 4), "tail")


# ---- the authors' checkpoints ------------------------------------------------------------------------------


def checkpoint(path: Path, model: vimcore.VisionMamba, **extra: Any) -> Path:
    """A training checkpoint as the authors write it."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    average = {name: value + 1 for name, value in state.items()}
    content = {
        "model": state,
        "model_ema": average,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"t": 1},
        "epoch": 299,
        "scaler": "none",
        "args": argparse.Namespace(batch_size=128, model="vim"),
        **extra,
    }
    torch.save(content, path)
    return path


def test_training_checkpoint(tmp_path: Path) -> None:
    source, target = small(), small()
    path = checkpoint(tmp_path / "best.pth", source)
    load_checkpoint(target, path)
    same_weights(source, target)
    load_checkpoint(target, path, weights="ema")
    for name, value in source.named_parameters():
        assert torch.equal(dict(target.named_parameters())[name], value + 1), name


def test_bare_state_and_module_prefix(tmp_path: Path) -> None:
    source, target = small(), small()
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "bare.pth")
    load_checkpoint(target, tmp_path / "bare.pth")
    same_weights(source, target)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_checkpoint(target, tmp_path / "bare.pth", weights="ema")


def test_safetensors_of_bare_tensors(tmp_path: Path) -> None:
    source, target = small(), small()
    tensors = {k: v.detach().numpy() for k, v in source.state_dict().items()}
    _core.write_safetensors(str(tmp_path / "bare.safetensors"), tensors, {})
    load_checkpoint(target, tmp_path / "bare.safetensors")
    same_weights(source, target)
    with pytest.raises(ValueError, match="one set"):
        load_checkpoint(target, tmp_path / "bare.safetensors", weights="ema")


class Trap:
    """Runs a command when it is unpickled by a careless loader."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.mark,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = checkpoint(tmp_path / "evil.pth", small(), args=Trap(str(mark)))
    target = small()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|unsafe"):
        load_checkpoint(target, path)
    assert not mark.exists()
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_every_fault_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source, target = small(), small()
    state = dict(source.state_dict())
    del state["norm_f.weight"], state["layers.1.mixer.D_b"]
    state["layers.0.mixer.A_log"] = torch.zeros(32, 7)
    state["extra.weight"] = torch.zeros(2)
    state["head.bias"] = torch.zeros(5, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "bad.pth")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"bad.pth does not fit") as caught:
        load_checkpoint(target, tmp_path / "bad.pth")
    text = str(caught.value)
    for part in (
        "bad.pth",
        "missing: norm_f.weight (16,)",
        "missing: layers.1.mixer.D_b (32,)",
        "unexpected: extra.weight (2,)",
        "misshapen: layers.0.mixer.A_log: expected (32, 16), got (32, 7)",
        "not floating point: head.bias",
    ):
        assert part in text
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_head(tmp_path: Path) -> None:
    source, target = small(num_classes=1000), small()
    path = checkpoint(tmp_path / "best.pth", source)
    with pytest.raises(
        ValueError, match=r"misshapen: head.weight: expected \(5, 16\), got \(1000, 16\)"
    ) as told:
        load_checkpoint(target, path)
    assert 'all else fits: load_checkpoint(..., head="skip")' in str(told.value)
    with pytest.raises(ValueError, match="misshapen: patch_embed") as told:
        load_checkpoint(small(patch_size=2), path)
    assert "all else fits" not in str(told.value)
    head = target.head.weight.detach().clone()
    load_checkpoint(target, path, head="skip")
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.layers[0].mixer.A_log, source.layers[0].mixer.A_log)
    headless = small(num_classes=0)
    load_checkpoint(headless, path, head="skip")
    assert torch.equal(headless.norm_f.weight, source.norm_f.weight)


@pytest.mark.parametrize("way", ["correct", "authors"])
def test_another_grid(tmp_path: Path, way: str) -> None:
    source, target = small(), small(img_size=(32, 48), stride=4)
    path = checkpoint(tmp_path / "best.pth", source)
    load_checkpoint(target, path, pos_embed=way)
    assert torch.equal(
        target.pos_embed, resize_pos_embed(source.pos_embed.detach(), (3, 3), (7, 11), "middle", way)
    )


@pytest.mark.slow
def test_tables_that_are_not_square(tmp_path: Path) -> None:
    source, target = small(img_size=(16, 40)), small(img_size=(40, 40))
    path = checkpoint(tmp_path / "best.pth", source)
    with pytest.raises(ValueError, match=r"10 patches are no square grid; name it with pos_grid"):
        load_checkpoint(target, path)
    load_checkpoint(target, path, pos_grid=(2, 5))
    assert torch.equal(target.pos_embed, resize_pos_embed(source.pos_embed.detach(), (2, 5), (5, 5)))
    save_model(source, tmp_path / "ours.safetensors")  # our own files tell their grid
    load_checkpoint(target, tmp_path / "ours.safetensors")
    assert torch.equal(target.pos_embed, resize_pos_embed(source.pos_embed.detach(), (2, 5), (5, 5)))


def test_rope_tables_are_optional_but_must_be_the_models(tmp_path: Path) -> None:
    options = {"class_token": "head", "rope": True, "rope_grid": 3}
    source, target = small(**options), small(**options)
    state = {k: v.detach() for k, v in source.named_parameters()}
    torch.save(state, tmp_path / "without.pth")
    load_checkpoint(target, tmp_path / "without.pth")
    same_weights(source, target)
    cos, sin = rope_tables(source.config)
    torch.save({**state, "rope.freqs_cos": cos.float(), "rope.freqs_sin": sin.float()}, tmp_path / "with.pth")
    load_checkpoint(target, tmp_path / "with.pth")
    with pytest.raises(ValueError, match=r"different: rope.freqs_cos: not the rotation of rope_grid=5"):
        load_checkpoint(small(**{**options, "rope_grid": 5}), tmp_path / "with.pth")
    with pytest.raises(ValueError, match=r"unexpected: rope.freqs_cos"):
        load_checkpoint(small(class_token="head"), tmp_path / "with.pth")


def test_options_are_checked(tmp_path: Path) -> None:
    model = small()
    path = checkpoint(tmp_path / "best.pth", model)
    for options in ({"weights": "best"}, {"pos_embed": "none"}, {"head": "drop"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_checkpoint(model, path, **options)
