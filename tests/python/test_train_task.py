# SPDX-License-Identifier: Apache-2.0
"""The engine of `vimcore train` knows no task: it trains a denoiser with data, metric, files of its own."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_helpers import log
from vimcore.data.sampling import Key, seed_all
from vimcore.tasks.settings import Settings, key, read_toml
from vimcore.tasks.task import Data, Metric, Scores, Task
from vimcore.train.folder import resumed
from vimcore.train.log import read_log
from vimcore.train.loop import Loop
from vimcore.train.run import train
from vimcore.train.signals import Stopped
from vimcore.utils.distributed import gather


@dataclass
class DenoisingSettings(Settings):
    """With a setting and a section of its own."""

    SECTIONS = (*Settings.SECTIONS, "noise")

    deviation: float = key("noise", 0.5, "of the noise")
    broken: float = key("noise", 0.0, "factor of the loss after four batches")


@dataclass
class Noisy:
    """Pictures of several sizes, as lists: no labels."""

    noisy: list[Tensor]
    clean: list[Tensor]
    errors: dict[str, str]


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Slopes with noise drawn afresh for each seed; (1, height, width) of two sizes."""

    def __init__(self, count: int, deviation: float) -> None:
        self.count, self.deviation = count, deviation

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Key | int) -> tuple[Tensor, Tensor]:
        index, seed = place if isinstance(place, tuple) else (place, 10**6 + place)
        seed_all(seed)
        height, width = (4, 6) if index % 2 else (5, 5)
        clean = torch.linspace(0, 1 + index % 3, height * width).view(1, height, width)
        return clean + self.deviation * torch.randn(clean.shape), clean


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Noisy:
    noisy, clean = zip(*samples)
    return Noisy(list(noisy), list(clean), {})


class Denoising(Task):
    """Per pixel; the smallest error is the best; files of its own kind."""

    metrics = (Metric("rmse", "error", high=float("inf"), larger_is_better=False, percent=False),)
    settings: DenoisingSettings

    def data(self) -> Data:
        train, valid = (Pictures(n, self.settings.deviation) for n in (48, 11))
        return Data(train, valid, collate, "48 slopes and 11", "slopes", valid_batch_size=1)

    def build(self) -> tuple[nn.Module, list[str]]:
        convolutions = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )
        return nn.Sequential(*convolutions), ["four layers"]

    def prepare(self, batch: Noisy, device: torch.device) -> Noisy:
        shifted = [image + 0.01 * torch.randn(()) for image in batch.noisy]  # chance beside the loader's
        return Noisy(shifted, batch.clean, {})

    def loss(self, model: nn.Module, batch: Noisy) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [(model(x[None])[0], y) for x, y in zip(batch.noisy, batch.clean)]
        square = torch.stack([(x - y).square().mean() for x, y in pairs]).mean()
        most = torch.stack([(x - y).abs().max() for x, y in pairs]).max()
        self.calls = getattr(self, "calls", 0) + 1
        factor = self.settings.broken if self.settings.broken and self.calls > 4 else 1.0
        return square * factor, {"largest": most, "loss_square": square}

    def evaluate(
        self, model: nn.Module, batches: Iterable[Noisy], device: torch.device, precision: torch.dtype
    ) -> Scores:
        model.eval()
        with torch.no_grad():
            errors = [
                (model(x[None])[0] - y).square().mean().item()
                for b in batches
                for x, y in zip(b.noisy, b.clean)
            ]
        model.train()
        every = [error for part in gather(errors) for error in part]
        assert len(every) == 11
        value = float(np.sqrt(np.mean(every)))
        return Scores({"rmse": value, "pixels": 11.0}, f"error {value:.3f}")

    def save(self, model: nn.Module, path: Path) -> None:
        torch.save(model.state_dict(), path)

    def load(self, path: Path, device: torch.device) -> nn.Module:
        model, _ = self.build()
        model.load_state_dict(read(path))
        return model.to(device)

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Noisy],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        found = self.evaluate(model, batches, device, precision)
        (folder / "report.json").write_text(json.dumps(dict(found.values)))


def read(path: Path) -> dict[str, Tensor]:
    """What `Denoising.save` wrote; torch.load would go by the name."""
    found: dict[str, Tensor] = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    return found


def settings(**changes: Any) -> DenoisingSettings:
    values = {
        "task": "denoising",
        "epochs": 3,
        "batch_size": 8,
        "accumulate": 2,
        "repeats": 1,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "lr": 0.02,
        "scale_lr": False,
        "warmup_epochs": 0.0,
        "ema": 0.9,
        "log_every": 1,
        "track": ("none",),
    }
    return DenoisingSettings().merged({**values, **changes})


@pytest.mark.slow
def test_a_run_of_another_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the end, and stopped and resumed: the same bits; its metric decides what is best."""
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    summary = train(Denoising(settings()), uninterrupted)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        update, made = Loop.update, iter(range(1, 6))

        def signalling(self: Loop, batches: Any) -> Any:
            if next(made) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, batches)

        patch.setattr(Loop, "update", signalling)
        with pytest.raises(Stopped, match="after update 5"):
            train(Denoising(settings()), run)
    again = resumed(DenoisingSettings, run, {})
    assert again == settings()
    resumed_summary = train(Denoising(again), run, resume=True)
    error = capsys.readouterr().err
    assert "48 slopes and 11" in error
    assert "four layers" in error
    assert "epoch 3/3: validation raw error " in error

    lines = log(uninterrupted)
    assert log(run) == lines
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (uninterrupted, run)]
    for name in ("model", "average", "optimizer"):
        assert str(states[0][name]) == str(states[1][name])
    for name in ("best", "last", "last_ema"):
        files = [read(folder / f"{name}.safetensors") for folder in (uninterrupted, run)]
        assert all(torch.equal(value, files[1][key]) for key, value in files[0].items()), name
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert steps[0]["largest"] > 0.1
    assert steps[0]["loss_square"] == pytest.approx(steps[0]["loss"])
    scores = [line for line in lines if line["kind"] == "eval"]
    assert {line["weights"] for line in scores} == {"raw", "ema"}
    best = min(scores, key=lambda line: line["rmse"])
    for found in (summary, resumed_summary):
        assert found["best"] == {"rmse": best["rmse"], "epoch": best["epoch"], "weights": best["weights"]}
    assert json.loads((run / "report.json").read_text())["rmse"] == pytest.approx(best["rmse"])
    assert best["rmse"] < scores[0]["rmse"] or best is scores[0]
    columns = read_log(run / "log.jsonl")
    assert columns.evals["raw"]["rmse"].tolist() == [x["rmse"] for x in scores if x["weights"] == "raw"]
    assert columns.steps["largest"].tolist() == [x["largest"] for x in steps]
    assert read_toml(str(run / "config.toml"), DenoisingSettings)["deviation"] == 0.5


def test_checkpoints_of_another_task_are_looked_at(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(Denoising(settings(epochs=1)), run)
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["best"]["rmse"] = -1.0
    torch.save(content, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"best\.rmse: expected a finite number, 0 or more, got -1"):
        train(Denoising(settings(epochs=1)), run, resume=True)
    content["best"] = {"top1": 0.5, "top5": 0.5, "epoch": 1, "weights": "raw"}
    torch.save(content, run / "checkpoint.pt")
    with pytest.raises(ValueError, match="best: missing: 'rmse'"):
        train(Denoising(settings(epochs=1)), run, resume=True)


def test_a_loss_that_breaks_is_diagnosed_by_whom_the_caller_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"the loss is inf in update 3.*there is no checkpoint yet$"):
        train(Denoising(settings(broken=1e300)), run)
    with pytest.raises(FloatingPointError, match=r"health\.txt tells where it began"):
        train(
            Denoising(settings(broken=1e300)),
            run,
            diagnose=lambda model, batch: f"{type(batch).__name__} of {len(batch.noisy)}",
        )
    assert (run / "health.txt").read_text() == "Noisy of 8\n"
