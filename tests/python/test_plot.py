# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs: what is read, what is drawn, what is said about files that are none."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from vimcore import _core
from vimcore.cli import main
from vimcore.data.digits import encode_png, load_digits, split_digits
from vimcore.plots import curves
from vimcore.plots import runs as run_plots
from vimcore.train.log import read_log

SVG = "{http://www.w3.org/2000/svg}"


def write_log(path: Path, epochs: int = 3, per_epoch: int = 10, ema: bool = True, norm: bool = True) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, epochs * per_epoch + 1):
        epoch = step / per_epoch
        entry = {"kind": "step", "step": step, "epoch": epoch, "loss": 2 / epoch, "lr": 1e-3 * epoch}
        lines.append({**entry, "images_per_second": 100.0, "grad_norm": 1.5 if norm else None})
        if step % per_epoch == 0:
            for weights in ("raw", "ema") if ema else ("raw",):
                top = min(0.2 * epoch + 0.1 * (weights == "ema"), 1.0)
                entry = {"kind": "eval", "epoch": epoch, "step": step, "loss": 1 / epoch, "top1": top}
                lines.append({**entry, "top5": min(top + 0.2, 1), "weights": weights})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_answers(path: Path, pictures: list[str] | None = None, wrong: int = 5, **changes: Any) -> None:
    """The held-out digits; the first `wrong` of them taken for the next digit, less and less surely."""
    labels = load_digits()[1]
    labels = labels[split_digits(labels)[1]] if pictures is None else np.arange(len(pictures)) % 10
    predictions = labels.copy()
    predictions[:wrong] = (labels[:wrong] + 1) % 10
    probabilities = np.full((len(labels), 10), 0.01, np.float32)
    probabilities[np.arange(len(labels)), labels] = 0.91
    for i in range(wrong):
        probabilities[i, labels[i]], probabilities[i, predictions[i]] = 0.05 + 0.01 * i, 0.87 - 0.01 * i
    arrays = {
        "labels": labels,
        "predictions": predictions,
        "probabilities": probabilities,
        "names": np.array([f"digit {i}" for i in range(10)]),
        "files": np.array([""] * len(labels) if pictures is None else pictures),
    }
    with open(path, "wb") as file:
        np.savez(file, **{**arrays, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    write_log(folder / "log.jsonl")
    write_answers(folder / "eval.npz")
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by the names of their files, which are written as well."""
    found: dict[str, Figure] = {}
    save = run_plots.save_figure

    def keep(figure: Figure, path: Path) -> None:
        found[path.stem] = figure
        save(figure, path)

    for module in (run_plots, curves):
        monkeypatch.setattr(module, "save_figure", keep)
    return found


def texts(figure: Figure) -> list[str]:
    found = [t.get_text() for axes in figure.axes for t in (*axes.texts, axes.title)]
    return [t for t in found if t] + [figure.get_suptitle()]


# ---- one run and several -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run)]) == 0
    out, error = capsys.readouterr()
    names = ("curves.png", "confusion.png", "mistakes.png")
    assert out.splitlines() == [str(run / name) for name in names]
    assert error == ""
    first = {name: (run / name).read_bytes() for name in names}
    for name, data in first.items():
        picture = _core.decode_image(data, name)
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10
    assert main(["plot", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in names} == first
    assert sorted(p.name for p in run.iterdir()) == sorted([*names, "log.jsonl", "eval.npz"])


@pytest.mark.slow
def test_several_runs_as_svg(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second, out = tmp_path / "second", tmp_path / "pictures"
    second.mkdir()
    write_log(second / "log.jsonl", ema=False)
    assert main(["plot", str(run), str(second), "--out", str(out), "--format", "svg", "--json"]) == 0
    printed, error = capsys.readouterr()
    names = ["curves.svg", "first-confusion.svg", "first-mistakes.svg"]
    assert json.loads(printed) == {"written": [str(out / name) for name in names]}
    assert error == f"vimcore: {second}: no eval.npz yet, so only its curves are drawn\n"
    for name in names:
        root = ET.parse(out / name).getroot()
        assert root.tag == f"{SVG}svg"
        assert len(list(root.iter(f"{SVG}path"))) > 20
    before = (out / "curves.svg").read_bytes()
    assert main(["plot", str(run), str(second), "--out", str(out), "--format", "svg"]) == 0
    assert (out / "curves.svg").read_bytes() == before


@pytest.mark.slow
def test_runs_of_the_same_name(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        write_answers(tmp_path / parent / "run" / "eval.npz")
    written, notes = run_plots.plot_runs([str(tmp_path / p / "run") for p in "ab"], str(tmp_path / "out"))
    assert len({Path(name).name for name in written}) == 4
    assert notes == []
    with pytest.raises(ValueError, match="named twice"):
        run_plots.plot_runs([str(tmp_path / "a" / "run")] * 2, str(tmp_path / "out"))


@pytest.mark.slow
def test_it_needs_no_torch(run: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\nfrom vimcore.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "plot", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- curves ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_curves_show(run: Path, figures: dict[str, Figure]) -> None:
    run_plots.plot_runs([str(run)])
    loss, accuracy, rate, norm = figures["curves"].axes
    steps = read_log(run / "log.jsonl").steps
    train, *held_out = loss.lines
    np.testing.assert_allclose(train.get_xydata(), np.stack([steps["epoch"], steps["loss"]], 1))
    assert [line.get_linestyle() for line in held_out] == ["-", "--"]
    np.testing.assert_allclose(held_out[0].get_ydata(), [1, 1 / 2, 1 / 3])
    top = {tuple(np.round(line.get_ydata(), 6)) for line in accuracy.lines}
    assert {(20, 40, 60), (30, 50, 70), (40, 60, 80), (50, 70, 90), (70,)} == top  # top-1, top-5, best
    assert "70.00 %" in texts(figures["curves"])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), steps["lr"])
    assert norm.get_title(loc="left") == "gradient norm"
    legend = [t.get_text() for t in loss.get_legend().get_texts()]
    assert legend == ["training", "held out", "held out, averaged weights"]


@pytest.mark.slow
def test_long_logs_are_averaged(tmp_path: Path, figures: dict[str, Figure]) -> None:
    (tmp_path / "run").mkdir()
    write_log(tmp_path / "run" / "log.jsonl", epochs=7, per_epoch=143, norm=False)
    run_plots.plot_runs([str(tmp_path / "run")])
    loss, _, _, last = figures["curves"].axes
    x, y = loss.lines[0].get_data()
    assert len(x) == 251  # 1001 steps, four at a time
    assert y[0] == pytest.approx(np.mean([2 * 143 / i for i in range(1, 5)]))
    assert (x[-1], y[-1]) == pytest.approx((7, 2 / 7))
    assert last.get_title(loc="left") == "images per second"


@pytest.mark.slow
def test_a_log_that_is_being_written(run: Path) -> None:
    path = run / "log.jsonl"
    whole = read_log(path)
    with open(path, "a") as file:
        file.write('{"kind": "fault", "file": "x.png", "error": "bad"}\n')
        file.write('{"kind": "step", "step": 20, "epoch": 2.0, "loss": NaN, "lr": 0.5}\n')  # done again
        file.write('{"kind": "step", "step": 31, "epo')
    found = read_log(path)
    assert list(found.steps["step"]) == list(whole.steps["step"])
    assert np.isnan(found.steps["loss"][19])
    assert np.isnan(found.steps["grad_norm"][19])
    assert found.steps["lr"][19] == 0.5
    assert set(found.evals) == {"raw", "ema"}
    run_plots.plot_runs([str(run)])


@pytest.mark.slow
def test_a_log_without_anything_yet(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    written, notes = run_plots.plot_runs([str(tmp_path)])
    assert [Path(name).name for name in written] == ["curves.png"]
    assert "no eval.npz" in notes[0]


# ---- confusion matrix and mistakes -------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_matrix_shows(run: Path, figures: dict[str, Figure]) -> None:
    run_plots.plot_runs([str(run)])
    axes = figures["confusion"].axes[0]
    answers = run_plots.read_predictions(run / "eval.npz")
    wanted = np.zeros((10, 10))
    for is_, said in zip(answers.labels, answers.predictions):
        wanted[is_, said] += 1
    np.testing.assert_allclose(axes.images[0].get_array(), 100 * wanted / wanted.sum(1, keepdims=True))
    counts = {t.get_position()[::-1]: t.get_text() for t in axes.texts if t.get_text().isdigit()}
    assert counts == {(i, j): str(int(wanted[i, j])) for i, j in zip(*np.nonzero(wanted))}
    assert "first: 354 of 359 right, 98.61 %" in axes.get_title(loc="left")
    (words,) = (t.get_text() for t in axes.texts if "most frequent" in t.get_text())
    assert "1 \u00d7  digit 0 \u2192 digit 1" in words
    assert [t.get_text() for t in axes.get_yticklabels()] == answers.names


@pytest.mark.slow
def test_the_worst_mistakes_come_first(run: Path, figures: dict[str, Figure]) -> None:
    run_plots.plot_runs([str(run)], mistakes=4)
    figure = figures["mistakes"]
    assert figure.get_suptitle() == "first: 5 of 359 wrong, the worst 4"
    digits, labels = load_digits()
    held_out = split_digits(labels)[1]
    for i, axes in enumerate(figure.axes[:4]):
        assert np.array_equal(axes.images[0].get_array(), digits[held_out[i]])
        digit = labels[held_out[i]]
        said, is_ = (t.get_text() for t in axes.texts)
        assert said == f"digit {(digit + 1) % 10}, {87 - i} %"
        assert is_ == f"is digit {digit}, {5 + i} %"


@pytest.mark.slow
def test_pictures_from_files(tmp_path: Path, figures: dict[str, Figure]) -> None:
    wide = np.zeros((30, 400, 3), np.uint8)
    wide[..., 1] = 200
    (tmp_path / "wide.png").write_bytes(encode_png(wide))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    np.save(tmp_path / "array.npy", np.arange(5 * 6 * 4.0).reshape(5, 6, 4))
    np.save(tmp_path / "flat.npy", np.zeros((6, 4)))
    names = ["wide.png", "gone.png", "bad.png", "array.npy", "flat.npy", ""]
    write_answers(tmp_path / "eval.npz", pictures=[str(tmp_path / n) if n else "" for n in names])
    run_plots.plot_runs([str(tmp_path)])
    tiles = figures["mistakes"].axes
    green = tiles[0].images[0].get_array()
    assert green.shape == (192, 192, 3)
    assert tuple(green[96, 96]) == (0, 200, 0)
    assert tuple(green[3, 3]) == (255, 255, 255)
    assert tiles[3].images[0].get_array().shape == (6, 6, 3)
    said = [t.axes.texts[0].get_text() for t in (tiles[1].texts[0], tiles[2].texts[0], tiles[4].texts[0])]
    assert said == [
        "gone.png\nNo such file or directory",
        "bad.png\ncannot be read",
        "flat.npy\ncannot be read",
    ]


@pytest.mark.slow
def test_no_mistakes(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_answers(tmp_path / "eval.npz", pictures=["x.png", "y.png"], wrong=0)
    run_plots.plot_runs([str(tmp_path)])
    assert "no mistakes; the least sure answers" in figures["mistakes"].get_suptitle()
    assert "no mistakes" in texts(figures["confusion"])


@pytest.mark.slow
def test_many_classes(tmp_path: Path, figures: dict[str, Figure]) -> None:
    count = 200
    labels = np.arange(count)
    probabilities = np.full((count, count), 0.001, np.float32)
    names = np.array([f"a rather long name of a class {i}" for i in range(count)])
    changes = {"labels": labels, "predictions": labels[::-1], "probabilities": probabilities, "names": names}
    write_answers(tmp_path / "eval.npz", pictures=[""] * count, **changes)
    run_plots.plot_runs([str(tmp_path)])
    axes = figures["confusion"].axes[0]
    assert len(axes.texts) == 1  # no counts in the cells
    assert max(figures["confusion"].get_size_inches()) < 15


# ---- files that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"probabilities": np.zeros((359, 9), np.float32)},
            r"probabilities: expected \(359, 10\), got \(359, 9\)",
        ),
        ({"predictions": np.zeros(358, np.int64)}, "predictions: expected"),
        ({"labels": np.full(359, 10)}, "class indices from 0 to 9"),
        ({"labels": np.zeros(359)}, "class indices"),
        ({"files": np.array(["a"])}, "files: expected one for each"),
        ({"names": np.array([object()], dtype=object)}, "not the answers of a run"),
    ],
)
def test_answers_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_answers(tmp_path / "eval.npz", **changes)
    with pytest.raises(ValueError, match=message):
        run_plots.read_predictions(tmp_path / "eval.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "{}\n", "log.jsonl, line 1"),
        ("log.jsonl", "hello\n", "log.jsonl, line 1"),
        ("log.jsonl", '{"kind": "step", "step": 1, "epoch": 1, "loss": "low"}\n', "log.jsonl, line 1"),
        ("log.jsonl", "[1]\n", "log.jsonl, line 1"),
        ("eval.npz", "hello", "not the answers of a run"),
        ("eval.npz", "PK\x03\x04", "not the answers of a run"),
        ("eval.npz", "", "not the answers of a run"),
        ("notes.txt", "", "no run: neither log.jsonl nor eval.npz"),
    ],
)
def test_damaged_runs(
    tmp_path: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["plot", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_name_without_a_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        curves.plot_curves({}, tmp_path / "curves.gif", run_plots.SCORED)
