# SPDX-License-Identifier: Apache-2.0
"""Names of classes, files and runs in pictures, shown as they are; and pictures that cannot be written."""

from __future__ import annotations

import errno
import json
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from vimcore import _core
from vimcore.cli import main
from vimcore.data.digits import encode_png
from vimcore.plots import curves
from vimcore.plots import demo as demo_plots
from vimcore.plots import runs as run_plots
from vimcore.train.log import RunLog
from vimcore.utils.files import literal, shortened

NAMES = [
    r"$\foo$",
    "$$",
    "a_b^{c}$d$",
    "<b>&amp;</b> -->",
    "two\nlines\t",
    "\x1b[31m\x00\x7f",
    "\u202eback",
    "name " * 400,
    "\udcff\ud800",
    "",
]
SHOWN = [
    r"$\foo$",
    "$$",
    "a_b^{c}$d$",
    "<b>&amp;</b> -->",
    r"two\nlines\t",
    r"\x1b[31m\x00\x7f",
    r"\u202eback",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Every class once right and once wrong, in a folder of odd name."""
    folder = tmp_path / r"$\run_{1}$"
    folder.mkdir()
    picture = folder / "$x_$<i>.png"
    picture.write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    labels = np.tile(np.arange(len(NAMES)), 2)
    predictions = np.concatenate([labels[: len(NAMES)], (labels[len(NAMES) :] + 1) % len(NAMES)])
    np.savez(
        folder / "eval.npz",
        labels=labels,
        predictions=predictions,
        probabilities=np.full((len(labels), len(NAMES)), 0.1, np.float32),
        names=np.array(NAMES, dtype=np.str_),
        files=np.array([str(picture), r"gone$\x$.png", "bad\n.png", *[""] * (len(labels) - 3)]),
    )
    step = {"kind": "step", "step": 1, "epoch": 1, "loss": 1.0, "lr": 1e-3}
    (folder / "log.jsonl").write_text(json.dumps(step) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_any_name_is_drawn(
    kind: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the reader's own matplotlib is set to TeX."""
    found: dict[str, Figure] = {}
    save = run_plots.save_figure

    def keep(figure: Figure, path: Path) -> None:
        found[path.stem] = figure
        save(figure, path)

    for module in (run_plots, curves):
        monkeypatch.setattr(module, "save_figure", keep)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        assert main(["plot", str(run), "--format", kind]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == [f"{n}.{kind}" for n in ("curves", "confusion", "mistakes")]
    for path in written:
        if kind == "svg":
            ET.parse(path)
        else:
            assert max(_core.decode_image(path.read_bytes(), "x").shape) < 4000
    axes = found["confusion"].axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [shortened(name, 16) for name in NAMES]
    assert labels[:7] == SHOWN
    texts = [t for figure in found.values() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
    assert len(texts) > 50
    assert not any(text.get_parse_math() or text.get_usetex() for text in texts)
    assert all("\x1b" not in t.get_text() and "\x00" not in t.get_text() for t in texts)
    assert found["curves"].get_suptitle() == r"Training of $\run_{1}$"


@pytest.mark.slow
def test_the_demo_s_pictures(tmp_path: Path) -> None:
    pictures, truth = np.zeros((2, 8, 8), np.uint8), np.array([0, 1])
    answers = [(0, r"$\foo$", 0.9), (0, "a\n<b>" * 50, 0.9)]
    for kind in ("png", "svg"):
        demo_plots.plot_predictions(
            pictures, truth, answers, 0.5, tmp_path / f"predictions.{kind}", columns=2
        )
        maps = np.ones((2, 8, 8), np.float32)
        demo_plots.plot_maps(pictures, maps, truth, answers, tmp_path / f"maps.{kind}")
    ET.parse(tmp_path / "predictions.svg")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["curves", "mistakes"])
def test_a_picture_that_fails(
    stem: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says what there is of the others."""
    before = sorted(path.name for path in run.iterdir())

    def fail(figure: Figure, path: Path) -> None:
        if path.stem == stem:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(b"x")

    for module in (run_plots, curves):
        monkeypatch.setattr(module, "save_figure", fail)
    assert main(["plot", str(run)]) == 1
    out, error = capsys.readouterr()
    ready = [str(run / f"{name}.png") for name in ("curves", "confusion") if stem == "mistakes"]
    more = f"; written before it: {', '.join(ready)}" if ready else ""
    assert (out, error) == ("", f"vimcore: {run / f'{stem}.png'}: No space left on device{more}\n")
    assert sorted(path.name for path in run.iterdir()) == sorted(before + [Path(p).name for p in ready])


def test_names_as_one_line() -> None:
    assert (
        literal("a\nb\x1b[31m\x7f\u202e\ud800\udcff\u2028\uffff")
        == r"a\nb\x1b[31m\x7f\u202e\ud800\xff\u2028\uffff"
    )
    plain = "na\u00efve $x$ <b> \u4e2d\u6587 \U0001f468\u200d\U0001f469"
    assert literal(plain) == plain
    assert (shortened("abcdef", 6), shortened("abcdefg", 6), shortened("a\n\n\n", 6)) == (
        "abcdef",
        "abcde\u2026",
        "a\\n\\n\u2026",
    )


def test_lines_of_a_run_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    RunLog.say(SimpleNamespace(writes=True), "validated on \x1b[31mred\nnext")  # type: ignore[arg-type]
    assert capsys.readouterr().err == "validated on \\x1b[31mred\nnext\n"
