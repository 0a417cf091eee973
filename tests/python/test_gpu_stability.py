# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/stability.py tried out on the CPU, with float64 as the other type; and its verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

GPU = Path(__file__).resolve().parents[1] / "gpu"


@pytest.fixture(scope="module")
def stability() -> ModuleType:
    sys.path.insert(0, str(GPU))
    try:
        import stability as module
    finally:
        sys.path.remove(str(GPU))
    return module


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GPU / "stability.py"), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_tiny_curves_from_start_to_end(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["case"] for row in report["rows"]] == ["tiny", "tiny strained"]
    for row in report["rows"]:
        assert set(row["curves"]) == {"float32", "float64"}
        for curve in row["curves"].values():
            assert len(curve["losses"]) == len(curve["scale"]) == row["steps"]
            assert len(set(curve["losses"])) > 1
            assert (curve["wrong"], curve["stopped"]) == ("", None)
            assert curve["health"]["first_nonfinite"] is None
        assert 0 < row["curves"]["float64"]["apart"] < 1e-5
    first = [row["curves"]["float32"]["losses"] for row in report["rows"]]
    assert first[0] != first[1]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("| ok |") == 4


def test_time_that_is_up(stability: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "report.json")
    assert stability.main(["--device", "cpu", "--seconds", "-1", "--json", file]) == 1  # nothing was shown
    assert "No time for tiny float32" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert stability.main([]) == 1
        assert "no GPU that torch can use" in capsys.readouterr().err


def curve(losses: list[float], **changes: Any) -> dict[str, Any]:
    return {"losses": losses, "stopped": None, "health": None, **changes}


def test_verdicts(stability: ModuleType) -> None:
    falling = [2.0 - 0.02 * i for i in range(60)]
    truth = curve(falling)
    assert stability.verdict(curve([x + 0.01 for x in falling]), truth, True)[1] == ""
    late = falling[:50] + [x + 0.5 for x in falling[50:]]
    assert "from float32" in stability.verdict(curve(late), truth, True)[1]
    flat = curve([2.0] * 60)
    assert stability.verdict(flat, flat, False)[1] == ""
    assert "learned nothing" in stability.verdict(flat, flat, True)[1]
    stopped = curve(falling[:7], stopped="the loss is nan")
    assert stability.verdict(stopped, truth, True)[1] == "the loss is nan"
    assert "nothing to compare" in stability.verdict(truth, stopped, True)[1]
    sick = curve(falling, health={"first_nonfinite": "logits"})
    assert "logits" in stability.verdict(sick, truth, True)[1]


def test_a_loss_that_is_not_finite_stops_the_curve(
    stability: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stability.planned(True)[0]
    draw = stability.draw

    def broken(case: Any, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = draw(case, step, device)
        return (images * float("nan") if step == 3 else images), labels

    monkeypatch.setattr(stability, "draw", broken)
    found = stability.train(case, "float32", torch.device("cpu"))
    assert len(found["losses"]) == 3
    assert "loss is nan in update 4" in found["stopped"]
    assert stability.verdict(found, found, False)[1] == found["stopped"]


def test_strain_reaches_both_directions(stability: ModuleType) -> None:
    plain, strained = (stability.build(c, torch.device("cpu")) for c in stability.planned(True))
    changed = {
        name
        for (name, a), b in zip(plain.named_parameters(), strained.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    leaves = ("A_log", "A_b_log", "dt_proj.bias", "dt_proj_b.bias")
    assert changed == {f"layers.0.mixer.{leaf}" for leaf in leaves}
