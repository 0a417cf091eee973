# SPDX-License-Identifier: Apache-2.0
"""`vimcore explain`: its files, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from helpers import build, small
from matplotlib.figure import Figure
from vimcore.cli import explain as command
from vimcore.cli import main
from vimcore.data.digits import encode_png
from vimcore.io import save_model
from vimcore.plots import style
from vimcore.plots.explain import columns_for
from vimcore.plots.panels import view_of
from vimcore.tools import explain as tool

LABELS = ["cat", "dog", "$x$ <b>"]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels, which are drawn sooner."""

    def new_figure(width: float, height: float) -> Figure:
        figure = style.new_figure(width, height)
        figure.set_dpi(20)
        return figure

    monkeypatch.setattr("vimcore.plots.explain.new_figure", new_figure)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "vim.safetensors"
    build(small(img_size=(16, 24))).save(path, LABELS)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3)).astype(np.uint8)
    (folder / "again").mkdir()
    (folder / "one.png").write_bytes(encode_png(pixels[0]))
    (folder / "again" / "one.png").write_bytes(encode_png(pixels[1]))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[Any], str]:
    """Status, the lines of JSON, stderr."""
    status = main(["explain", "--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_everything(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    some = [pictures / "broken.png", pictures / "one.png"]
    status, lines, err = run(capsys, "--weights", weights, "--out", out, "--topk", 2, *some)
    assert status == 1
    broken, one, together = lines
    assert broken == {"image": str(some[0]), "error": broken["error"]}
    assert f"vimcore: {some[0]}: {broken['error']}" in err
    assert "1 of 2 images failed" in err
    names = ("attention", "rollout", "norms", "relevance", "saliency")
    assert one["written"] == [str(out / f"one_{what}.png") for what in names]
    first, second = one["targets"]
    assert first["p"] >= second["p"]
    assert first["label"] == LABELS[first["index"]]
    for what in ("relevance", "saliency"):
        assert 0 < first[what]["deletion"] < 1
        assert 0 < first[what]["insertion"] < 1
    assert together["written"] == [str(out / "erf.png"), str(out / "pca.png")]
    assert together["pca"] == {"images": 1, "layer": 1, "left_out": 0}
    assert [row["share"] for row in together["erf"]["sides"]] == [0.2, 0.3, 0.5, 0.99]
    written = one["written"] + together["written"]
    assert all(map(is_png, written))
    assert sorted(map(str, out.iterdir())) == sorted(written)


@pytest.mark.slow
def test_names_in_several_folders(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines, _ = run(capsys, "--weights", weights, "--out", tmp_path, "--what", "norms", pictures)
    assert [[Path(name).name for name in line.get("written", [])] for line in lines] == [
        [],
        ["one_norms.png"],
        ["one-2_norms.png"],
    ]


@pytest.mark.slow
def test_choices(weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pictures / "one.png"
    some = ["--weights", weights, "--out", tmp_path, "--format", "svg", image]
    chosen = ["--what", "relevance,attention", "--layers", "-1", "--token", "1,2", "--target", "dog"]
    status, lines, _ = run(capsys, *some, *chosen, "--img-size", "12x20")
    assert status == 0
    (line,) = lines
    assert [Path(name).name for name in line["written"]] == ["one_attention.svg", "one_relevance.svg"]
    assert [target["index"] for target in line["targets"]] == [1]
    before = (tmp_path / "one_relevance.svg").read_bytes()
    again = run(capsys, *some, *chosen, "--img-size", "12x20", "--what", "relevance")[1]
    assert again[0]["targets"] == lines[0]["targets"]
    assert (tmp_path / "one_relevance.svg").read_bytes() == before  # the same bytes each time

    long = ["--what", "rollout", "--img-size", 132]  # 1090 tokens: signed
    assert run(capsys, *some, *long)[0] == 0
    assert "more than 1024 tokens" in (tmp_path / "one_rollout.svg").read_text()

    bare = tmp_path / "bare.safetensors"
    build(small(img_size=16, num_classes=0, class_token="none", directions="none")).save(bare)
    status, lines, _ = run(capsys, "--weights", bare, "--out", tmp_path, image, "--what", "attention")
    assert status == 0
    assert lines[0]["targets"] == []
    assert (
        main(["explain", "--weights", str(weights), "--out", str(tmp_path), "--what", "erf", str(image)]) == 0
    )
    text = capsys.readouterr().out.splitlines()
    assert text[0] == str(image)
    assert text[1].split()[-1] in " ".join(LABELS)
    assert "effective receptive field" in text
    assert text[-1] == str(tmp_path / "erf.png")


def test_refused(weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pictures / "one.png"

    def failure(file: Path, *arguments: str) -> str:
        status, lines, err = run(capsys, "--weights", file, "--out", tmp_path / "out", image, *arguments)
        assert (status, lines) == (1, [])
        assert not (tmp_path / "out").exists()
        return err

    assert "target: expected a label or a number of 0 .. 2, got 'bird'" in failure(
        weights, "--target", "bird"
    )
    assert "layers: expected -2 .. 1, got 5" in failure(weights, "--layers", "0,5")
    assert "token: expected a row of 0 .. 3 and a column of 0 .. 5, got (4, 0)" in failure(
        weights, "--token", "4,0"
    )
    assert "start: expected a layer of 0 .. 1, got 2" in failure(weights, "--start", "2")
    bare = tmp_path / "bare.safetensors"
    build(small(img_size=16, num_classes=0)).save(bare)
    err = failure(bare, "--what", "saliency")
    assert "saliency is of the logit of a class" in err
    assert "has no head" in err
    arrays = tmp_path / "arrays.safetensors"
    save_model(vimcore.VisionMamba(16, 4, in_chans=5, num_classes=2, embed_dim=8, depth=1), arrays)
    assert "no preprocessing (vimcore.preprocess), so nothing that a picture could fill" in failure(arrays)
    status, lines, err = run(capsys, "--weights", weights, "--out", tmp_path / "out", tmp_path / "none.png")
    assert status == 1
    assert lines == [{"image": str(tmp_path / "none.png"), "error": "No such file or directory"}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what", "attention,maps"], "expected some of attention,"),
        (["--token", "middle"], "expected 'class' or ROW,COLUMN"),
        (["--layers", "first"], "expected a whole number"),
        (["--target", "1", "--topk", "2"], "not allowed with argument"),
        (["--dtype", "bfloat16"], "explanations are computed in float32"),
    ],
)
def test_bad_usage(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["explain", "--weights", "F", "IMAGE", *flags])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_dense_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dense.safetensors"
    vimcore.segmentation.FCN(build(small(img_size=16, num_classes=0, class_token="none")), 2).save(file)
    status, lines, err = run(capsys, "--weights", file, "--out", tmp_path / "out", "one.png")
    assert (status, lines) == (1, [])
    assert "expected a classifier or a backbone, got a network for the task segment; in Python its" in err
    model = vimcore.segmentation.load(file)
    with pytest.raises(TypeError, match=r"expected a VisionMamba, got FCN; give its \.backbone"):
        vimcore.token_norms(model, torch.zeros(1, 3, 16, 16))
    assert vimcore.token_norms(model.backbone, torch.zeros(1, 3, 16, 16)).shape == (1, 2, 4, 4)


def test_damaged_weights(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vimcore.VisionMamba.load(weights)
    with torch.no_grad():
        model.layers[1].mixer.D[3] = torch.nan
    model.save(tmp_path / "nan.safetensors")
    status, lines, _ = run(
        capsys, "--weights", tmp_path / "nan.safetensors", "--out", tmp_path, pictures / "one.png"
    )
    assert status == 1
    assert lines[0]["error"] == "the network gives values that are not finite; its weights are damaged"


def test_layout() -> None:
    assert command.WHAT == tool.WHAT
    assert [columns_for(n) for n in (1, 2, 4, 7, 12, 24)] == [1, 2, 2, 4, 4, 6]
    pixels = np.zeros((16, 24, 1))
    assert view_of(pixels, 4, 4, (4, 6)).extent == (-0.5, 23.5, 15.5, -0.5)
    assert view_of(pixels, 8, 4, (3, 5)).extent == (1.5, 21.5, 13.5, 1.5)  # half a patch stays outside
