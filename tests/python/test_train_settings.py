# SPDX-License-Identifier: Apache-2.0
"""Settings, presets, schedule and parameter groups of `vimcore train` against what was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from vimcore.cli import main
from vimcore.tasks import backbone, settings_type
from vimcore.tasks.classification.settings import ClassificationSettings as Settings
from vimcore.tasks.classification.task import build
from vimcore.tasks.settings import read_toml
from vimcore.train.optimizer import parameter_groups
from vimcore.train.presets import PRESETS, task_of
from vimcore.train.schedule import Schedule, peak_lr


def preset(name: str, **changes: Any) -> Settings:
    return Settings().merged(PRESETS[name]).merged(changes)


# model, batch of one process, processes, peak, decay, drop path, epochs
PUBLISHED = {
    "tiny-released": ("vim_tiny_patch16_224", 128, 8, 1e-3, 0.1, 0.0, 300),
    "small-released": ("vim_small_patch16_224", 64, 8, 1e-3, 0.05, 0.05, 300),
    "tiny-paper": ("vim_tiny_patch16_224", 128, 8, 1e-3, 0.05, 0.0, 300),
    "small-paper": ("vim_small_patch16_224", 128, 8, 1e-3, 0.05, 0.05, 300),
    "base-paper": ("vim_base_patch16_224", 128, 8, 1e-3, 0.05, 0.0, 300),
    "tiny-long-released": ("vim_tiny_patch16_stride8_224", 128, 8, 1e-5, 1e-8, 0.0, 30),
    "small-long-released": ("vim_small_patch16_stride8_224", 128, 8, 1e-5, 1e-8, 0.0, 30),
    "tiny-long-paper": ("vim_tiny_patch16_stride8_224", 128, 8, 1e-5, 1e-8, 0.0, 30),
    "small-long-paper": ("vim_small_patch16_stride8_224", 128, 8, 1e-5, 1e-8, 0.0, 30),
    "base-long-paper": ("vim_base_patch16_stride8_224", 128, 8, 1e-5, 1e-8, 0.0, 30),
}


def test_every_preset_is_checked_here() -> None:
    """Those of other tasks are in the tests of these tasks, `finetune` in its own."""
    here = {*PUBLISHED, *MAMBAR, *VIDEOMAMBA, *PRETRAINED, "digits", "finetune"}
    assert here == {name for name in PRESETS if task_of(name) == "classify"}


# pixels, batch of one of eight processes, peak, decay, drop path, epochs, smoothing
MAMBAR = {
    "mambar-base-128": (128, 128, 1e-3, 0.05, 0.1, 300, 0.0),
    "mambar-base-224": (224, 128, 4e-4, 0.05, 0.4, 100, 0.0),
    "mambar-base-finetune": (224, 64, 1e-5, 0.1, 0.4, 20, 0.1),
}


@pytest.mark.parametrize("name", MAMBAR)
def test_presets_of_registers(name: str) -> None:
    pixels, batch, peak, decay, drop_path, epochs, smoothing = MAMBAR[name]
    s = preset(name)
    assert backbone.size_of(s) == (pixels, pixels)
    assert (s.model, s.batch_size, s.weight_decay) == ("mambar_base_patch16_224", batch, decay)
    assert (s.drop_path_rate, s.epochs, s.label_smoothing) == (drop_path, epochs, smoothing)
    assert peak_lr(s, 8) == pytest.approx(peak)
    assert (s.random_erase, s.mixup, s.cutmix, s.ema) == (0.0, 0.8, 1.0, 0.99996)
    finetune = name.endswith("finetune")
    expected = ("rand-m9-mstd0.5-inc1", 1, 1.0) if finetune else ("3a", 3, 0.875)
    assert (s.rand_augment, s.repeats, s.crop_pct) == expected


# updates of the authors' epochs for 1,024 clips and their copies, decay, drop path, RandAugment
VIDEOMAMBA = {
    "videomamba-tiny": (140, 0.1, 0.1, "rand-m5-n2-mstd0.25-inc1"),
    "videomamba-small": (100, 0.05, 0.35, "rand-m7-n4-mstd0.5-inc1"),
    "videomamba-middle": (100, 0.05, 0.8, "rand-m7-n4-mstd0.5-inc1"),
}


@pytest.mark.parametrize("name", VIDEOMAMBA)
def test_presets_of_clips(name: str) -> None:
    updates, decay, drop_path, augment = VIDEOMAMBA[name]
    s = preset(name)
    assert (backbone.frames_of(s), backbone.size_of(s), s.frame_sampling) == (8, (224, 224), "random")
    assert (s.weight_decay, s.drop_path_rate, s.rand_augment) == (decay, drop_path, augment)
    assert (s.layer_decay, s.label_smoothing, s.ema, s.crop_pct) == (0.75, 0.1, 0.0, 1.0)
    assert (s.mixup, s.cutmix, s.random_erase) == (0.8, 1.0, 0.25)
    assert peak_lr(s, 8) == pytest.approx(8e-4)  # 2e-4 for 256 images, 64 clips twice on each process
    assert s.epochs * 1024 // (s.batch_size * 8) == updates
    lr = Schedule(s, peak_lr(s, 8), 10)
    assert lr(0) == pytest.approx(4e-6)
    assert lr(100) == pytest.approx(8e-4, rel=0.03)  # after 5 of the authors' epochs
    assert lr(10 * s.epochs - 1) == pytest.approx(4e-6, rel=0.1)


PRETRAINED = {"mim-base-finetune": 0.3, "ar2-base-finetune": 0.1}  # and its drop path


@pytest.mark.parametrize("name", PRETRAINED)
def test_presets_after_pretraining(name: str) -> None:
    """At 1,024 images an update; the network is that of the pretraining, the mean of its patches read."""
    s, before = preset(name), PRESETS[name.removesuffix("-finetune")]
    assert (s.model, s.class_token, s.drop_path_rate) == (before["model"], "none", PRETRAINED[name])
    assert before["class_token"] == "none"
    assert backbone.size_of(s) == (224, 224)
    assert (8 * s.batch_size, s.epochs, s.weight_decay, s.layer_decay) == (1024, 100, 0.05, 0.65)
    assert peak_lr(s, 8) == pytest.approx(4 * 5e-4)
    assert (s.rand_augment, s.mixup, s.cutmix, s.random_erase) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0, 0.25)
    assert (s.label_smoothing, s.ema, s.repeats) == (0.1, 0.99992, 1)
    lr = Schedule(s, peak_lr(s, 8), 10)
    assert [lr(0), lr(25), lr(50)] == pytest.approx([0, 1e-3, 2e-3], rel=0.01)
    assert lr(999) == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name: str) -> None:
    model, batch, world, peak, decay, drop_path, epochs = PUBLISHED[name]
    s = preset(name)
    assert (s.model, s.batch_size, s.weight_decay, s.drop_path_rate, s.epochs) == (
        model,
        batch,
        decay,
        drop_path,
        epochs,
    )
    assert peak_lr(s, world) == pytest.approx(peak)
    assert (s.ema, s.label_smoothing, s.clip_grad, s.precision) == (0.99996, 0.1, None, "float32")
    assert (s.mixup, s.hflip, s.random_erase, s.crop_pct) == (0.8, 0.5, 0.25, 0.875)
    released = name.endswith("released")
    assert (s.rand_augment, s.cutmix, s.repeats) == (
        ("rand-m9-mstd0.5-inc1", 1.0, 3) if released else ("", 0.0, 1)
    )
    assert s.pos_embed == ("authors" if "long-released" in name else "correct")
    if "long" in name:  # constant, all the way
        schedule = Schedule(s, peak_lr(s, world), 7)
        assert [schedule(i) for i in range(30 * 7)] == pytest.approx([1e-5] * 30 * 7)


def test_fewer_processes_scale_the_peak_alone() -> None:
    s = preset("tiny-released")
    assert peak_lr(s, 1) == pytest.approx(1.25e-4)
    assert peak_lr(preset("tiny-released", accumulate=8), 1) == pytest.approx(1e-3)
    assert peak_lr(preset("tiny-released", scale_lr=False), 1) == 5e-4
    assert Schedule(s, peak_lr(s, 1), 10)(0) == 1e-6


def test_schedule_of_the_authors() -> None:
    """Learning rates at the published peak, by epoch; two updates an epoch."""
    s = preset("tiny-released")
    lr = Schedule(s, 1e-3, 2)
    published = {
        0: 1e-6,
        1: 1e-6,
        2: 2.008e-4,
        5: 8.002e-4,
        6: 9.99322e-4,
        100: 7.570e-4,
        151: 5.05e-4,
        299: 1.0109e-5,
    }
    for epoch, value in published.items():
        assert lr(2 * epoch) == lr(2 * epoch + 1) == pytest.approx(value, rel=1e-3), epoch


def test_schedules() -> None:
    s = preset("tiny-released", epochs=10, warmup_epochs=2.0)
    lag = Schedule(s, 1e-3, 4)
    epoch = Schedule(s.merged({"schedule_steps": "epoch"}), 1e-3, 4)
    update = Schedule(s.merged({"schedule_steps": "update"}), 1e-3, 4)
    constant = Schedule(s.merged({"schedule": "constant", "schedule_steps": "update"}), 1e-3, 4)
    assert [lag(4 * e) for e in range(1, 10)] == [epoch(4 * e) for e in range(9)]
    assert [update(4 * e) for e in range(10)] == pytest.approx([epoch(4 * e) for e in range(10)])
    assert len({update(i) for i in range(40)}) == 40
    assert update(4) == pytest.approx(1e-6 + 4 * (1e-3 - 1e-6) / 8)
    assert [constant(i) for i in range(8, 40)] == [1e-3] * 32
    assert constant(4) == update(4)


def test_parameter_groups_of_the_published_network() -> None:
    model = vimcore.create_model("vim_tiny_patch16_224")
    names = {id(p): n for n, p in model.named_parameters()}
    for decay in ("authors", "mamba"):
        groups = parameter_groups(model, 0.1, decay)
        decayed, free = ({names[id(p)] for p in group["params"]} for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert decayed | free == set(names.values())
        assert not decayed & free
        of_layer = {n.removeprefix("layers.5.") for n in decayed if n.startswith("layers.5.")}
        matrices = {f"mixer.{n}{s}.weight" for n in ("conv1d", "x_proj", "dt_proj") for s in ("", "_b")}
        matrices |= {"mixer.in_proj.weight", "mixer.out_proj.weight"}
        logs = {"mixer.A_log", "mixer.A_b_log"}
        assert of_layer == (matrices | logs if decay == "authors" else matrices)
        outside = {n for n in decayed if not n.startswith("layers.")}
        assert outside == {"patch_embed.proj.weight", "head.weight"}


# ---- files and flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_toml_holds_everything(name: str, tmp_path: Path) -> None:
    changes = {"img_size": [32, 48], "set": ["norm=layer"], "clip_grad": 1, "data": 'a "b"\\c', "seed": 3}
    kind = settings_type(PRESETS[name])
    s = kind().merged(PRESETS[name]).merged(changes)
    path = tmp_path / "config.toml"
    path.write_text(s.to_toml(), encoding="utf-8")
    assert kind().merged(read_toml(str(path), kind)) == s
    names = {field.name for field in dataclasses.fields(kind)}
    assert all(f"{n} = " in s.to_toml() or f"# {n} " in s.to_toml() for n in names)


def test_flags_over_file_over_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("lr = 3e-3\n[schedule]\nepochs = 7\nwarmup_epochs = 1\n")
    arguments = ["--preset", "small-released", "--config", str(config), "--epochs", "9", "--no-scale-lr"]
    arguments += ["--batch-size", "7", "--mixup", "0", "--cutmix", "0"]  # checked together
    assert main(["train", *arguments, "--img-size", "32", "48", "--dry-run"]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    s = Settings().merged(read_toml(str(shown)))
    assert (s.model, s.lr, s.epochs, s.warmup_epochs) == ("vim_small_patch16_224", 3e-3, 9, 1.0)
    assert (s.scale_lr, s.img_size, s.drop_path_rate) == (False, (32, 48), 0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch: there is no such setting; close to it: epochs"),
        ("[data]\nepochs = 3", r"\[data\] epochs: belongs to \[schedule\]"),
        ("[date]\nval = 'x'", r"\[date\]: expected one of the sections model"),
        ("epochs = 'many'", "epochs: expected int, got 'many'"),
        ("epochs = 0", "epochs: expected at least 1"),
        ("ema = 1.0", "ema: expected 0 or more and less than 1"),
        ("hflip = 2", "hflip: expected a probability"),
        ("decay = 'none'", "decay: expected one of authors, mamba"),
        ("batch_size = 7", "batch_size: expected an even number with mixup or cutmix, got 7"),
        ("scale_lr = 1", "scale_lr: expected bool, got 1"),
        ("lr = nan", "lr: expected more than 0"),
        ("crop_scale = [0.1]", "crop_scale: expected 2 numbers"),
        ("clip_grad = 0", "clip_grad: expected more than 0"),
        ("workers = -1", "workers: expected 0 or more"),
        ("epochs =", "not a TOML file"),
        ("data = 3", "data: expected str"),
    ],
)
def test_wrong_settings(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(text)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vimcore: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        Settings().merged(read_toml(str(config)))
    assert not (tmp_path / "run").exists()


def test_fine_tuning_wants_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny-long-paper", "mambar-base-224"):
        assert main(["train", "--preset", name, "--data", "digits", "--dry-run"]) == 1
    assert "init: tiny-long-paper fine-tunes" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny-long-paper", "--init", "tiny.pth", "--dry-run"]) == 0


# ---- networks ----------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"img_size": (32,), "patch_size": 8, "embed_dim": 16, "depth": 2}


def test_options_reach_the_network() -> None:
    changes = {
        **SMALL,
        "stride": 4,
        "directions": "sequence",
        "class_token": "random",
        "drop_path_rate": 0.3,
        "drop_rate": 0.2,
        "memory": "fast",
        "set": ("norm=layer", "d_state=4"),
    }
    model, notes = build(preset("tiny-released", **changes), 5, ["a", "b"])
    c = model.config
    assert (c["img_size"], c["patch_size"], c["stride"], c["in_chans"]) == ([32, 32], 8, 4, 5)
    assert (c["directions"], c["class_token"], c["norm"], c["d_state"]) == ("sequence", "random", "layer", 4)
    assert (c["drop_path_rate"], c["drop_rate"], model.memory, c["num_classes"]) == (0.3, 0.2, "fast", 2)
    assert notes == []
    assert build(preset("tiny-released", **SMALL), 3, ["a"])[0].config["stride"] == 8
    with pytest.raises(ValueError, match="every patch"):
        build(preset("tiny-released", **SMALL, class_token="none", pool="all"), 3, ["a"])


@pytest.mark.parametrize("way", ["correct", "authors"])
def test_start_from_other_weights(way: str, tmp_path: Path) -> None:
    """Half the stride, four channels for three, other classes: all that is fitted is told."""
    old, _ = build(preset("tiny-released", **SMALL), 3, ["a", "b", "c"])
    old.save(tmp_path / "old.safetensors", labels=["a", "b", "c"])
    s = preset("tiny-released", **SMALL, stride=4, init=str(tmp_path / "old.safetensors"), pos_embed=way)
    new, notes = build(s, 4, ["x", "y"])
    assert notes[0].startswith("weights from ")
    assert notes[1:] == [
        "patch embedding adapted from 3 to 4 channels",
        "new head for 2 classes",
        f"position table resized to 7 x 7 patches ({way})",
    ]
    wanted = vimcore.io.resize_pos_embed(old.pos_embed.detach(), (4, 4), (7, 7), "middle", way)
    assert torch.equal(new.pos_embed.detach(), wanted)
    weight, before = new.patch_embed.proj.weight.detach(), old.patch_embed.proj.weight.detach()
    assert torch.equal(weight, torch.cat([before, before[:, :1]], 1) * (3 / 4))
    for name, value in old.state_dict().items():
        if name.startswith(("layers", "norm_f", "cls_token")):
            assert torch.equal(new.state_dict()[name], value), name
    same, notes = build(s.merged({"stride": 8}), 3, ["a", "b", "c"])
    assert torch.equal(same.head.weight, old.head.weight)
    assert len(notes) == 1
    renamed, notes = build(s.merged({"stride": 8}), 3, ["a", "b", "d"])  # as many, but other ones
    assert not torch.equal(renamed.head.weight, old.head.weight)
    assert notes[1:] == ["new head for 3 classes"]
    ema = {key: value + 1 for key, value in old.state_dict().items()}
    torch.save({"model": old.state_dict(), "model_ema": ema}, tmp_path / "authors.pth")
    changes = {"init": str(tmp_path / "authors.pth"), "stride": 8, "init_weights": "ema"}
    averaged, _ = build(s.merged(changes), 3, ["p", "q", "r"])  # names unknown: the head stays
    assert torch.equal(averaged.head.weight, old.head.weight + 1)
    new.save(tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match="takes 4 channels, the images have 2"):
        build(s.merged({"init": str(tmp_path / "four.safetensors")}), 2, ["x", "y"])
