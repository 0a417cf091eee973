# SPDX-License-Identifier: Apache-2.0
"""`vimcore train --task pretrain`: folders without labels, both objectives, resume, and what follows it."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from report_checks import read_report
from train_helpers import folder, log
from vimcore import tasks
from vimcore.cli import main
from vimcore.data.unlabelled import open_unlabelled
from vimcore.tasks.pretraining.reconstructions import read_reconstructions
from vimcore.tasks.pretraining.task import Pretraining
from vimcore.train.optimizer import create_optimizer
from vimcore.train.presets import PRESETS, recipe, task_of
from vimcore.train.run import Run

SMALL = ["--depth", "2", "--embed-dim", "16", "--threads", "1", "--workers", "0", "--seed", "3"]


def _state(run: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mim", "ar2"])
def test_pretraining_then_classifying(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of pictures; stopped and gone on with, bit for bit; its backbone starts a classifier."""
    photos = folder(tmp_path / "photos")
    flags = [
        "train",
        "--preset",
        f"digits-{objective}",
        "--data",
        str(photos),
        "--val-fraction",
        "0.2",
        *SMALL,
    ]
    flags += ["--batch-size", "8", "--augment", "crop", "--eval-every", "1"]
    assert main([*flags, "--out", str(tmp_path / "whole"), "--epochs", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["best"]["loss"] < 10
    first = [*flags, "--out", str(tmp_path / "parts"), "--epochs", "2"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_stop_signal", lambda run: 15 if run.loop.step == 2 else 0)
        assert main(first) == 128 + 15
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    whole, parts = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())

    best = tmp_path / "whole" / "best.safetensors"
    backbone = vimcore.VisionMamba.load(best)
    assert backbone.num_classes == 0
    start = ["train", "--preset", "digits", *SMALL, "--class-token", "none", "--epochs", "1", "--lr", "1e-9"]
    start += ["--warmup-lr", "0", "--min-lr", "0"]
    assert main([*start, "--ema", "0", "--init", str(best), "--out", str(tmp_path / "tuned")]) == 0
    assert "new head for 10 classes" in capsys.readouterr().err
    tuned = vimcore.VisionMamba.load(tmp_path / "tuned" / "last.safetensors").state_dict()
    assert all(torch.allclose(tuned[n], v, atol=1e-5) for n, v in backbone.state_dict().items() if v.ndim > 1)

    shown = read_reconstructions(tmp_path / "whole" / "eval.npz")
    assert shown.panels.shape[1:] == (3, 32, 32, 3)
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "whole"), "--format", "html"]) == 0
    report = read_report(tmp_path / "whole" / "report.html")
    assert report.headings[:2] == ["Training", "What is predicted"]
    assert len(report.pictures) > 6
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "whole")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == ["curves.png", "predicted.png"]
    assert main(["eval", str(tmp_path / "whole")]) == 1
    assert "vimcore train --init" in capsys.readouterr().err

    settings = tasks.read_settings(str(tmp_path / "whole" / "config.toml"))
    task = tasks.create(settings)
    assert isinstance(task, Pretraining)
    task.data()
    model = task.load(best, torch.device("cpu"))
    same = {
        n.removeprefix("backbone."): v for n, v in model.state_dict().items() if n.startswith("backbone.")
    }
    assert all(torch.equal(value, same[name]) for name, value in backbone.state_dict().items())


def _rank(number: int, port: int, arguments: list[str]) -> None:
    """One of two processes, as torchrun would start them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os._exit(main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mim", "ar2"])
def test_two_processes(objective: str, tmp_path: Path) -> None:
    """On gloo. Next patches: as one process with the doubled batch. Masks: each process draws its own.

    Every weight that is trained has a gradient in every update, or DDP would stop.
    """
    flags = ["train", "--preset", f"digits-{objective}", *SMALL, "--augment", "none", "--epochs", "1"]
    flags += ["--class-token", "middle", "--log-every", "1", "--lr", "5e-3", "--track", "none"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*flags, "--batch-size", "256", "--out", str(one)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # torch need not be imported again
    arguments = [*flags, "--batch-size", "128", "--out", str(two)]
    ranks = [fork.Process(target=_rank, args=(number, port, arguments), daemon=True) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    lines = [[line for line in log(run) if line["kind"] in ("step", "eval")] for run in (one, two)]
    assert [line["kind"] for line in lines[0]] == ["step"] * 5 + ["eval"]
    near = 1e-4 if objective == "ar2" else 0.1  # of other masks
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=near)
    steps = lines[1][:5]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    same = [a["loss"] == b["loss"] for a, b in zip(*lines)]
    assert objective == "ar2" or not any(same)


@pytest.mark.slow
def test_arrays_of_many_channels(tmp_path: Path) -> None:
    """.npy files of 5 channels at any depth; validation has the same masks each time."""
    generator = np.random.default_rng(0)
    for i in range(20):
        place = tmp_path / "scenes" / f"day {i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{i}.npy", generator.integers(0, 65535, (5, 20, 20)).astype(np.uint16))
    flags = ["train", "--preset", "digits-mim", "--data", str(tmp_path / "scenes"), "--in-chans", "5", *SMALL]
    flags += ["--augment", "crop", "--img-size", "16", "--patch-size", "4", "--batch-size", "6"]
    flags += ["--mean", *["0.5"] * 5, "--std", *["0.3"] * 5, "--epochs", "1"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    task = tasks.create(tasks.read_settings(str(tmp_path / "run" / "config.toml")))
    valid = task.data()
    model = task.load(tmp_path / "run" / "best.safetensors", torch.device("cpu"))
    batches = [valid.collate([valid.valid[0], valid.valid[1]])]
    scores = [task.evaluate(model, batches, torch.device("cpu"), torch.float32).values for _ in range(2)]
    assert scores[0] == scores[1]


def test_layers_learn_at_their_own_rates() -> None:
    """What predicts at the full rate, each block at half of the next one's, the stem at half again."""
    kind = tasks.settings_type({"task": "pretrain"})
    settings, _ = recipe(kind, "digits-mim", {"layer_decay": 0.5, "depth": 2, "embed_dim": 16})
    task = tasks.create(settings)
    task.data()
    model, _ = task.build()
    optimizer = create_optimizer(model, task.settings, 1.0, task.layers(), task.layer_decay())
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["predict.weight"] == found["mask_pixels"] == 1
    assert found["backbone.layers.1.mixer.A_log"] / found["backbone.layers.0.mixer.A_log"] == 2
    assert found["backbone.layers.0.mixer.A_log"] / found["backbone.pos_embed"] == 2


def test_folders_without_labels(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", each=3)
    assert len(open_unlabelled(str(photos))) == 9
    assert len(open_unlabelled(str(photos / "digit 0"))) == 3
    (photos / "notes.txt").write_text("")
    assert open_unlabelled(str(photos)).passed_over == {".txt": 1}
    with pytest.raises(ValueError, match="no such folder"):
        open_unlabelled(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_unlabelled(str(tmp_path / "empty"))
    np.save(photos / "x.npy", np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="found both"):
        open_unlabelled(str(photos))


def test_published_recipes() -> None:
    """Rates for an update's images, betas, clusters that divide the patches."""
    kind = tasks.settings_type({"task": "pretrain"})
    for name in (name for name in PRESETS if task_of(name) == "pretrain"):
        settings, notes = recipe(kind, name, {})
        assert not notes
        assert settings.betas == (0.9, 0.95)
    mim: Any = recipe(kind, "mim-base", {})[0]
    assert (mim.lr, mim.lr_batch, 8 * mim.batch_size, mim.epochs) == (1.5e-4, 256, 4096, 800)
    assert (mim.mask_ratio, mim.norm_target, mim.crop_scale, mim.hflip) == (0.6, True, (0.2, 1.0), 0.5)
    ar2: Any = recipe(kind, "ar2-base", {})[0]
    assert (8 * ar2.batch_size, ar2.epochs, ar2.img_size, ar2.cluster, ar2.clip_grad) == (
        2048,
        1600,
        (192,),
        4,
        3,
    )
    assert ar2.precision == "bfloat16"
    for photographs in (mim, ar2):
        assert (photographs.warmup_epochs, photographs.weight_decay) == (40, 0.05)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--cluster", "2"], "cluster: is of objective ar2"),
        (["--betas", "0.9"], "betas: expected 2 numbers"),
        (["--mask-ratio", "0"], "masks some and leaves some of 16 patches"),
        (["--objective", "ar2", "--directions", "none"], "expected directions ssm_conv"),
        (["--stride", "4"], "patches that overlap"),
    ],
)
def test_settings_that_cannot_be(
    flags: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "digits-mim", *flags, "--out", str(tmp_path / "run")]) == 1
    assert text in capsys.readouterr().err
