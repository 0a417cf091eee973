# SPDX-License-Identifier: Apache-2.0
"""Reports of runs and evaluations as HTML: one sound file, with figures of the run, nothing from a network.

Those of other tasks than classification are tested with their runs; tests/browser opens some in a browser.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from report_checks import read_report
from train_helpers import ONCE, SMALL, folder
from vimcore.cli import main
from vimcore.tasks.classification.predictions import Predictions, read_predictions

NAMES = ["cat", "<script>alert(1)</script>", 'dog & "fox"', "\u00fcber \U0001f600", "tab\t\x01"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on pictures, of which one was skipped."""
    root = tmp_path_factory.mktemp("report")
    photos = folder(root / "photos", each=12)
    (photos / "digit 1" / "cut & <b>.png").write_bytes(b"\x89PNG")
    arguments = [
        "--data",
        str(photos),
        *SMALL,
        *ONCE,
        "--epochs",
        "2",
        "--val-fraction",
        "0.3",
        "--lr",
        "1e-3",
    ]
    assert main(["train", *arguments, "--ema", "0.9", "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.mark.slow
def test_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--format", "html", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": [str(tmp_path / "report.html")]}
    report = read_report(tmp_path / "report.html")
    answers = read_predictions(run / "eval.npz")
    assert report.headings[:5] == ["Training", "Classes", "Confusion", "Mistakes", "Settings"]
    assert report.headings[5:] == ["Notes"]
    wrong = int((answers.labels != answers.predictions).sum())
    assert report.pictures == ["svg"] * 4 + ["png"] * min(wrong, 24)
    assert f"{100 * (1 - wrong / len(answers.labels)):.2f} %" in report.text
    counts = [row for row in report.cells if row[:1] and row[0].startswith("digit")]
    held_out = np.bincount(answers.labels, minlength=3)
    learnt = {row[0]: int(row[1]) for row in counts[:3]}
    total = {"digit 0": 12, "digit 1": 13, "digit 7": 12}
    for i, name in enumerate(answers.names):
        assert counts[i][:1] == [name]
        assert int(counts[i][2]) == held_out[i]
        assert abs(learnt[name] + held_out[i] - total[name]) <= 1  # one of digit 1 cannot be read
        matrix = counts[3 + i][1:]
        assert [int(cell or 0) for cell in matrix] == answers.confusion()[i].tolist()
    assert ["lr", "0.001"] in [row[:2] for row in report.cells]
    assert any(row[:1] == ["seed"] or row[1:2] == ["seed"] for row in report.cells)


@pytest.mark.slow
def test_of_several_runs_and_of_one_that_is_not_done(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.toml", "log.jsonl"):
        (other / name).write_bytes((run / name).read_bytes())
    assert main(["plot", str(run), str(other), "--format", "html", "--out", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["other-report.html", "run-report.html"]
    assert "no eval.npz yet" in capsys.readouterr().err
    assert read_report(tmp_path / "out" / "other-report.html").headings[:2] == ["Training", "Settings"]
    assert main(["plot", str(tmp_path), "--format", "html"]) == 1
    assert "no run: neither log.jsonl nor eval.npz is there" in capsys.readouterr().err


@pytest.mark.slow
def test_of_an_evaluation(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["eval", str(run), "--workers", "0", "--threads", "1", "--html", str(page)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:4]
    report = read_report(page)
    assert report.headings == ["Weights", "Classes", "Confusion", "Mistakes"]
    table = [row for row in report.cells if row and row[0].endswith(".safetensors")]
    assert [row[0] for row in table] == [row.split("  ")[0] for row in rows]
    assert "svg" not in report.pictures
    for name, said in (
        ("page.txt", "html: expected a name that ends with .html"),
        ("no/page.html", "cannot write"),
    ):
        assert main(["eval", str(run), "--html", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    """Classes and files that look like HTML, pictures that are not there, a class that nothing belongs to."""
    labels = np.array([0, 1, 2, 3, 0])
    probabilities = np.full((5, 5), 0.2, np.float32)
    files = ["<img src=x onerror=alert(1)>.png", str(tmp_path / "gone.png"), "", "\udcff.png", "a&b.png"]
    Predictions(labels, np.array([1, 1, 0, 0, 0]), probabilities, NAMES, files).save(tmp_path / "eval.npz")
    assert main(["plot", str(tmp_path), "--format", "html"]) == 0
    report = read_report(tmp_path / "report.html")
    assert "<script>alert(1)</script>, 20 %" in report.text
    assert "<img src=x onerror=alert(1)>.png" in report.text
    assert "No such file" in report.text
    assert 'dog & "fox"' in report.text
    assert "tab\\t\\x01" in report.text
    assert report.headings == ["Classes", "Confusion", "Mistakes"]


def test_many_classes(tmp_path: Path) -> None:
    """A thousand: the worst in sight, all on demand, no matrix of a million cells."""
    labels = np.arange(1000).repeat(2)
    said = np.where(np.arange(2000) % 7 == 0, (labels + 1) % 1000, labels)
    probabilities = np.zeros((2000, 1000), np.float32)
    probabilities[np.arange(2000), said] = 1
    names = [f"class {i}" for i in range(1000)]
    Predictions(labels, said, probabilities, names, [""] * 2000).save(tmp_path / "eval.npz")
    assert main(["plot", str(tmp_path), "--format", "html", "--mistakes", "5"]) == 0
    report = read_report(tmp_path / "report.html")
    assert "all 1000 classes" in report.text
    assert len([row for row in report.cells if row[0].startswith("class ")]) == 1030
    assert f"{int((labels != said).sum())} of 2000 images, the 5 that gave the truth least." in report.text
    assert (tmp_path / "report.html").stat().st_size < 1 << 20


def test_without_mistakes(tmp_path: Path) -> None:
    labels = np.array([0, 1])
    probabilities = np.eye(2, dtype=np.float32)
    Predictions(labels, labels, probabilities, ["a", "b"], ["", ""]).save(tmp_path / "eval.npz")
    assert main(["plot", str(tmp_path), "--format", "html"]) == 0
    report = read_report(tmp_path / "report.html")
    assert report.headings[-1] == "Least sure answers"
    assert "no mistakes among 2 images" in report.text
    assert (tmp_path / "report.html").read_bytes() == _again(tmp_path)


def _again(run: Path) -> bytes:
    assert main(["plot", str(run), "--format", "html"]) == 0
    return (run / "report.html").read_bytes()


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval.npz").write_bytes(b"no archive")
    assert main(["plot", str(tmp_path), "--format", "html"]) == 1
    assert "eval.npz: not the answers of a run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "bench.json").write_text("{}")
    assert main(["plot", str(tmp_path / "bench.json"), "--format", "html"]) == 1
    assert "format: html is for runs" in capsys.readouterr().err
