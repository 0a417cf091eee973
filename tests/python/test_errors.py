# SPDX-License-Identifier: Apache-2.0
"""Types that are taken, and errors that say what was wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for
from torch import Tensor


def test_to_float64() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    single = model(images)
    double = model.to(torch.float64)(images.double())
    assert double.dtype == torch.float64
    assert relative(single, double) < 1e-6
    assert torch.equal(model.float()(images), single)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_on_the_cpu_is_an_error(autocast: bool) -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32 if autocast else torch.float16)
    remedy = re.escape("got (2, 3, 8, 12) f16 cpu: the cpu has no arithmetic for it; torch.bfloat16")
    with torch.autocast("cpu", torch.float16, autocast), pytest.raises(ValueError, match=remedy):
        model(images)
    x, weight = torch.zeros(1, 4, 8, dtype=images.dtype), torch.ones(8)
    with torch.autocast("cpu", torch.float16, autocast), pytest.raises(ValueError, match=r"torch\.bfloat16"):
        vimcore.ops.rms_norm(x, weight)


def test_without_a_unit_for_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never float32 in its place: an error with what to do, wherever the type comes from."""
    path = tmp_path / "model.safetensors"
    build(SMALL).save(path)
    monkeypatch.setattr("vimcore._core.bf16_refusal", lambda: "no unit: take float32")
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    for run in (
        lambda: model(images.bfloat16()),
        lambda: vimcore.ops.rms_norm(torch.zeros(1, 4, 8, dtype=torch.bfloat16), torch.ones(8)),
        lambda: vimcore.Runtime(path, dtype="bfloat16"),
    ):
        with pytest.raises(vimcore.Error, match="no unit: take float32"):
            run()
    with torch.autocast("cpu"), pytest.raises(vimcore.Error, match="no unit: take float32"):
        model(images)
    assert model(images).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_parameters_are_an_error(dtype: torch.dtype, name: str) -> None:
    model = build(SMALL).to(dtype)
    with pytest.raises(ValueError, match=f"f32 or f64.*{name}"):
        model(images_for(SMALL, 2, dtype))


GOOD = (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 3, 12, 8),
            "images: expected (B, 3, 8, 12) f32 or bf16 cpu, got (2, 3, 12, 8) f32 cpu",
        ),
        (
            torch.zeros(2, 1, 8, 12),
            "images: expected (B, 3, 8, 12) f32 or bf16 cpu, got (2, 1, 8, 12) f32 cpu",
        ),
        (torch.zeros(3, 8, 12), "images: expected (B, 3, 8, 12) f32 or bf16 cpu, got (3, 8, 12) f32 cpu"),
        (torch.zeros(GOOD, dtype=torch.float64), "got (2, 3, 8, 12) f64 cpu"),
        (torch.zeros(GOOD, dtype=torch.float16), "got (2, 3, 8, 12) f16 cpu"),
        (torch.zeros(GOOD, dtype=torch.uint8), "got (2, 3, 8, 12) uint8 cpu"),
        (torch.zeros(GOOD, dtype=torch.complex64), "complex64"),
        (torch.zeros(GOOD, device="meta"), "got (2, 3, 8, 12) f32 meta"),
        (torch.zeros(GOOD).numpy(), "ndarray"),
    ],
)
def test_wrong_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(SMALL)(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "both"}, "ssm_conv"),
        ({"class_token": "tail"}, "middle"),
        ({"pool": "min"}, "mean"),
        ({"norm": "batch"}, "rms"),
        ({"memory": "big"}, "lean"),
        ({"directions": "block", "depth": 3}, "depth"),
        ({"img_size": 3}, "img_size"),
        ({"img_size": (8, 3)}, "img_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"stride": 0}, "stride"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"d_state": 0}, "d_state"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_rank": "full"}, "dt_rank"),
        ({"rope": True}, "rope"),
        ({"rope_residual": True}, "rope_residual"),
        ({"rope": True, "class_token": "none", "stride": 2}, "stride"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vimcore.VisionMamba(**{**SMALL.arguments(), **options})


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="img_sise"):
        vimcore.VisionMamba(img_sise=224)


def test_wrong_indices_of_intermediates() -> None:
    model = build(SMALL)
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(torch.zeros(GOOD), indices=[0, 2])
    assert len(model.forward_intermediates(torch.zeros(GOOD), indices=[1, 0])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 4, 3)}, "B: expected (2, 5, 3) f32 cpu, got (2, 4, 3) f32 cpu"),
        ({"delta": torch.zeros(2, 5, 3)}, "delta"),
        ({"A": torch.zeros(3, 3)}, "A"),
        ({"D": torch.zeros(5)}, "D"),
        ({"z": torch.zeros(2, 5, 4, dtype=torch.float64)}, "z"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int64)}, "u"),
        ({"u": torch.zeros(5, 4)}, "u"),
        ({"C": torch.zeros(2, 5, 3, device="meta")}, "C"),
    ],
)
def test_wrong_arguments_of_the_scan(change: dict[str, Tensor], message: str) -> None:
    good = {
        "u": torch.zeros(2, 5, 4),
        "delta": torch.zeros(2, 5, 4),
        "A": torch.zeros(4, 3),
        "B": torch.zeros(2, 5, 3),
        "C": torch.zeros(2, 5, 3),
    }
    assert vimcore.ops.selective_scan(**good).shape == (2, 5, 4)
    with pytest.raises(ValueError, match=re.escape(f"[selective_scan] {message}")):
        vimcore.ops.selective_scan(**{**good, **change})


def test_one_direction_of_a_block() -> None:
    parameters = dict(build(SMALL).layers[0].named_parameters())
    x = torch.zeros(1, 5, 16)
    for options, message in (
        ({"directions": "both"}, "directions: expected 'none', 'ssm' or 'ssm_conv', got 'both'"),
        ({"reverse": True}, "reverse: only with directions='none', got directions='ssm_conv'"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[vim_block] {message}")):
            vimcore.ops.vim_block(x, parameters, **options)
