# SPDX-License-Identifier: Apache-2.0
"""The preset `finetune`: when it is chosen, the network from the file, its rates and its average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from train_helpers import folder, log
from vimcore import _core
from vimcore.cli import main
from vimcore.io import save_model
from vimcore.tasks.architecture import with_architecture
from vimcore.tasks.backbone import create
from vimcore.tasks.classification.settings import ClassificationSettings as Settings
from vimcore.tasks.settings import read_toml
from vimcore.train.presets import DEFAULTS, PRESETS, recipe
from vimcore.train.schedule import Schedule, peak_lr, warnings

NETWORK: dict[str, Any] = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 2}
OTHER: dict[str, Any] = {
    "class_token": "none",
    "pool": "max",
    "d_state": 8,
    "norm": "layer",
    "layer_scale": 0.5,
}
QUIET = ["--workers", "0", "--threads", "1", "--track", "none"]


def start(path: Path, channels: int = 3, mean: float = 0.4, **changes: Any) -> Path:
    """A file of weights, of two classes and with preprocessing."""
    torch.manual_seed(1)
    options = {**NETWORK, **OTHER, **changes, "in_chans": channels, "num_classes": 2}
    size = options["img_size"]
    steps: dict[str, Any] = {"resize": size[0], "crop": list(size), "mean": [mean] * channels}
    steps |= {"std": [0.2] * channels, "interpolation": "bicubic"}
    save_model(vimcore.VisionMamba(**options), path, ["cat", "dog"], steps)
    return path


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The settings that a command would run with, and what it tells of them."""
    assert main(["train", "--dry-run", "--data", "digits", *arguments]) == 0
    out, error = capsys.readouterr()
    (tmp_path / "shown.toml").write_text(out)
    return read_toml(str(tmp_path / "shown.toml")), error


def test_chosen_where_weights_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = start(tmp_path / "start.safetensors")
    found, told = shown(tmp_path, capsys, "--init", str(file))
    assert all(
        found[name] == (list(v) if isinstance(v, tuple) else v) for name, v in PRESETS["finetune"].items()
    )
    assert "vimcore: preset finetune, as --init is given; --preset names another\n" in told
    assert f"network as in {file}: 2 blocks of width 16, 16 x 24 pixels in patches of 8" in told
    config = tmp_path / "mine.toml"
    config.write_text(f'init = "{file}"\n')
    assert shown(tmp_path, capsys, "--config", str(config))[0] == found

    named, told = shown(tmp_path, capsys, "--init", str(file), "--preset", "tiny-paper")
    assert (named["mixup"], named["batch_size"], told) == (0.8, 128, "")
    assert "img_size" not in named
    without, told = shown(tmp_path, capsys)
    assert (without["mixup"], told) == (0.8, "")
    for task in ("segment", "detect", "pretrain"):
        other, _ = shown(tmp_path, capsys, "--task", task, "--init", str(file))
        own = Settings().merged(
            {k: v for k, v in PRESETS[DEFAULTS[task]].items() if k in ("lr", "batch_size")}
        )
        assert (other["lr"], other["batch_size"]) == (own.lr, own.batch_size)

    assert main(["train", "--data", "digits", "--preset", "finetune", "--dry-run"]) == 1
    assert "init: finetune fine-tunes; name the weights to start from with --init" in capsys.readouterr().err
    assert main(["train", "--data", "digits", "--init", str(tmp_path / "absent"), "--dry-run"]) == 1
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": True, "rope_grid": 3, "average_directions": False, "norm_eps": 1e-6, "dt_rank": 2},
        {"class_token": "double", "pos_embed": False, "stride": 4, "directions": "ssm"},
        {"img_size": (32, 32), "layer_scale": None, "norm": "rms", "expand": 1, "d_conv": 3},
    ],
)
def test_the_network_is_that_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    """Every option, so that all tensors fit and mean the same."""
    file = start(tmp_path / "start.safetensors", **options)
    typed, _ = with_architecture({"init": str(file)})
    settings, _ = recipe(Settings, "finetune", typed)
    assert create(settings, 3, 2).config == vimcore.VisionMamba.load(file).config
    assert (settings.mean, settings.std) == ((0.4,) * 3, (0.2,) * 3)


def test_what_is_typed_is_not_taken_from_the_file(tmp_path: Path) -> None:
    file = str(start(tmp_path / "start.safetensors"))
    typed = {"init": file, "img_size": (32,), "set": ("norm_eps=1e-6", "d_state=4"), "mean": (0.5,) * 3}
    found, _ = with_architecture(typed)
    assert (found["img_size"], found["mean"], found["std"]) == ((32,), (0.5,) * 3, (0.2,) * 3)
    assert set(found["set"]) == {"norm=layer", "layer_scale=0.5", "norm_eps=1e-6", "d_state=4"}
    torch.save(vimcore.VisionMamba.load(file).state_dict(), tmp_path / "start.pth")
    theirs = str(tmp_path / "start.pth")
    for typed in ({"init": file, "model": "vim_tiny_patch16_224"}, {"init": theirs}):
        assert with_architecture(typed) == (typed, [])
    found, _ = with_architecture({"init": file, "in_chans": 1})
    assert not {"mean", "std"} & set(found)
    grey, _ = with_architecture({"init": str(start(tmp_path / "grey.safetensors", 1, 0.5))})
    assert (grey["in_chans"], "mean" in grey, grey["std"]) == (1, False, (0.2,))


def test_its_rates() -> None:
    """A tenth of the run, however long, grows to the rate that was typed, and then it falls to nothing."""
    for typed, per_epoch in (({}, 7), ({"epochs": 3}, 400), ({"updates": 30}, 1), ({"updates": 30}, 5000)):
        s, notes = recipe(Settings, "finetune", {"init": "x", "lr": 3e-4, **typed})
        updates = s.updates or s.epochs * per_epoch
        assert peak_lr(s, world=4) == 3e-4
        lr = Schedule(s, 3e-4, per_epoch, updates)
        rates = [lr(update) for update in range(updates)]
        peak = round(updates / 10)
        assert rates.index(max(rates)) in (peak - 1, peak)
        assert rates[:peak] == pytest.approx([3e-4 * i / peak for i in range(peak)])
        assert rates[peak] == pytest.approx(3e-4, rel=0.03)  # the cosine's clock began with the warm-up
        assert (notes, warnings(s, lr, updates)) == ([], [])
        assert rates[-1] < 0.02 * 3e-4


def test_units_of_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that was typed counts, and two of them are an error."""
    per_epoch = 10
    for typed, updates in (
        ({"warmup_epochs": 2.0}, 20),
        ({"warmup_updates": 9}, 9),
        ({"warmup_share": 0.5}, 250),
        ({"warmup_share": 0.0}, 0),
    ):
        s, _ = recipe(Settings, "finetune", {"init": "x", **typed})
        assert Schedule(s, 1.0, per_epoch).warmup == updates, typed
    by_epochs = Settings(schedule_steps="epoch", epochs=50, warmup_share=0.1)
    assert Schedule(by_epochs, 1.0, per_epoch).warmup == 5
    file, config = start(tmp_path / "start.safetensors"), tmp_path / "mine.toml"
    config.write_text(f'init = "{file}"\nwarmup_share = 0.3\n')
    found, _ = shown(tmp_path, capsys, "--config", str(config), "--warmup-updates", "4")
    assert ("warmup_share" in found, found["warmup_updates"]) == (False, 4)
    both = ["--warmup-share", "0.1", "--warmup-epochs", "1"]
    assert main(["train", "--init", str(file), *both, "--dry-run"]) == 1
    assert "warmup_share: both give the length of warm-up; name one of them" in capsys.readouterr().err
    for changes, text in (
        ({"warmup_share": 1.0}, "warmup_share: expected 0 or more and less than 1, got 1.0"),
        ({"warmup_share": 0.1, "warmup_updates": 3, "schedule_steps": "update"}, "both give the length"),
    ):
        with pytest.raises(ValueError, match=text):
            Settings().merged(changes)


@pytest.mark.slow
def test_a_short_run_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From pretraining to a classifier of three digits: after 45 updates the average is right, too."""
    photos = folder(tmp_path / "photos", each=20)
    first = [
        "train",
        "--preset",
        "digits-mim",
        *QUIET,
        "--epochs",
        "3",
        "--mean",
        "0.35",
        "--data",
        str(photos),
    ]
    assert main([*first, "--augment", "crop", "--batch-size", "16", "--out", str(tmp_path / "first")]) == 0
    begun = tmp_path / "first" / "last.safetensors"
    flags = ["--data", str(photos), "--val", str(photos), "--init", str(begun), *QUIET, "--lr", "4e-3"]
    flags += ["--epochs", "15", "--batch-size", "20", "--augment", "none", "--crop-pct", "1"]
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(["train", *flags, "--out", str(run), "--eval-every", "15"]) == 0
    told = capsys.readouterr().err
    assert "new head for 3 classes" in told
    assert "never reaches" not in told
    assert "still" not in told
    (begin,) = (line for line in log(run) if line["kind"] == "start")
    assert begin["warmup_share"] == 0.1
    assert not {"warmup_epochs", "warmup_updates"} & set(begin)
    settings = Settings().merged(read_toml(str(run / "config.toml")))
    assert (settings.embed_dim, settings.depth, settings.in_chans, settings.mean) == (64, 4, 1, (0.35,))
    scores = {line["weights"]: line["top1"] for line in log(run) if line["kind"] == "eval"}
    assert scores["raw"] > 0.8
    assert scores["ema"] > 0.8

    # the average is young: far nearer to the last weights than to those it began with
    name = "layers.3.mixer.out_proj.weight"
    files = (begun, run / "last.safetensors", run / "last_ema.safetensors")
    first_w, last, average = (torch.from_numpy(_core.read_safetensors(str(f))[0][name]) for f in files)
    assert (average - last).norm() < 0.5 * (average - first_w).norm()
