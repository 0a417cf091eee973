# SPDX-License-Identifier: Apache-2.0
"""Short runs: how long the learning rate rises, what is said of it, and that old runs keep theirs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from train_helpers import ONCE, SMALL, folder, log, stopped
from vimcore.cli import main
from vimcore.tasks import settings_type
from vimcore.tasks.classification.settings import ClassificationSettings as Settings
from vimcore.tasks.settings import read_toml
from vimcore.train.in_memory import fit
from vimcore.train.presets import PRESETS, recipe
from vimcore.train.schedule import Schedule, bounded_warmup, described, peak_lr, warnings

PUBLISHED = [name for name in PRESETS if name.endswith(("-paper", "-released")) or name.startswith("mambar-")]


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_at_its_own_length_is_what_it_says(name: str) -> None:
    kind = settings_type(PRESETS[name])
    own = kind().merged(PRESETS[name])
    for epochs in ({}, {"epochs": own.epochs}, {"epochs": 2 * own.epochs}):
        expected = own.merged({**epochs, "updates": None}) if epochs else own
        assert recipe(kind, name, epochs) == (expected, [])
    assert own.schedule_steps == "update" or name in PUBLISHED


@pytest.mark.parametrize(
    ("steps", "epochs", "wanted"),
    [
        ("update", 2, 0.2),
        ("update", 15, 1.5),
        ("update", 300, 5),
        ("epoch", 9, 0),
        ("epoch", 20, 2),
        ("epoch", 59, 5),
        ("authors", 2, 0),
        ("authors", 20, 1),  # whose clock stands still for one epoch more
        ("authors", 60, 5),
    ],
)
def test_a_tenth_of_a_run(steps: str, epochs: int, wanted: float) -> None:
    """As a number, and as the share of the updates before the peak."""
    assert bounded_warmup(5, epochs, steps) == wanted
    s = Settings(epochs=epochs, warmup_epochs=wanted, schedule_steps=steps, warmup_lr=0.0)
    lr = Schedule(s, 1.0, 20)
    rates = [lr(update) for update in range(20 * epochs)]
    peak = max(rates)
    assert rates.index(peak) <= 2 * epochs
    assert peak > 0.97
    assert lr.highest(20 * epochs) == peak


def test_what_was_typed_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a flag or in a file; else the change is told, and stands in the settings."""
    config = tmp_path / "mine.toml"
    config.write_text("warmup_epochs = 1.5\n")

    def warmup(*arguments: str) -> tuple[float, str]:
        assert main(["train", "--dry-run", "--epochs", "2", *arguments]) == 0
        out, error = capsys.readouterr()
        (tmp_path / "shown.toml").write_text(out)
        return read_toml(str(tmp_path / "shown.toml"))["warmup_epochs"], error

    assert warmup("--preset", "digits") == (
        0.2,
        "vimcore: warm-up 3 epochs shortened to 0.2, a tenth of the run; --warmup-epochs sets it\n",
    )
    assert warmup() == (
        0,
        "vimcore: warm-up 5 epochs shortened to 0, the whole epochs in a tenth of the run; "
        "--warmup-epochs sets it\n",
    )
    assert warmup("--schedule-steps", "update")[0] == 0.2
    assert warmup("--warmup-epochs", "5") == (5, "")
    assert warmup("--config", str(config)) == (1.5, "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_short_recipe_comes_to_its_peak(name: str) -> None:
    for epochs in (1, 2, 3, 5, 8, 12, 29):
        s, _ = recipe(settings_type(PRESETS[name]), name, {"epochs": epochs})
        peak = peak_lr(s, 8)
        assert Schedule(s, peak, 4).highest(4 * epochs) >= 0.9 * peak
        assert warnings(s.merged({"ema": 0.0}), Schedule(s, peak, 4), 4 * epochs) == []


def test_warnings() -> None:
    s = Settings(epochs=2, ema=0.0)
    (text,) = warnings(s, Schedule(s, 1e-3, 10), 20)
    assert text == (
        "the learning rate never reaches its peak of 0.001: the highest in 20 updates is 1e-06; "
        "--warmup-epochs, 5 of 2 epochs, sets it"
    )
    assert warnings(s.merged({"schedule": "constant"}), Schedule(s, 1e-3, 10), 20) == [text]
    s = s.merged({"warmup_epochs": 0.0})
    (text,) = warnings(s, Schedule(s, 1e-6, 10), 20)
    assert text.startswith("min_lr 1e-05 is above the peak of 1e-06, so the learning rate rises to the end")
    assert warnings(s, Schedule(s, 1e-3, 10), 20) == []
    (text,) = warnings(s.merged({"ema": 0.99996}), Schedule(s, 1e-3, 10), 20)
    assert text.startswith(
        "after 20 updates the averaged weights are still 100 % the initial ones; --ema-ramp"
    )
    assert warnings(s.merged({"ema": 0.99996, "ema_ramp": True}), Schedule(s, 1e-3, 10), 20) == []
    assert warnings(s.merged({"ema": 0.9}), Schedule(s, 1e-3, 10), 20) == []


def test_the_rule_of_the_learning_rate() -> None:
    s = Settings(lr=1e-3)
    assert described(s, 16, peak_lr(s.merged({"batch_size": 16}), 1)) == (
        "learning rate: lr 0.001 x 16 images an update / lr_batch 512 = 3.13e-05 at its peak; "
        "--no-scale-lr takes lr as it is"
    )
    s = s.merged({"scale_lr": False})
    assert described(s, 16, peak_lr(s, 1)) == (
        "learning rate: lr 0.001 at its peak, as given: scale_lr is off"
    )


@pytest.mark.slow
def test_a_run_tells_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr and in the first line of the log; what was bounded stands in config.toml, and is resumed."""
    data, run = folder(tmp_path / "data"), tmp_path / "run"
    arguments = ["--data", str(data), *SMALL, *ONCE, "--epochs", "2", "--val-fraction", "0.3", "--lr", "2e-3"]
    assert main(["train", *arguments, "--schedule-steps", "update", "--out", str(run)]) == 0
    error = capsys.readouterr().err
    bound = "warm-up 5 epochs shortened to 0.2, a tenth of the run; --warmup-epochs sets it"
    assert f"\nvimcore: {bound}\n" in error
    assert (
        f"\nlearning rate: lr 0.002 x 8 images an update / lr_batch 512 = {2e-3 / 64:.3g} at its peak;"
        in error
    )
    first, *rest = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert first["notes"][0] == bound
    assert {k: v for k, v in first.items() if k != "notes"} == {
        "kind": "start",
        "lr": 2e-3,
        "scale_lr": True,
        "lr_batch": 512,
        "images_per_update": 8,
        "peak_lr": 2e-3 / 64,
        "warmup_epochs": 0.2,
        "epochs": 2,
        "updates": 6,
        "samples": {"digit 0": 8, "digit 1": 8, "digit 7": 8},
    }
    assert "start" not in {line["kind"] for line in rest}
    assert read_toml(str(run / "config.toml"))["warmup_epochs"] == 0.2


@pytest.mark.slow
def test_an_old_run_goes_on_as_it_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed like that, bit for bit, and told.

    Its file says 5 of 2 epochs and lacks the settings that came later, its log has no first line.
    """
    data, uninterrupted, old = folder(tmp_path / "data"), tmp_path / "uninterrupted", tmp_path / "old"
    arguments = ["--data", str(data), *SMALL, *ONCE, "--epochs", "2", "--val-fraction", "0.3"]
    arguments += ["--warmup-epochs", "5", "--schedule-steps", "update", "--log-every", "1"]
    assert main(["train", *arguments, "--out", str(uninterrupted)]) == 0
    stopped(old, 4, *arguments)
    lines = (old / "log.jsonl").read_bytes().splitlines(True)
    (old / "log.jsonl").write_bytes(b"".join(lines[1:]))
    config = (old / "config.toml").read_text()
    later = ("opt = ", "# layer_decay ", "# track ", "[task]", "task = ")
    assert all(f"\n{start}" in config for start in later)
    kept = [line for line in config.splitlines(keepends=True) if not line.startswith(later)]
    (old / "config.toml").write_text("".join(kept))
    capsys.readouterr()
    assert main(["train", "--resume", str(old)]) == 0
    error = capsys.readouterr().err
    assert "the learning rate never reaches its peak of 7.81e-06: the highest in 6 updates is 3.2" in error
    assert "shortened" not in error
    assert log(old) == log(uninterrupted)[1:]
    assert (old / "last.safetensors").read_bytes() == (uninterrupted / "last.safetensors").read_bytes()


# ---- vimcore.train.fit -------------------------------------------------------------------------------------


def test_fit_of_few_epochs() -> None:
    torch.manual_seed(0)
    model = vimcore.VisionMamba(8, 4, in_chans=1, num_classes=2, embed_dim=16, depth=1)
    data = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    history = fit(model, data, epochs=2, batch_size=2, lr=1e-3, min_lr=1e-3, progress=False)
    assert history.lr == [1e-3, 1e-3]
    with pytest.warns(UserWarning, match="5 epochs do not fit into 2: the learning rate rises to the end"):
        history = fit(model, data, epochs=2, batch_size=2, lr=1e-3, warmup=5, progress=False)
    assert history.lr == [5e-4, 1e-3]
    arrays = data[0].numpy(), data[1].numpy().astype(np.int32)
    torch.manual_seed(0)
    again = vimcore.VisionMamba(8, 4, in_chans=1, num_classes=2, embed_dim=16, depth=1)
    of_arrays = fit(again, arrays, arrays, epochs=1, batch_size=2, progress=False)
    torch.manual_seed(0)
    other = vimcore.VisionMamba(8, 4, in_chans=1, num_classes=2, embed_dim=16, depth=1)
    assert of_arrays.valid_loss == fit(other, data, data, epochs=1, batch_size=2, progress=False).valid_loss
    for wrong, shown in (
        ("photos", "got str"),
        ((data[1], data[1]), "int64"),
        ((data[0], data[0]), "float32"),
    ):
        with pytest.raises(ValueError, match=rf"\[fit\] train: expected .*{shown}"):
            fit(model, wrong, epochs=1, progress=False)
    with pytest.raises(ValueError, match="warmup: expected 0 or more epochs, got -1"):
        fit(model, data, epochs=2, warmup=-1, progress=False)
