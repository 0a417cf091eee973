# SPDX-License-Identifier: Apache-2.0
"""Runs of segmentation from the command line: trained, resumed, in two processes, evaluated, drawn, used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from report_checks import read_report
from train_helpers import environment, log, stopped
from vimcore import _core
from vimcore.cli import main
from vimcore.data.masks import IGNORE
from vimcore.data.scenes import CLASSES, PALETTE, Scenes
from vimcore.segmentation import FCN, Segmenter, UperNet, load
from vimcore.tasks.segmentation.answers import confusion, figures, read_answers
from vimcore.tasks.segmentation.loss import loss_of_heads

pytestmark = pytest.mark.slow

TINY = ["--preset", "digits-scenes", "--embed-dim", "16", "--depth", "2", "--head-channels", "8"]
TINY += ["--scenes", "32", "--epochs", "2", "--track", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("segment") / "run"
    assert main(["train", *TINY, "--out", str(path)]) == 0
    return path


def same_files(first: Path, second: Path) -> None:
    for name in ("best", "last", "last_ema"):
        a, b = (_core.read_safetensors(str(path / f"{name}.safetensors"))[0] for path in (first, second))
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert np.array_equal(value, b[key]), (name, key)


def test_a_run_resumed_is_the_same_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """Statistics of BatchNorm and averaged weights included."""
    again = stopped(tmp_path / "again", 5, *TINY)
    assert main(["train", "--resume", str(again)]) == 0
    same_files(run, again)
    assert log(run) == log(again)
    lines = log(run)
    assert {line["weights"] for line in lines if line["kind"] == "eval"} == {"raw", "ema"}
    assert all(0 < line["miou"] < 1 for line in lines if line["kind"] == "eval")
    first, second = (read_answers(path / "eval.npz") for path in (run, again))
    assert (first.counts == second.counts).all()


def test_a_short_run_of_the_recipe_learns(tmp_path: Path) -> None:
    """Twenty seconds find the ink: who only knows how frequent classes are has a loss of 0.77 or more."""
    flags = ["--preset", "digits-scenes", "--scenes", "800", "--epochs", "1", "--log-every", "1"]
    assert main(["train", *flags, "--ema", "0", "--track", "none", "--out", str(tmp_path / "run")]) == 0
    losses = [line["loss"] for line in log(tmp_path / "run") if line["kind"] == "step"]
    assert len(losses) == 200
    assert np.mean(losses[:10]) > 1
    assert np.mean(losses[-100:]) < 0.69


def test_evaluation(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the log, of eval.npz, of `vimcore eval` and by hand: the same figures."""
    best = run / "best.safetensors"
    out = tmp_path / "answers.npz"
    assert main(["eval", str(run), "--workers", "0", "--json", "--out", str(out)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    evals = [line for line in log(run) if line["kind"] == "eval"]
    by_weights = {line["weights"]: line["miou"] for line in evals if line["epoch"] == 2}
    assert found[0]["miou"] == pytest.approx(by_weights["raw"], abs=1e-12)
    assert found[1]["miou"] == pytest.approx(by_weights["ema"], abs=1e-12)
    answers = read_answers(run / "eval.npz")
    assert found[2]["miou"] == answers.figures().miou == max(line["miou"] for line in evals)
    assert list(answers.names) == list(CLASSES)
    assert [list(colour) for colour in answers.palette] == [list(colour) for colour in PALETTE]
    assert len(answers.miou) == 200
    assert (
        list(answers.miou[[one.index for one in answers.worst]]) == sorted(answers.miou)[: len(answers.worst)]
    )

    model, counts = load(best), np.zeros((11, 11), np.int64)
    steps = model.preprocess
    assert steps is not None
    for index in range(200):
        scene = Scenes(held_out=True).draw(index)
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (steps.mean, steps.std))
        with torch.no_grad():
            classes = model((pixels - mean) / std)[0].argmax(0).numpy().astype(np.uint8)
        counts += confusion(scene.mask, classes, 11)
    assert abs(counts - answers.counts).sum() <= 4  # pixels between two classes
    assert figures(counts).miou == pytest.approx(answers.figures().miou, abs=1e-4)

    assert main(["eval", str(best), "--data", "digits-scenes", "--workers", "0"]) == 0
    table = capsys.readouterr().out
    assert f"{100 * answers.figures().miou:.2f} %" in table
    assert "confusion" in table
    flags = ["--img-size", "24", "--whole"]
    assert main(["eval", str(best), "--data", "digits-scenes", "--workers", "0", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 200
    for flags, told in ((["--stride", "2"], "stride"), ([], "there is no run to ask")):
        alone = tmp_path / "alone.safetensors"
        alone.write_bytes(best.read_bytes())
        assert main(["eval", str(alone), *flags]) == 1
        assert told in capsys.readouterr().err


def test_figures_are_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--out", str(tmp_path), "--mistakes", "3", "--format", "html"]) == 0
    report = read_report(tmp_path / "report.html")
    assert report.headings[:4] == ["Training", "Classes", "Confusion", "Worst images"]
    assert len(report.pictures) == 4 + 3 * 4
    (tmp_path / "report.html").unlink()
    capsys.readouterr()
    assert main(["plot", str(run), "--out", str(tmp_path), "--mistakes", "3"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert [Path(name).name for name in written] == ["curves.png", "confusion.png", "worst.png"]
    sizes = [Image.open(name).size for name in written]
    assert all(min(size) > 300 for size in sizes)


def test_pictures_of_any_size_get_masks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Index PNG, overlay, areas: of a picture of the training size, a larger, a smaller, a damaged one."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    scene = Scenes(held_out=True).draw(0)
    for name, size in (("same", (48, 48)), ("larger", (101, 70)), ("smaller", (31, 20))):
        Image.fromarray(scene.image).resize(size).save(pictures / f"{name}.png")
    (pictures / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    (pictures / "notes.txt").write_text("x")
    weights = str(run / "best.safetensors")
    assert main(["predict", "--weights", weights, str(pictures), "--out", str(out), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "error" in lines[0]
    assert lines[-1]["passed_over"] == {".txt": 1}
    for line, size in zip(lines[1:], ((101, 70), (48, 48), (31, 20))):
        assert (line["width"], line["height"]) == size
        with Image.open(line["mask"]) as mask:
            assert mask.mode == "P"
            assert mask.size == size
            indices = np.asarray(mask)
            assert mask.getpalette()[:33] == [value for colour in PALETTE for value in colour]
        counts = np.bincount(indices.ravel(), minlength=11)
        assert {a["index"]: a["pixels"] for a in line["areas"]} == {
            int(k): int(counts[k]) for k in np.flatnonzero(counts)
        }
        assert [a["pixels"] for a in line["areas"]] == sorted(counts[counts > 0], reverse=True)
        assert all(a["label"] == CLASSES[a["index"]] for a in line["areas"])
        assert sum(a["share"] for a in line["areas"]) == pytest.approx(1, abs=1e-5)
        with Image.open(line["overlay"]) as overlay:
            assert overlay.size == size
    twice = [str(pictures / "same.png"), str(pictures / "same.png")]
    assert main(["predict", "--weights", weights, *twice, "--out", str(tmp_path / "twice"), "--json"]) == 1
    assert "the result of one" in capsys.readouterr().out.splitlines()[1]
    assert main(["predict", "--weights", weights, twice[0], "--logits"]) == 1
    assert "logits" in capsys.readouterr().err


def test_runs_begin_with_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    """All of them for the same classes and head, else those of the backbone."""
    best = str(run / "best.safetensors")
    flags = [*TINY, "--epochs", "1", "--init", best, "--lr", "1e-9"]
    assert main(["train", *flags, "--out", str(tmp_path / "all")]) == 0
    begun, given = (
        _core.read_safetensors(str(path))[0] for path in (tmp_path / "all" / "last.safetensors", best)
    )
    assert np.allclose(begun["decode_head.conv_seg.weight"], given["decode_head.conv_seg.weight"], atol=1e-6)
    assert main(["train", *flags, "--head-channels", "12", "--out", str(tmp_path / "backbone")]) == 0
    other = _core.read_safetensors(str(tmp_path / "backbone" / "last.safetensors"))[0]
    name = "backbone.layers.1.mixer.in_proj.weight"
    assert np.allclose(other[name], given[name], atol=1e-6)
    assert other["decode_head.conv_seg.weight"].shape[1] == 12


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """On gloo, with statistics that need no other images; every validation scene counts once."""
    common = [*TINY, "--head-norm", "group", "--log-every", "1", "--epochs", "1", "--head-dropout", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *common, "--batch-size", "16", "--out", str(one)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["vimcore", "train", *common, "--batch-size", "8", "--out", str(two)]
    done = subprocess.run(
        launch + arguments, capture_output=True, text=True, check=False, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, 16 images an update" in done.stderr
    lines = [[line for line in log(path) if line["kind"] in ("step", "eval")] for path in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 2 + 2
    for a, b in zip(*lines):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key
    assert read_answers(two / "eval.npz").counts.sum() == read_answers(one / "eval.npz").counts.sum()


def test_an_index_beyond_the_classes_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence that names file and value, also from the processes that load."""
    for part, value in (("train", 1), ("val", 7)):
        for folder, array in (("images", np.zeros((16, 16, 3))), ("masks", np.full((16, 16), value))):
            (tmp_path / part / folder).mkdir(parents=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / part / folder / "a.png")
    flags = ["--task", "segment", "--preset", "digits-scenes", "--data", str(tmp_path), "--img-size", "16"]
    flags += ["--patch-size", "8", "--embed-dim", "8", "--depth", "1", "--batch-size", "1", "--epochs", "1"]
    flags += ["--head-norm", "group", "--workers", "1", "--track", "none", "--head-channels", "4"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/val/masks/a.png: holds class index 7, expected 0 to 1" in error
    assert "Traceback" not in error


# ---- without the engine ------------------------------------------------------------------------------------


def backbone(side: int, patch: int, depth: int = 1) -> vimcore.VisionMamba:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 32, "depth": depth, "d_state": 4, "memory": "fast"}
    return vimcore.VisionMamba(side, patch, num_classes=0, class_token="none", **small)


def by_heart(model: Any, drawn: Scenes, steps: int, rate: float = 1e-2) -> float:
    """The mIoU of eight scenes that were learnt so often, the rate falling in the second half."""
    scenes = [drawn.draw(seed) for seed in range(8)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2) / 64 - 2
    masks = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 - 2 * step / steps)
        loss, _ = loss_of_heads(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(images).argmax(1).numpy().astype(np.uint8)
    return figures(confusion(masks.numpy(), found, 11)).miou


def test_eight_scenes_are_learnt_by_heart() -> None:
    """mIoU over 0.98, so that no pixel is out of reach of gradients or resizing."""
    model = FCN(backbone(32, 2), 11, channels=32, dropout=0.0)
    model.decode_head.conv_seg.reset_parameters()
    assert by_heart(model, Scenes(side=32, count=(1, 1)), 150) > 0.98


def test_eight_scenes_are_learnt_by_heart_through_the_neck() -> None:
    """UPerNet's logits are 4 pixels apart, so that strokes have to be wider than on scenes of 48 pixels."""
    model = UperNet(backbone(96, 4, depth=4), 11, channels=32, dropout=0.0)
    for head in (model.decode_head, model.auxiliary_head):
        head.conv_seg.reset_parameters()
    assert by_heart(model, Scenes(side=96, count=(1, 1), size=(0.6, 0.75)), 200) > 0.98


@pytest.mark.slow
def test_eight_scenes_are_learnt_by_heart_by_a_segmenter() -> None:
    """At a lower rate, as a transformer wants it; logits a patch apart leave the edges of strokes blurred."""
    model = Segmenter(backbone(64, 4), 11, dropout=0.0)
    assert by_heart(model, Scenes(side=64, count=(1, 1), size=(0.6, 0.75)), 150, 4e-3) > 0.9


def test_one_image_one_class_no_pixel_that_counts() -> None:
    model = FCN(backbone(48, 4), 1, channels=8)
    images = torch.randn(1, 3, 48, 48)
    for value in (0, IGNORE):
        model.zero_grad()
        loss, _ = loss_of_heads(model(images), torch.full((1, 48, 48), value, dtype=torch.uint8))
        loss.backward()
        assert loss.item() == 0
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and bool(g.isfinite().all()) for g in grads)
