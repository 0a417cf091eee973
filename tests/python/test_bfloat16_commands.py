# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on the CPU from the commands: both programs, training, evaluation, plan, doctor, health, bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_helpers
import vim_infer
import vimcore
from helpers import SMALL, build, images_for
from vimcore import _core
from vimcore.analysis.health import health
from vimcore.cli import main
from vimcore.pretraining import MaskedImages, NextPatch
from vimcore.segmentation import UperNet
from vimcore.tools import plan
from vimcore.tools.bench import Options
from vimcore.tools.bench.memory import peak_bytes
from vimcore.tools.selftest import report
from vimcore.train.in_memory import evaluate, fit


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        vim_infer.picture(40 + 3 * i, 50, i).save(folder / f"{i}.png")
    return folder


def test_both_programs_predict_the_same(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {}
    for dtype in ("float32", "bfloat16"):
        options = ("--weights", weights, "--dtype", dtype, "--json", "--logits", photos)
        lines[dtype] = vim_infer.same_as_python(capsys, "predict", *options).stdout.splitlines()
    assert lines["float32"] != lines["bfloat16"]
    for wide, narrow in zip(*lines.values(), strict=True):
        wanted, found = (np.array(json.loads(line)["logits"]) for line in (wide, narrow))
        assert 0 < np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_features_and_bench_of_vim_infer(weights: Path, photos: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.safetensors"
        assert (
            vim_infer.run("features", "--weights", weights, "--dtype", dtype, "--out", out, photos).returncode
            == 0
        )
        found[dtype] = _core.read_safetensors(out)[0]["features"]
    difference = np.linalg.norm(found["bfloat16"] - found["float32"])
    assert 0 < difference < 0.05 * np.linalg.norm(found["float32"])
    done = vim_infer.run("bench", "--weights", weights, "--dtype", "bfloat16", "--seconds", 0, "--json")
    assert json.loads(done.stdout)["dtype"] == "bf16"
    done = vim_infer.run("info", "--json")
    assert json.loads(done.stdout)["build"]["bf16"] == _core.build_info()["bf16"]


def test_segmentation(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The backbone in bfloat16, the head in float32: in C++ and, by autocast, in Python."""
    torch.manual_seed(1)
    backbone = vimcore.VisionMamba(img_size=32, patch_size=8, embed_dim=24, depth=4, num_classes=0)
    net, path = UperNet(backbone, 5, channels=16).eval(), tmp_path / "net.safetensors"
    net.save(path)
    images = torch.randn(3, 3, 32, 32)
    wide = _core.SegmentEngine(path, 2).logits(images.numpy())
    narrow = _core.SegmentEngine(path, 2, "bfloat16").logits(images.numpy())
    assert 0 < np.linalg.norm(narrow - wide) < 0.03 * np.linalg.norm(wide)
    assert np.array_equal(_core.SegmentEngine(path, 1, "bfloat16").logits(images[1:2].numpy()), narrow[1:2])
    with torch.no_grad(), torch.autocast("cpu"):
        found = net(images).float().numpy()
    assert 0 < np.linalg.norm(found - wide) < 0.03 * np.linalg.norm(wide)
    shares = []
    for options in ((), ("--dtype", "bfloat16")):
        done = vim_infer.run("segment", "--weights", path, "--json", *options, photos)
        assert done.returncode == 0
        assert main(["predict", "--weights", str(path), "--json", *options, str(photos)]) == 0
        for out in (done.stdout, capsys.readouterr().out):
            lines = [json.loads(line) for line in out.splitlines()]
            assert [sum(a["pixels"] for a in x["areas"]) for x in lines] == [
                x["width"] * x["height"] for x in lines
            ]
            shares.append({a["index"]: a["share"] for a in lines[0]["areas"]})
    for other in shares[1:]:
        assert all(abs(other.get(index, 0) - share) < 0.05 for index, share in shares[0].items())


def test_dense_networks_train_under_autocast() -> None:
    """Backbone and heads together: losses and gradients close to those in float32."""
    torch.manual_seed(1)
    backbone = vimcore.VisionMamba(img_size=32, patch_size=8, embed_dim=24, depth=4, num_classes=0)
    net, images = UperNet(backbone, 5, channels=16, head_norm="group"), torch.randn(2, 3, 32, 32)
    truth = torch.randint(5, (2, 32, 32))
    found = []
    for enabled in (False, True):
        net.zero_grad(set_to_none=True)
        torch.manual_seed(2)  # for the head's dropout
        with torch.autocast("cpu", enabled=enabled):
            logits, extra = net(images)
            loss = torch.nn.functional.cross_entropy(logits, truth) + extra.float().square().mean()
        loss.backward()
        found.append(
            (loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        )
    assert abs(found[1][0] - found[0][0]) < 0.02 * found[0][0]
    assert 0 < float((found[1][1] - found[0][1]).norm()) < 0.03 * float(found[0][1].norm())
    from detection_helpers import detector, target

    model, sums = detector(), []
    for enabled in (False, True):
        torch.manual_seed(2)
        with torch.autocast("cpu", enabled=enabled):
            losses = model.train()(
                [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3))],
                [target((2, 3, 18, 20), (10, 8, 30, 28))],
            )
        sum(losses.values()).backward()
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        sums.append(float(sum(losses.values())))
        with torch.autocast("cpu", enabled=enabled), torch.no_grad():
            assert set(model.eval()([torch.randn(3, 32, 32)])[0]) >= {"boxes", "labels", "scores"}
    assert abs(sums[1] - sums[0]) < 0.2 * sums[0]


def test_learning_without_labels_under_autocast() -> None:
    torch.manual_seed(0)
    backbone = vimcore.VisionMamba(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=0, class_token="none"
    )
    images = torch.randn(2, 3, 32, 32)
    for net in (MaskedImages(backbone), NextPatch(backbone)):
        losses = []
        for enabled in (False, True):
            torch.manual_seed(1)
            with torch.autocast("cpu", enabled=enabled):
                loss = net(images)
            loss.backward()
            losses.append(loss.item())
        assert 0 < abs(losses[1] - losses[0]) < 0.03 * losses[0]


@pytest.mark.slow
def test_training_resuming_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = train_helpers.folder(tmp_path / "digits")
    options = ["--data", str(data), "--val", str(data), *train_helpers.SMALL, *train_helpers.ONCE]
    options += ["--epochs", "4", "--precision", "bfloat16", "--device", "cpu"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(["train", *options, "--out", str(whole)]) == 0
    train_helpers.stopped(run, 7, *options)
    assert main(["train", "--resume", str(run)]) == 0
    assert train_helpers.log(run) == train_helpers.log(whole)
    assert (run / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    wide = tmp_path / "wide"
    assert main(["train", *[o if o != "bfloat16" else "float32" for o in options], "--out", str(wide)]) == 0
    losses = [[x["loss"] for x in train_helpers.log(r) if x["kind"] == "step"] for r in (wide, whole)]
    assert losses[0] != losses[1]
    assert abs(losses[0][0] - losses[1][0]) < 0.02 * losses[0][0]
    capsys.readouterr()
    scores = []
    for dtype in ("float32", "bfloat16"):
        assert main(["eval", str(whole), "--dtype", dtype, "--device", "cpu", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[0]))
    assert scores[0]["loss"] != scores[1]["loss"]
    assert abs(scores[0]["loss"] - scores[1]["loss"]) < 0.02 * scores[0]["loss"]


def test_fit_in_memory() -> None:
    images, labels = images_for(SMALL, 12, torch.float32), torch.arange(12) % 3
    losses = []
    for precision in ("float32", "bfloat16"):
        model = build(SMALL)
        history = fit(model, (images, labels), epochs=8, lr=5e-3, progress=False, precision=precision)
        losses.append(history.loss)
        assert evaluate(model, (images, labels), precision=precision).logits.dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[1][-1] < 0.5 * losses[1][0]
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16' on cpu"):
        fit(build(SMALL), (images, labels), epochs=1, precision="float16")


@pytest.mark.slow
def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "report.json", str(Path(__file__).resolve().parents[1] / "bench")
    options = ["--sizes", "32", "--batch", "1", "--pairs", "2", "--threads", "1", "--sample", "0.01"]
    options += ["--peers-dir", folder, "--json", str(file)]
    for mode, peers in (
        ([], "vimcore-float32,torch,openvino,onnxruntime"),
        (["--train", "--peak-memory"], "vimcore-float32,openvino"),
    ):
        assert main(["bench", *options, *mode, "--dtype", "bfloat16", "--peers", peers]) == 0
        found = json.loads(file.read_text())
        assert found["dtype"] == "bfloat16"
        rows = {row["peer"]: row for row in found["rows"]}
        assert rows.keys() | found["skipped"].keys() == set(peers.split(","))
        assert "vimcore-float32" in rows
        for row in rows.values():
            ours, peer = row["samples"]["ours"], row["samples"]["peer"]
            assert row["ratio"] == pytest.approx(sum(a / b for a, b in zip(ours, peer, strict=True)) / 2)
            assert row["bf16_peak_gflops"] > 0
            assert mode or 0 < row["share_of_floor"] < 1
            assert not mode or (row["peak_bytes"] > 0 and row["peer_peak_bytes"] > 0)
    assert main(["plot", str(file), "--out", str(tmp_path)]) == 0
    assert main(["bench", *options, "--peers", "vimcore-float32"]) == 0
    assert "is measured beside 16 bits" in capsys.readouterr().err


@pytest.mark.slow
def test_digits_script_goes_on(tmp_path: Path) -> None:
    """tests/bench/digits_bf16.py: one run in each type, not made again; the status follows from the means."""
    file = Path(__file__).resolve().parents[1] / "bench" / "digits_bf16.py"
    options = [sys.executable, str(file), "--epochs", "1", "--out", str(tmp_path)]
    first = subprocess.run([*options, "--seeds", "0"], capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "digits-bf16.json").read_text())
    assert [(run["dtype"], run["seed"]) for run in report["runs"]] == [("float32", 0), ("bfloat16", 0)]
    assert report["runs"][0]["loss"] != report["runs"][1]["loss"]
    lost = report["mean"]["float32"] - report["mean"]["bfloat16"]
    assert first.returncode == int(lost > report["allowed_loss"]), first.stderr
    again = subprocess.run([*options, "--seeds", "0"], capture_output=True, text=True, check=False)
    assert "[1/" in first.stderr
    assert "[1/" not in again.stderr
    assert again.stdout == first.stdout == (tmp_path / "digits-bf16.md").read_text()


def test_wrong_types(weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = vim_infer.run("predict", "--weights", weights, "--dtype", "float16", photos)
    assert done.returncode == 1
    assert "dtype: expected f32 or bf16 on cpu, got f16" in done.stderr
    assert vim_infer.run("predict", "--weights", weights, "--dtype", "int8", photos).returncode == 2
    for command in (["predict", "--weights", str(weights)], ["eval", str(weights), "--data"]):
        assert main([*command, str(photos), "--dtype", "float16", "--device", "cpu"]) == 1
        assert "expected 'float32' or 'bfloat16' on cpu, got 'float16'" in capsys.readouterr().err


def test_without_a_unit_the_binary_says_so(weights: Path, photos: Path) -> None:
    """Where nobody names kernels, which would be emulated: by the unit, or an error."""
    environment = {key: value for key, value in os.environ.items() if key != "VIMCORE_ISA"}
    unit = json.loads(vim_infer.run("info", "--json", env=environment).stdout)["build"]["bf16"]
    done = vim_infer.run("predict", "--weights", weights, "--dtype", "bfloat16", photos, env=environment)
    assert unit != "emulated"
    assert done.returncode == (0 if unit else 1)
    assert unit or "float32, or VIMCORE_ISA=" in done.stderr


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"img_size": [224, 224], "embed_dim": 192}
    for mode in plan.MODES:
        wide, narrow = (sum(plan.needed(config, 8, mode, "cpu", t).values()) for t in ("float32", "bfloat16"))
        assert narrow < wide
    assert main(["plan", "--dtype", "bfloat16", "--json", "--batch", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["device"], row["dtype"]) for row in rows} == {("cpu", "bfloat16"), ("cuda", "bfloat16")}
    assert main(["plan", "--dtype", "float16", "--json", "--batch", "1"]) == 0
    assert {row["device"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"cuda"}


def test_what_is_planned_is_what_is_saved() -> None:
    from vimcore.autograd.network import Request

    model, images = build(SMALL), images_for(SMALL, 5, torch.bfloat16)
    core, params = model._weights()
    for memory in ("least", "lean", "fast"):
        saved = core.network.saved(memory, _core.Place())
        core.run(Request("logits"), images, params, saved)
        assert plan.needed(model.config, 5, f"training, {memory}", "cpu", "bfloat16")["saved"] == saved.bytes


@pytest.mark.slow
def test_memory_of_a_large_image() -> None:
    """Weights in one type and images as they are: at most 0.6 of float32's memory at 1248 px."""
    sizes = {
        dtype: peak_bytes(Options(threads=2, dtype=dtype), None, 1248, 1, None, runtime=True) or 0
        for dtype in ("float32", "bfloat16")
    }
    assert 40e6 < sizes["bfloat16"] < 0.6 * sizes["float32"]


def test_plan_of_inference_counts_weights_once() -> None:
    config = {"embed_dim": 192, "img_size": (1248, 1248)}
    wide, narrow = (plan.needed(config, 1, "inference", "cpu", t, 2) for t in ("float32", "bfloat16"))
    assert wide["packed"] == wide["weights"]
    assert narrow["packed"] == 0
    assert narrow["weights"] < 0.65 * wide["weights"]  # tables of positions stay as they are
    assert narrow["images"] == wide["images"] == 3 * 1248**2 * 4
    assert sum(narrow.values()) < 0.6 * sum(wide.values())
    training = plan.needed(config, 1, "training, lean", "cpu", "bfloat16")
    assert training["weights"] == wide["weights"]


@pytest.mark.slow
def test_doctor() -> None:
    facts = report()
    assert facts["build"]["bf16"] == vimcore.build_info()["bf16"]
    rows = {row["check"]: row for row in facts["checks"]}
    here = vimcore.build_info()["isa"]
    for isa in vimcore.build_info()["isas"]:
        if rows[f"kernels {isa}"]["status"] == "ok":
            assert rows[f"kernels {isa} bfloat16"]["status"] == "ok"
            assert rows[f"kernels {isa}"]["error"] < 1e-5 < rows[f"kernels {isa} bfloat16"]["error"]
    assert f"kernels {here} bfloat16" in rows
    assert rows["gradients cpu bfloat16"]["status"] == "ok"


def test_health_also_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build(SMALL), images_for(SMALL, 3, torch.float32)
    found = health(model, images)
    rounded = found.precisions["bfloat16"]
    assert rounded.computed is not None
    assert 0.3 * rounded.error < rounded.computed < 3 * rounded.error
    assert found.precisions["float16"].computed is None
    assert "% as computed here" in str(found)
    assert model.training  # as it was
    monkeypatch.setattr("vimcore._core.bf16_refusal", lambda: "no unit")
    assert health(model, images).precisions["bfloat16"].computed is None
