# SPDX-License-Identifier: Apache-2.0
"""Runs whose length is given in updates, with the schedules of mmsegmentation and detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import log
from vimcore import tasks
from vimcore.cli import main
from vimcore.tasks.classification.settings import ClassificationSettings as Settings
from vimcore.tasks.settings import read_toml
from vimcore.train.presets import PRESETS, recipe
from vimcore.train.run import Run, train
from vimcore.train.schedule import Schedule
from vimcore.train.signals import Stopped

POLY: dict[str, Any] = {"schedule": "poly", "schedule_steps": "update", "min_lr": 0.0}
FLAGS = ["train", "--preset", "digits", "--depth", "2", "--embed-dim", "16", "--batch-size", "100"]


def test_poly_is_mmsegmentations() -> None:
    """The warm-up multiplies a rate that decays already."""
    s = Settings().merged({**POLY, "updates": 60000, "warmup_updates": 1500})
    lr = Schedule(s, 2e-4, 631, 60000)
    for update, expected in ((0, 2e-10), (750, 9.875e-5), (1500, 1.95e-4), (30000, 1e-4), (59999, 3.3e-9)):
        assert lr(update) == pytest.approx(expected, rel=0.011 if update == 59999 else 1e-4)
    assert lr.highest(60000) == pytest.approx(1.95e-4)


def test_poly_with_a_power_and_a_least_rate() -> None:
    s = Settings().merged({**POLY, "poly_power": 0.9, "min_lr": 1e-5, "warmup_updates": 0})
    lr = Schedule(s, 1e-3, 10, 100)
    assert lr(0) == 1e-3
    assert lr(50) == pytest.approx(0.99e-3 * 0.5**0.9 + 1e-5)


def test_steps_are_detectron2s() -> None:
    changes = {"schedule": "steps", "schedule_steps": "update", "warmup_updates": 250, "warmup_factor": 1e-3}
    lr = Schedule(Settings().merged(changes), 1e-4, 1000, 184375)
    assert lr.milestones == [163889, 177546]
    found = [lr(update) for update in (0, 125, 250, 163888, 163889, 177545, 177546)]
    assert found == pytest.approx([1e-7, 1e-4 * (1 - 0.5 * 0.999), 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


@pytest.mark.parametrize("changes", [{"schedule": "poly"}, {"schedule": "steps"}, {"warmup_updates": 5}])
def test_what_moves_by_updates_says_so(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="add --schedule-steps update"):
        Settings().merged(changes)


def test_a_shorter_run_has_a_shorter_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    long: dict[str, Any] = {**POLY, "updates": 1000, "warmup_updates": 200}
    monkeypatch.setitem(PRESETS, "long", long)
    settings, (note,) = recipe(Settings, "long", {"updates": 500})
    assert settings.warmup_updates == 50
    assert "200 updates shortened to 50" in note
    assert recipe(Settings, "long", {"updates": 500, "warmup_updates": 90})[0].warmup_updates == 90
    assert recipe(Settings, "long", {"epochs": 7})[0].updates is None


def _trained(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    assert main([*FLAGS, "--out", str(folder), *flags]) == 0
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["epoch"], saved["done"]) == (18, 2, 0)
    return dict(saved["model"])


@pytest.mark.slow
def test_a_run_ends_within_an_epoch_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 updates of 14 an epoch; one that was stopped in the last epoch ends with the same weights."""
    whole = _trained(tmp_path / "whole", "--updates", "18")
    assert read_toml(str(tmp_path / "whole" / "config.toml"))["epochs"] == 2
    evaluated = [row["step"] for row in log(tmp_path / "whole") if row["kind"] == "eval"]
    assert evaluated == [14, 14, 18, 18]

    stop_if = Run._stop_if

    def at_16(run: Run, number: int) -> None:
        stop_if(run, 15 if run.loop.step == 16 else number)

    task = tasks.create(tasks.read_settings(str(tmp_path / "whole" / "config.toml")))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_stop_if", at_16)
        patch.setattr(Run, "_stop_signal", lambda run: int(run.loop.step == 16))
        with pytest.raises(Stopped):
            train(task, tmp_path / "stopped")
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    again = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_two_lengths_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "digits", "--epochs", "2", "--updates", "9", "--dry-run"]) == 1
    assert "name one of them" in capsys.readouterr().err


def test_older_runs_name_their_task_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[task]\ntask = "classification"\n')
    assert tasks.read_settings(str(path)).task == "classify"
    assert Settings(task="classification").task == "classify"
