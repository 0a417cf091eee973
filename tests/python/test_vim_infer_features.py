# SPDX-License-Identifier: Apache-2.0
"""vim-infer features, info and bench against Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import vimcore
from safetensors import safe_open
from vim_infer import BINARY, run, save
from vimcore import _core
from vimcore.cli import main


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": "double"},
        {"class_token": "none", "pool": "mean", "num_classes": 0},
        {"class_token": "none", "pool": "max"},
        {"class_token": "none", "pool": "last"},
        {"class_token": "none", "pool": "all"},
    ],
)
def test_features(options: dict, pictures: Path, tmp_path: Path) -> None:
    weights = save(tmp_path / "m.safetensors", **options)
    good = [str(pictures / "a.b" / name) for name in ("alpha.png", "grey.png", "palette.PNG", "rgb.png")]
    runtime = vimcore.Runtime(weights)
    images = [
        _core.preprocess_image(Path(name).read_bytes(), "x", _core.Preprocess(**runtime.preprocess))
        for name in good
    ]
    tokens = runtime.features(np.stack(images))
    out = tmp_path / "features.safetensors"
    done = run("features", "--weights", weights, "--out", out, "--tokens", pictures / "a.b")
    assert done.returncode == 0, done.stderr
    with safe_open(out, "np") as file:
        assert list(file.keys()) == ["features"]
        assert json.loads(file.metadata()["vimcore.images"]) == good
        assert np.array_equal(file.get_tensor("features"), tokens)

    done = run("features", "--weights", weights, "--out", out, "--batch", "3", "--json", pictures / "a.b")
    assert json.loads(done.stdout) == {"written": str(out), "images": 4, "failed": 0, "width": 16}
    with safe_open(out, "np") as file:
        rows = file.get_tensor("features")
    token, pool = runtime.config["class_token"], runtime.config["pool"]
    if token == "middle":
        assert np.array_equal(rows, tokens[:, 6])
    elif token == "double":
        np.testing.assert_allclose(rows, (tokens[:, 0] + tokens[:, -1]) / 2, rtol=1e-6, atol=1e-7)
    elif pool == "max":
        assert np.array_equal(rows, tokens.max(1))
    elif pool == "last":
        assert np.array_equal(rows, tokens[:, -1])
    else:
        np.testing.assert_allclose(rows, tokens.mean(1), rtol=1e-5, atol=1e-6)
    if runtime.config["num_classes"] == 0:
        assert np.array_equal(rows, runtime(np.stack(images)))


def test_features_of_an_image_tower(pictures: Path, tmp_path: Path) -> None:
    """What its head gives, as from Runtime; its outputs are no classes for predict."""
    weights = save(tmp_path / "m.safetensors")
    tensors, metadata = _core.read_safetensors(weights)
    _core.write_safetensors(weights, tensors, {**metadata, "vimcore.embedding": "true"})
    picture, out = pictures / "a.b" / "rgb.png", tmp_path / "features.safetensors"
    done = run("features", "--weights", weights, "--out", out, picture)
    assert done.returncode == 0, done.stderr
    with safe_open(out, "np") as file:
        assert np.array_equal(file.get_tensor("features")[0], vimcore.Runtime(weights).embed(picture))
    done = run("predict", "--weights", weights, picture)
    assert done.returncode == 1
    assert "an image tower, whose outputs are no classes" in done.stderr


def test_features_skip_bad_pictures(weights: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    done = run("features", "--weights", weights, "--out", out, pictures)
    assert done.returncode == 1
    assert "4 of 19 images failed" in done.stderr
    with safe_open(out, "np") as file:
        assert file.get_tensor("features").shape == (15, 16)
        names = json.loads(file.metadata()["vimcore.images"])
    assert len(names) == 15
    assert str(pictures / "b" / "cut.jpg") not in names

    before = out.read_bytes()
    done = run("features", "--weights", weights, "--out", out, pictures / "empty.jpg")
    assert done.returncode == 1
    assert "nothing is written" in done.stderr
    assert out.read_bytes() == before
    done = run("features", "--weights", weights, "--out", tmp_path / "no" / "f.npz", pictures)
    assert done.returncode == 1
    assert done.stderr == f"vim-infer: {tmp_path}/no/f.npz: cannot write: No such file or directory\n"
    assert os.listdir(tmp_path) == [out.name]


def test_features_on_a_full_disk(weights: Path, pictures: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the old file stays whole, nothing is left behind."""
    out = tmp_path / "features.safetensors"
    command = ["features", "--weights", weights, "--out", out, "--tokens", pictures / "a.b"]
    assert run(*command).returncode == 0
    before = out.read_bytes()
    limited = ["-c", 'ulimit -f 1 && exec "$@"', "sh", BINARY, *map(str, command)]
    done = subprocess.run(["bash", *limited], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "features.safetensors: cannot write: File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == [out.name]


def test_info(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run("info", weights, "--json").stdout)
    assert run("info", "--weights", weights, "--json").stdout == run("info", weights, "--json").stdout
    main(["info", str(weights), "--json"])
    for key, value in json.loads(capsys.readouterr().out).items():
        assert facts[key] == value
    tensors, _ = _core.safetensors_header(str(weights))
    assert [(t["name"], t["type"], tuple(t["shape"])) for t in facts["tensors"]] == tensors
    assert facts["build"]["version"] == vimcore.__version__
    assert {"isa", "isas", "cuda", "jpeg", "png", "compiler"} <= facts["build"].keys()
    text = run("info", weights, "--tensors").stdout
    for part in (
        f"{facts['parameters']:,}",
        "3 x 4 patches, class tokens: 1",
        "cat",
        "layers.1.mixer.D",
        "avx",
    ):
        assert part in text
    assert json.loads(run("info", "--json").stdout) == {"build": facts["build"]}


def test_info_of_files_that_are_none(tmp_path: Path, weights: Path) -> None:
    bare, half, text = (tmp_path / name for name in ("bare", "half", "text"))
    _core.write_safetensors(str(bare), {"x": np.zeros(3, np.float32)}, {})
    config = json.dumps({"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1})
    _core.write_safetensors(str(half), {"x": np.zeros(3, np.float32)}, {"vimcore.config": config})
    text.write_text("hello")
    for path, message in (
        (bare, "no vimcore.config"),
        (half, "do not fit"),
        (text, "text"),
        (tmp_path / "absent", "No such file"),
    ):
        for done in (run("info", path), run("predict", "--weights", path, "x.png")):
            assert (done.returncode, done.stdout) == (1, "")
            assert message in done.stderr
            assert done.stderr.startswith("vim-infer: ")
            assert done.stderr.count("\n") == 1


def test_bench(weights: Path, pictures: Path) -> None:
    options = ["--sizes", "24,40", "--batches", "1,3", "--seconds", "0"]
    facts = json.loads(run("bench", "--weights", weights, *options, "--json", pictures / "a.b").stdout)
    assert [(row["height"], row["batch"]) for row in facts["network"]] == [(24, 1), (24, 3), (40, 1), (40, 3)]
    assert all(0 < row["fastest_ms"] <= row["ms_per_image"] and row["runs"] >= 5 for row in facts["network"])
    assert all(1 << 20 < row["peak_bytes"] < 1 << 30 for row in facts["network"])
    assert facts["files"]["images"] == 4
    assert facts["files"]["share"] > 0
    text = run("bench", "--weights", weights, "--seconds", "0", pictures / "a.b").stdout
    assert "24 x 32" in text
    assert "from files:" in text
