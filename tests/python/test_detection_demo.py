# SPDX-License-Identifier: Apache-2.0
"""`vimcore demo --task detect`, short: what it writes, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from vimcore.cli import main
from vimcore.tools import demo_detect

pytestmark = pytest.mark.slow
LARGE = {"embed_dim": 16, "depth": 2, "batch_size": 4, "head_channels": 8, "ema": 0.9}


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that learn nothing, and few scenes."""
    presets = demo_detect.recipe.__globals__["PRESETS"]
    small = {"head_box_width": 16, "head_scales": (1.0, 0.5, 0.25), "head_score": 0.02, "head_detections": 20}
    for name, more in ((demo_detect.BACKBONE, {}), (demo_detect.DETECTOR, small)):
        monkeypatch.setitem(presets, name, {**presets[name], **LARGE, **more})
    monkeypatch.setattr("vimcore.data.object_sources.VALIDATION", 6)
    monkeypatch.setattr("vimcore.data.pairs.VALIDATION", 6)


@pytest.mark.usefixtures("_short")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    metrics = demo_detect.run_demo(out, epochs=1, scenes=8, seed=3)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["held_out"] == 6
    assert metrics["seed"] == 3
    assert {"box_ap", "mask_ap", "train_cpu_seconds", "backbone_cpu_seconds"} <= set(metrics)
    assert 0 < metrics["missed"] <= metrics["objects"]
    assert sorted(path.name for path in out.iterdir()) == [
        *(
            "backbone",
            "curves.png",
            "detector",
            "found.png",
            "metrics.json",
            "scenes",
            "vim_objects.safetensors",
        ),
        "worst.png",
    ]
    assert len(list((out / "scenes").iterdir())) == 6
    assert Image.open(out / "found.png").size[0] > 1000
    text = capsys.readouterr()
    assert "box AP" in text.out
    assert "new pyramid and heads for 10 classes" in text.err

    shutil.rmtree(out / "detector")  # as if it had been stopped between the two
    again = demo_detect.run_demo(out, epochs=1, scenes=8, seed=3, show=False)
    assert again["box_ap"] == metrics["box_ap"]
    assert again["mask_ap"] == metrics["mask_ap"]
    with pytest.raises(ValueError, match="holds a run of another seed; name another --out"):
        demo_detect.run_demo(out, epochs=1, scenes=8, seed=4)


def test_what_the_command_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="scenes: expected at least 1, got 0"):
        demo_detect.run_demo(tmp_path / "demo", scenes=0)
    assert not (tmp_path / "demo").exists()
    with pytest.raises(SystemExit):
        main(["demo", "--task", "detect", "--epochs", "0"])
    assert "epochs" in capsys.readouterr().err
