# SPDX-License-Identifier: Apache-2.0
"""What both programs take as pictures, the files that they write, how far they say they are."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vimcore
from train_helpers import folder
from vim_infer import BINARY, LABELS, make_pictures, picture, same_as_python, save
from vimcore import _core
from vimcore.cli import main, progress
from vimcore.data.named_files import named, pictures_of
from vimcore.segmentation import FCN

PROGRAMS: dict[str, list[str]] = {"vimcore": [sys.executable, "-m", "vimcore"], "vim-infer": [BINARY]}
Program = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "m.safetensors", LABELS)


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    def call(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        command = [*PROGRAMS[request.param], *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, input=stdin, check=False, timeout=120, env=environment
        )

    return call


# ---- pictures ----------------------------------------------------------------------------------------------


def test_patterns_and_lists(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files and folders by pattern, in the order of the names' bytes; in lists, too; no match is an error."""
    list_file = tmp_path / "list"
    list_file.write_text(f"{pictures}/b/4*0.jpg\n\n{pictures}/a.b\r\n")
    (tmp_path / "odd[1].png").write_bytes((pictures / "a.b" / "rgb.png").read_bytes())
    names = [f"{pictures}/a.?", f"@{list_file}", f"{tmp_path}/odd[1].png", f"{pictures}/[!b]*.ppm"]
    done = same_as_python(capsys, "predict", "--weights", weights, "--json", *names)
    found = [os.path.basename(json.loads(line)["image"]) for line in done.stdout.splitlines()]
    a = ["alpha.png", "grey.png", "palette.PNG", "rgb.png"]
    assert found == [*a, "4200.jpg", "4220.jpg", "4440.jpg", *a, "odd[1].png", "small.ppm"]
    done = same_as_python(
        capsys, "predict", "--weights", weights, f"{pictures}/*.gone", f"{pictures}/b/4440.jpg"
    )
    assert done.returncode == 1
    assert "*.gone: No such file or directory" in done.stderr


def test_hidden_files_match_no_pattern(tmp_path: Path) -> None:
    for name in (".hidden.png", "b.png", "a.png", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert named([f"{tmp_path}/*"]) == [f"{tmp_path}/{name}" for name in ("a.png", "b.png", "c.txt")]
    assert pictures_of([str(tmp_path)]) == [
        f"{tmp_path}/{name}" for name in (".hidden.png", "a.png", "b.png")
    ]


@pytest.mark.slow
def test_standard_input(program: Program, weights: Path, pictures: Path) -> None:
    data = (pictures / "a.b" / "rgb.png").read_bytes()
    runtime = vimcore.Runtime(weights)
    done = program("predict", "--weights", weights, "--json", "--logits", "-", stdin=data)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["image"] == "-"
    wanted = runtime.predict(data).logits  # type: ignore[union-attr]
    assert np.array_equal(np.array(line["logits"], np.float32), wanted)
    listed = program(
        "predict", "--weights", weights, "--json", "@-", stdin=f"{pictures}/a.b/rgb.png\n".encode()
    )
    assert json.loads(listed.stdout)["top"] == line["top"]
    twice = program("predict", "--weights", weights, "-", "@-", stdin=data)
    assert (twice.returncode, twice.stdout) == (1, b"")
    assert b"-: standard input can be read once" in twice.stderr
    empty = program("predict", "--weights", weights, "-", stdin=b"")
    assert empty.returncode == 1
    assert b"-: file is empty" in empty.stderr


@pytest.mark.slow
def test_search_takes_the_same(
    weights: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = io.TextIOWrapper(io.BytesIO((pictures / "a.b" / "rgb.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", data)
    command = ["search", "--weights", str(weights), "--json"]
    assert main([*command, "-", f"{pictures}/a.b/*.png"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0] == {"rank": 1, "image": f"{pictures}/a.b/rgb.png", "score": 1.0}
    assert len(found) == 3
    query = f"{pictures}/a.b/rgb.png"
    scores = []
    for size in ([], ["--img-size", "40"], ["--img-size", "40"], [], ["--img-size", "40", "--no-cache"]):
        assert main([*command, query, f"{pictures}/a.b", *size]) == 0
        scores.append([json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()])
    assert scores[0] == scores[3]
    assert scores[1] == scores[2] == scores[4]  # vectors of another size are not used
    assert scores[0] != scores[1]
    assert main([*command, query, "-"]) == 1
    assert "the query may be standard input" in capsys.readouterr().err


def test_size_and_batch(weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["predict", "--weights", weights, "--json", "--logits", pictures / "a.b"]
    plain = same_as_python(capsys, *common, "--batch", "3")
    assert plain.stdout == same_as_python(capsys, *common).stdout
    sized = same_as_python(capsys, *common, "--img-size", "32x40")
    assert sized.stdout != plain.stdout


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_predictions(
    suffix: str,
    logits: bool,
    weights: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same bytes of both, damaged pictures and odd names among them."""
    out = tmp_path / f"p.{suffix}"
    options = ["--topk", "2", *(["--logits"] if logits else [])]
    command = ["predict", "--weights", weights, *options, pictures]
    assert main([*map(str, command), "--out", str(out)]) == 1
    of_python, (said, _) = out.read_bytes(), capsys.readouterr()
    assert said == f"{out}: predictions of 19 images\n"
    out.unlink()
    done = same_as_python(capsys, *command, "--out", out, "--json")
    assert json.loads(done.stdout) == {"written": str(out), "images": 19}
    assert out.read_bytes() == of_python  # Python was last; now the other
    assert (
        subprocess.run(
            [BINARY, *map(str, command), "--out", out], capture_output=True, check=False
        ).returncode
        == 1
    )
    assert out.read_bytes() == of_python
    assert os.listdir(tmp_path) == [out.name]

    main([*map(str, command), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = of_python.decode()
    if suffix == "json":
        assert json.loads(text) == lines
    elif suffix == "jsonl":
        assert [json.loads(line) for line in text.splitlines()] == lines
    else:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [row["image"] for row in rows] == [line["image"] for line in lines]
        for row, line in zip(rows, lines):
            assert row["error"] == line.get("error", "")
            for rank, top in enumerate(line.get("top", [])):
                mark = f"_{rank + 1}" if rank else ""
                assert (row["index" + mark], row["label" + mark]) == (str(top["index"]), top["label"])
                assert float(row["p" + mark]) == top["p"]
            for i, value in enumerate(line.get("logits", [])):
                assert float(row[f"logit_{i}"]) == value
        assert {row["error"] for row in rows if row["index"] == ""} == {row["error"] for row in rows} - {""}


def test_parquet(weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyarrow import parquet

    out = tmp_path / "p.parquet"
    command = ["predict", "--weights", str(weights), "--topk", "2", "--logits", str(pictures)]
    assert main([*command, "--out", str(out)]) == 1
    table = parquet.read_table(out).to_pylist()
    capsys.readouterr()
    main([*command, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, line in zip(table, lines, strict=True):
        assert (row["image"], row["error"]) == (line["image"], line.get("error"))
        if "top" in line:
            assert [row["label"], row["label_2"]] == [top["label"] for top in line["top"]]
            assert row["p"] == pytest.approx(line["top"][0]["p"], rel=1e-5)
            found = np.array([row[f"logit_{i}"] for i in range(5)], np.float32)
            assert np.array_equal(found, np.array(line["logits"], np.float32))
        else:
            assert row["index"] is None


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "npy", "npz", "safetensors"])
def test_features(
    suffix: str,
    tokens: bool,
    weights: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both write the same numbers, those of Runtime, and the same names."""
    command = ["features", "--weights", weights, *(["--tokens"] if tokens else []), pictures, "--json"]
    out = tmp_path / f"f.{suffix}"
    if tokens and suffix == "csv":
        assert main([*map(str, command), "--out", str(out)]) == 1
        assert "a table of its own" in capsys.readouterr().err
        return
    done = subprocess.run([BINARY, *map(str, command), "--out", out], capture_output=True, check=False)
    binary = out.read_bytes()
    assert main([*map(str, command), "--out", str(out)]) == done.returncode == 1
    said, error = capsys.readouterr()
    assert said.encode() == done.stdout
    assert error.encode() == done.stderr.replace(b"vim-infer: ", b"vimcore: ")
    if suffix != "npz":  # an archive has times and versions
        assert out.read_bytes() == binary
    other = tmp_path / f"g.{suffix}"
    other.write_bytes(binary)
    runtime = vimcore.Runtime(weights)
    steps = _core.Preprocess(**runtime.preprocess)
    names = [n for n in pictures_of([str(pictures)]) if "error" not in _tried(n, steps)]
    images = np.stack([_tried(name, steps)["image"] for name in names])
    wanted = runtime.features(images) if tokens else runtime.embeddings(images)
    for path in (out, other):
        values, found = _read(path)
        assert values.dtype == np.float32
        assert np.array_equal(values, wanted)
        assert found is None or found == names
    if suffix == "npy":
        assert "no names" in error


def _tried(name: str, steps: Any) -> dict[str, Any]:
    try:
        return {"image": _core.preprocess_image(Path(name).read_bytes(), "x", steps)}
    except (OSError, _core.Error) as error:
        return {"error": error}


def _read(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Features and names of a file."""
    if path.suffix == ".npy":
        return np.load(path), None
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            assert set(arrays) == {"features", "images"}
            return arrays["features"], arrays["images"].tolist()
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text(), newline="")))
        assert rows[0] == ["image", *(f"f{i}" for i in range(len(rows[0]) - 1))]
        return np.array([row[1:] for row in rows[1:]], np.float32), [row[0] for row in rows[1:]]
    tensors, metadata = _core.read_safetensors(str(path))
    return tensors["features"], json.loads(metadata["vimcore.images"])


def test_names_of_features_in_any_script(weights: Path, tmp_path: Path) -> None:
    """Those that are not UTF-8 as Python has them, and those beyond 16 bits."""
    names = ["\u00e4\U0001f600\u0e01.png", "\udcff\udce9.png", "plain.png"]
    for name in names:
        picture(24, 32, 1).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", tmp_path / name)
    out = tmp_path / "f.npz"
    done = subprocess.run([BINARY, "features", "--weights", weights, "--out", out, tmp_path], check=True)
    assert done.returncode == 0
    assert sorted(os.path.basename(name) for name in _read(out)[1] or []) == sorted(names)
    assert main(["features", "--weights", str(weights), "--out", str(tmp_path / "g.npz"), str(tmp_path)]) == 0
    assert _read(tmp_path / "g.npz")[1] == _read(out)[1]


@pytest.mark.slow
def test_features_of_other_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a network for segmentation: the mean of its backbone's tokens."""
    network = FCN(vimcore.VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=2, num_classes=0), 3)
    weights, photos = tmp_path / "dense.safetensors", folder(tmp_path / "photos", (0,), each=3)
    network.save(weights, classes=["a", "b", "c"])
    command = ["features", "--weights", str(weights), str(photos), "--out", str(tmp_path / "f.npz")]
    assert main(command) == 0
    assert _read(tmp_path / "f.npz")[0].shape == (3, 16)
    assert main([*command, "--img-size", "32"]) == 1
    assert "img_size: of classifiers and backbones only" in capsys.readouterr().err
    for flag, said in (
        ("--logits", "for every pixel"),
        ("--batch=2", "of classifiers only"),
        ("--img-size=8", "of classifiers"),
    ):
        assert main(["predict", "--weights", str(weights), str(photos), flag]) == 1
        assert said in capsys.readouterr().err
    assert main(["predict", "--weights", str(weights), str(photos), "--out", str(tmp_path / "a.csv")]) == 1
    assert "segmentation writes into a folder, got the name of a file" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.slow
def test_files_that_are_refused(program: Program, weights: Path, pictures: Path, tmp_path: Path) -> None:
    for command, name, said in (
        ("predict", "p.txt", "--out: expected a name that ends with .csv, .json, .jsonl"),
        ("predict", "plain", "--out: expected a name that ends with .csv"),
        ("predict", "no/p.csv", "p.csv: "),
        ("features", "f.json", "--out: expected a name that ends with .csv, .npy, .npz, .safetensors"),
        ("features", "no/f.npy", "f.npy: "),
    ):
        done = program(command, "--weights", weights, "--out", tmp_path / name, pictures / "a.b")
        assert done.returncode in (1, 2)
        assert done.stdout == b""
        error = done.stderr.decode()
        assert said.removeprefix("--") in error, error
        assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_an_old_file_survives_a_failure(
    program: Program, weights: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.npz"
    out.write_bytes(b"old")
    done = program("features", "--weights", weights, "--out", out, pictures / "empty.jpg")
    assert done.returncode == 1
    assert b"nothing gave features, so nothing is written to" in done.stderr
    assert out.read_bytes() == b"old"


# ---- progress ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_progress_on_a_terminal(name: str, weights: Path, pictures: Path, tmp_path: Path) -> None:
    """Drawn over again, with honest counts, gone at the end; results are in another stream."""
    common = [*PROGRAMS[name], "predict", "--weights", str(weights), "--batch", "2", "--json"]
    names = [str(pictures / "a.b")] * 5
    text, out = on_terminal([*common, "--progress", *names], tmp_path / "out")
    assert len(out.splitlines()) == 20
    found = re.findall(r"\r\x1b\[K(\d+)/(\d+) images, [\d.]+/s, \d+:\d\d left", text)
    assert found[-1] == ("20", "20")
    assert [int(done) for done, _ in found] == sorted(int(done) for done, _ in found)
    assert text.endswith("\r\x1b[K")
    done = subprocess.run([*common, "--progress", *names], capture_output=True, text=True, check=True)
    assert done.stdout == out
    assert re.fullmatch(r"(\d+/20 images, [\d.]+/s, \d+:\d\d left\n)+", done.stderr)
    assert subprocess.run([*common, *names], capture_output=True, check=True).stderr == b""


def test_progress_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds, five times a second, on a terminal whose lines are not the results."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, shown, out = [0.0], Terminal(), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "stdout", out)
    with progress.Progress(100) as bar:
        for _ in range(100):
            clock[0] += 0.125
            bar.advance()
    lines = shown.getvalue().split("\r\x1b[K")
    assert lines[0] == ""
    assert lines[1] == "16/100 images, 8.0/s, 0:10 left"
    assert len(lines) == 45  # the counts 16, 18, ..., 100
    assert lines[-2:] == ["100/100 images, 8.0/s, 0:00 left", ""]
    for stdout, stderr in ((Terminal(), Terminal()), (io.StringIO(), io.StringIO())):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress.Progress(1) as bar:
            clock[0] += 10
            bar.advance()
        assert stderr.getvalue() == ""


def on_terminal(command: list[str], out: Path) -> tuple[str, str]:
    """What a command writes to stderr, which is a terminal, and to stdout, which is a file."""
    ours, theirs = pty.openpty()
    with open(out, "wb") as file, subprocess.Popen(command, stdout=file, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the terminal is gone
                break
            if not part:
                break
            text += part
    os.close(ours)
    assert process.returncode == 0, text
    return text.decode(), out.read_text()
