# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval`: figures against numpy, runs and files, other sizes and strides, other classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from train_helpers import ONCE, SMALL, folder
from vimcore import _core
from vimcore.cli import main
from vimcore.io import load_model, save_model
from vimcore.results import softmax
from vimcore.tasks.classification.evaluation import Outputs, ranks_of
from vimcore.tasks.classification.predictions import Predictions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with averaged weights, validated on what it learns from."""
    path = tmp_path_factory.mktemp("run") / "run"
    arguments = ["--data", str(data), "--val", str(data), *SMALL, *ONCE, "--epochs", "3", "--augment", "none"]
    flags = ["--lr", "5e-3", "--no-scale-lr", "--warmup-epochs", "0", "--ema", "0.8"]
    assert main(["train", *arguments, *flags, "--out", str(path)]) == 0
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json", "--workers", "0"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw, averaged and best weights, against the runtime without torch on the same files."""
    found = evaluate(capsys, run, "--out", tmp_path / "eval.npz", "--batch-size", "5")
    assert [Path(f["weights"]).name for f in found] == [
        "last.safetensors",
        "last_ema.safetensors",
        "best.safetensors",
    ]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = {line["weights"]: line for line in logged if line["kind"] == "eval"}
    names = sorted(data.rglob("*.png"))
    labels = np.array([int(name.parent.name[-1]) for name in names])
    for facts in found:
        runtime = vimcore.Runtime(facts["weights"])
        steps = _core.Preprocess(**runtime.preprocess)
        inputs = [_core.preprocess_image(name.read_bytes(), name.name, steps) for name in names]
        logits = runtime(np.stack(inputs))
        classes = np.array([int(label[-1]) for label in runtime.labels])
        right = classes[logits.argmax(1)] == labels
        assert facts["top1"] == pytest.approx(right.mean())
        assert (facts["images"], facts["skipped"], facts["top5"]) == (36, 0, 1.0)
        place = {int(digit): i for i, digit in enumerate(classes)}
        loss = [-np.log(softmax(z)[place[int(y)]]) for z, y in zip(logits, labels)]
        assert facts["loss"] == pytest.approx(np.mean(loss), rel=1e-4)
        confusion = np.array(facts["confusion"])
        assert confusion.sum() == 36
        assert np.trace(confusion) == right.sum()
        assert facts["per_class"]["digit 7"] == pytest.approx(right[labels == 7].mean())
        assert facts["images_per_second"] > 0
    assert found[0]["top1"] == last["raw"]["top1"]
    assert found[1]["loss"] == pytest.approx(last["ema"]["loss"])
    assert found[2]["top1"] == max(line["top1"] for line in logged if line["kind"] == "eval")
    saved, written = np.load(tmp_path / "eval.npz"), np.load(run / "eval.npz")
    assert (
        set(saved.files) == set(written.files) == {"labels", "predictions", "probabilities", "names", "files"}
    )
    assert (saved["labels"] == saved["predictions"]).mean() == max(f["top1"] for f in found)


def test_tables(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run / "best.safetensors"), "--data", str(data), "--threads", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("top-1", "images/s", "most taken for", "digit 7", "confusion: rows true, columns predicted"):
        assert part in out


def test_the_best_of_several_is_shown(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever their order: its name stands over the classes, its answers are written."""
    best, worse = run / "best.safetensors", tmp_path / "worse.safetensors"
    model = load_model(best)
    torch.nn.init.zeros_(model.head.weight)  # one class for every picture
    model.save(worse, labels=vimcore.Runtime(best).labels)
    for order in ((best, worse), (worse, best)):
        out = tmp_path / "out.npz"
        command = ["eval", *map(str, order), "--data", str(data), "--workers", "0", "--out", str(out)]
        assert main(command) == 0
        assert f"\n\n{best}\n" in capsys.readouterr().out
        assert len(set(np.load(out)["predictions"].tolist())) > 1


def test_other_size_and_stride(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "best.safetensors"
    (facts,) = evaluate(capsys, weights, "--data", data, "--img-size", "24", "32")
    runtime = vimcore.Runtime(weights, img_size=(24, 32))
    names = sorted(data.rglob("*.png"))
    steps = _core.Preprocess(**runtime.preprocess)
    logits = runtime(np.stack([_core.preprocess_image(n.read_bytes(), n.name, steps) for n in names]))
    labels = [f"digit {n.parent.name[-1]}" for n in names]
    right = [runtime.labels[i] == label for i, label in zip(logits.argmax(1), labels)]
    assert facts["top1"] == pytest.approx(np.mean(right))
    (strided,) = evaluate(capsys, weights, "--data", data, "--stride", "4")
    assert strided["images"] == 36
    model = load_model(weights, stride=4)
    assert (model.config["stride"], model.pos_embed.shape[1]) == (4, 10)
    wanted = vimcore.io.resize_pos_embed(load_model(weights).pos_embed.detach(), (2, 2), (3, 3), "middle")
    assert torch.equal(model.pos_embed.detach(), wanted)


def test_classes_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of the classes are enough; one that the network lacks is an error."""
    some = folder(tmp_path / "some", digits=(7,))
    (facts,) = evaluate(capsys, run / "best.safetensors", "--data", some)
    assert facts["per_class"]["digit 7"] == facts["top1"]
    assert facts["per_class"]["digit 0"] is None
    folder(tmp_path / "more", digits=(7, 8), each=2)
    assert main(["eval", str(run), "--data", str(tmp_path / "more")]) == 1
    assert "classes that the network does not have: digit 8; it has digit 0" in capsys.readouterr().err


def test_weights_without_names(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vimcore.VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=1, num_classes=3)
    save_model(model, tmp_path / "m.safetensors")
    (facts,) = evaluate(capsys, tmp_path / "m.safetensors", "--data", data)
    assert facts["images"] == 36
    model.reset_classifier(4)
    save_model(model, tmp_path / "m.safetensors")
    for arguments, message in (
        (
            [str(tmp_path / "m.safetensors"), "--data", str(data)],
            "4 classes without names, the images have 3",
        ),
        ([str(tmp_path / "m.safetensors")], "data: name a folder"),
        ([str(tmp_path)], "no weights of a run"),
        ([str(tmp_path / "absent.safetensors"), "--data", str(data)], "absent.safetensors"),
        (
            [str(tmp_path / "m.safetensors"), "--data", str(data), "--img-size", "0"],
            "img_size: expected at least 1",
        ),
        ([str(tmp_path / "m.safetensors"), "--data", str(data), "--batch-size", "0"], "batch_size: expected"),
    ):
        assert main(["eval", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_figures() -> None:
    """Six images of three classes, one class without any; ties go to the first class, nan is never right."""
    scores = torch.tensor(
        [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]
    )
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert ranks_of(scores, labels).tolist() == [0, 2, 0, 1, 1, 1]
    assert ranks_of(torch.full((1, 3), torch.nan), torch.tensor([0])).tolist() == [3]
    outputs = Outputs(labels.numpy(), np.arange(6), scores.numpy(), np.ones(6), 1.0, {})
    assert outputs.accuracy().top1 == pytest.approx(2 / 6)
    found = Predictions(labels.numpy(), scores.argmax(1).numpy(), scores.numpy(), ["a", "b", "c"], [""] * 6)
    assert found.confusion().tolist() == [[2, 1, 0], [2, 0, 1], [0, 0, 0]]
    rows = found.per_class()
    assert rows[0] == ("a", 3, pytest.approx(2 / 3), "b (1)")
    assert rows[1] == ("b", 3, 0.0, "a (2)")
    assert rows[2][:2] == ("c", 0)
    assert np.isnan(rows[2][2])
