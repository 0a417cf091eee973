# SPDX-License-Identifier: Apache-2.0
"""`vimcore doctor`: it passes, and finds what is wrong."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
import vimcore.cli
from vimcore import _core
from vimcore.cli import main
from vimcore.tools.selftest import gradients, kernels


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    tested = {row["check"]: row["status"] for row in facts["checks"]}
    for isa in vimcore.build_info()["isas"]:
        assert tested[f"kernels {isa}"] in ("ok", "skipped")
    assert tested[f"kernels {vimcore.build_info()['isa']}"] == "ok"
    assert tested["gradients cpu float64"] == tested["gradients cpu float32"] == "ok"
    if vimcore.cuda_is_available():
        assert {tested[f"cuda:0 {dtype}"] for dtype in kernels.GPU_TOLERANCE} == {"ok"}
    else:
        assert tested["cuda"] == "skipped"
        assert any(row["detail"].startswith("no GPU: ") for row in facts["checks"])
    assert facts["machine"]["cores"] >= 1


@pytest.mark.slow
def test_doctor_finds_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kernels.reference_forward
    monkeypatch.setattr(kernels, "reference_forward", lambda *args: right(*args) * (1 + 3e-5))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "is above 1e-05" in text
    assert "something is wrong" in text


def checked_gradients() -> dict[str, tuple[str, str]]:
    """Status and detail of the CPU's gradients for a small network."""
    rng = np.random.default_rng(0)
    config = _core.Config(**{**kernels.SELF_TEST, "embed_dim": 8, "depth": 2})
    images = rng.normal(size=(2, 3, 24, 40))
    weights = kernels.random_weights(config, rng)
    rows = gradients.check_cpu(config, weights, images, rng)
    return {row["check"]: (row["status"], row["detail"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers.0.mixer.A_b_log", "layers.1.norm.weight", "cls_token", "images"])
@pytest.mark.parametrize("factor", [0.0, 1 + 1e-4, np.nan])
def test_doctor_finds_a_wrong_gradient(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients.Loss.gradients

    def wrong(loss: gradients.Loss) -> dict[str, Any]:
        """In float64 only."""
        found = right(loss)
        return found | ({name: factor * found[name]} if loss.dtype == torch.float64 else {})

    assert {status for status, _ in checked_gradients().values()} == {"ok"}
    monkeypatch.setattr(gradients.Loss, "gradients", wrong)
    status, detail = checked_gradients()["gradients cpu float64"]
    assert status == "failed"
    assert detail.startswith(f"{name}: error ")


def test_doctor_finds_a_wrong_float32_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients.Loss.gradients

    def wrong(loss: gradients.Loss) -> dict[str, Any]:
        found = right(loss)
        if loss.dtype == torch.float32:
            found["layers.1.mixer.dt_proj.weight"] *= 1 + 3e-3
        return found

    monkeypatch.setattr(gradients.Loss, "gradients", wrong)
    found = checked_gradients()
    assert found["gradients cpu float64"][0] == "ok"
    assert found["gradients cpu float32"][0] == "failed"
    assert found["gradients cpu float32"][1].startswith("layers.1.mixer.dt_proj.weight: error ")


def test_doctor_says_why_it_does_not_check_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = gradients.check_cuda([], kernels.random_weights, np.random.default_rng(0))
    assert (row["check"], row["status"]) == ("gradients cuda:0", "skipped")
    assert "torch has no CUDA" in row["detail"]
    monkeypatch.setitem(sys.modules, "torch", None)
    (row,) = gradients.check_cuda([], kernels.random_weights, np.random.default_rng(0))
    (other,) = gradients.check_cpu("{}", {}, np.zeros(1), np.random.default_rng(0))
    for found in (row, other):
        assert found["status"] == "skipped"
        assert "not installed" in found["detail"]
