# SPDX-License-Identifier: Apache-2.0
"""vim-infer predict against the Python command and Runtime: the same lines, the same bits."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from test_images import expected_input
from vim_infer import run, same_as_python, save
from vimcore import _core
from vimcore.cli import main


@pytest.mark.parametrize("form", [[], ["--json"], ["--json", "--logits"], ["--logits", "--topk", "2"]])
def test_the_very_same_lines(
    form: list[str], weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = same_as_python(capsys, "predict", "--weights", weights, *form, pictures)
    assert done.returncode == 1
    assert "4 of 19 images failed" in done.stderr


def test_logits_have_the_bits_of_runtime(weights: Path, pictures: Path) -> None:
    runtime = vimcore.Runtime(weights)
    for options in ("", "--threads 1", "--threads 3 --batch 1", "--batch=5", "--batch 100"):
        done = run("predict", "--weights", weights, "--json", "--logits", *options.split(), pictures)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == 19
        for line in found:
            if "error" in line:
                continue
            data = Path(line["image"]).read_bytes()
            image = _core.preprocess_image(data, "x", _core.Preprocess(**runtime.preprocess))
            assert np.array_equal(np.array(line["logits"], np.float32), runtime(image[None])[0])


def test_logits_of_the_torch_module_with_pillow(weights: Path, pictures: Path) -> None:
    """The Python way without our image code: Pillow decodes and resizes, torch normalises and computes."""
    model = vimcore.VisionMamba.load(weights).eval()
    steps = vimcore.Runtime(weights).preprocess
    how = steps["resize"], steps["crop"], steps["mean"], steps["std"]
    done = run("predict", "--weights", weights, "--json", "--logits", pictures / "a.b", pictures / "b")
    good = [line for line in map(json.loads, done.stdout.splitlines()) if "logits" in line]
    assert len(good) == 13
    for line in good:
        with torch.no_grad():
            pixels = expected_input(Image.open(line["image"]), *how)
            logits = model(torch.from_numpy(pixels)[None])[0].numpy()
        np.testing.assert_allclose(line["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1},
        {"class_token": "none", "pool": "max"},
        {"class_token": "double", "directions": "ssm", "norm": "layer"},
        {"directions": "block", "class_token": "head", "num_classes": 1},
        {"img_size": 224, "patch_size": 32},
    ],
)
def test_other_networks(
    options: dict, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "m.safetensors", **options)
    same_as_python(capsys, "predict", "--weights", path, "--json", "--logits", pictures)


@pytest.mark.parametrize("size", [40, (40, 24)])
def test_another_image_size(size: int | tuple[int, int], weights: Path, pictures: Path) -> None:
    text = str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"
    path = pictures / "b" / "4440.jpg"
    done = run("predict", "--weights", weights, "--img-size", text, "--json", "--logits", path)
    runtime = vimcore.Runtime(weights, img_size=size)
    image = _core.preprocess_image(path.read_bytes(), "x", _core.Preprocess(**runtime.preprocess))
    assert json.loads(done.stdout)["logits"] == [float(f"{v:.9g}") for v in runtime(image[None])[0]]


def test_stored_preprocessing_is_used(
    weights: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = _core.read_safetensors(str(weights))
    steps = {"resize": 50, "crop": [24, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]}
    path = tmp_path / "m.safetensors"
    for stored in (json.dumps(steps), "{}", "null", None):
        extra = {} if stored is None else {"vimcore.preprocess": stored}
        kept = {key: value for key, value in metadata.items() if key != "vimcore.preprocess"}
        _core.write_safetensors(str(path), tensors, {**kept, **extra})
        same_as_python(capsys, "predict", "--weights", path, "--json", "--logits", pictures / "a.b")
    for key, text, message in (
        ("vimcore.preprocess", "{", "vimcore.preprocess"),
        ("vimcore.preprocess", '{"mean": [0.5], "std": [0.5]}', "3 channels"),
        ("vimcore.labels", '["one"]', "expected 5"),
        ("vimcore.labels", "[1, 2, 3, 4, 5]", "expected a string"),
    ):
        _core.write_safetensors(str(path), tensors, {**metadata, key: text})
        done = run("predict", "--weights", path, pictures / "a.b")
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_lists(weights: Path, pictures: Path, tmp_path: Path) -> None:
    common = ["predict", "--weights", weights, "--json"]
    names = [str(pictures / "small.ppm"), str(pictures / "a.b"), str(pictures / "b" / "grey.JPEG")]
    wanted = run(*common, *names).stdout
    assert len(wanted.splitlines()) == 6
    text = f"{names[0]}\n\n{names[1]}\r\n{names[2]}"
    path = tmp_path / "list.txt"
    path.write_text(text, newline="")
    assert run(*common, f"@{path}").stdout == wanted
    assert run(*common, "--list", path).stdout == wanted
    assert run(*common, "--list", "-", input=text).stdout == wanted
    assert run(*common, "--", *names).stdout == wanted
    done = run(*common, "@absent.txt")
    assert done.returncode == 1
    assert "absent.txt: cannot read the list: No such file" in done.stderr


def test_many_pictures_stay_in_order(weights: Path, pictures: Path) -> None:
    good = [pictures / "b" / "4440.jpg", pictures / "small.ppm", pictures / "a.b" / "rgb.png"]
    names = [str(pictures / "absent") if i % 7 == 3 else str(good[i % 3]) for i in range(400)]
    done = run(
        "predict", "--weights", weights, "--json", "--batch", "3", "--list", "-", input="\n".join(names)
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in found] == names
    assert [line.get("error") for line in found] == [
        "No such file or directory" if name.endswith("absent") else None for name in names
    ]
    first = {}
    for line in found:
        assert first.setdefault(line["image"], line) == line
    assert done.returncode == 1


def test_nothing_but_bad_pictures(weights: Path, pictures: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    names = [tmp_path / "pipe.png", pictures / "empty.jpg"]
    done = run("predict", "--weights", weights, "--json", *names)
    assert [json.loads(line)["error"] for line in done.stdout.splitlines()] == [
        "not a regular file",
        "file is empty",
    ]
    assert done.returncode == 1
    (tmp_path / "empty").mkdir()
    done = run("predict", "--weights", weights, tmp_path / "empty")
    assert done.returncode == 1
    assert "no pictures found" in done.stderr


def test_names_that_are_no_text(weights: Path, pictures: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xc3\x28.png"
    shutil.copy(pictures / "a.b" / "rgb.png", name)
    done = run("predict", "--weights", weights, "--json", tmp_path)
    assert done.returncode == 0
    assert os.fsencode(json.loads(done.stdout)["image"]) == name


def test_damaged_weights_give_no_prediction(weights: Path, pictures: Path, tmp_path: Path) -> None:
    tensors, metadata = _core.read_safetensors(str(weights))
    tensors["head.bias"][2] = np.nan
    path = tmp_path / "m.safetensors"
    _core.write_safetensors(str(path), tensors, metadata)
    done = run("predict", "--weights", path, "--json", pictures / "small.ppm")
    assert done.returncode == 1
    assert "not finite" in json.loads(done.stdout)["error"]

    tensors["head.bias"][2] = 0
    tensors["norm_f.weight"][3] = np.inf
    _core.write_safetensors(str(path), tensors, metadata)
    out = tmp_path / "features.safetensors"
    done = run("features", "--weights", path, "--out", out, pictures / "small.ppm")
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert not out.exists()


def test_progress_only_where_asked_for(weights: Path, pictures: Path) -> None:
    quiet = run("predict", "--weights", weights, pictures / "a.b")
    assert quiet.stderr == ""
    done = run("predict", "--weights", weights, "--progress", "--batch", "1", pictures / "a.b")
    assert done.stdout == quiet.stdout
    assert "/4 images" in done.stderr


def test_names_cannot_command_a_terminal(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every character there is, as a label, in both programs alike; paths and what was written, too."""
    everything = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x110000)]))
    folder = tmp_path / "\x1b]0;title\x07\u202e\x9b2J"
    folder.mkdir()
    shutil.copy(pictures / "small.ppm", folder)
    weights = save(tmp_path / "m.safetensors", [everything, "\x1b[2J", "a\r\nb", "\u00fcber\u200d", "\ufeff"])
    done = same_as_python(capsys, "predict", "--weights", weights, folder)
    harmful = {c for c in done.stdout if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
    assert harmful == {"\n", "\u00ad", "\u200c", "\u200d"}
    assert "a\\r\\nb\n" in done.stdout
    assert "\\x1b]0;title\\x07\\u202e\\x9b2J" in done.stdout
    shown = run("info", weights).stdout.replace("\n", "")
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Zl", "Zp")}
    for out in ("p.csv", "f.npy"):
        command = "predict" if out.endswith("csv") else "features"
        assert (
            "\x1b"
            not in run(command, "--weights", weights, "--out", folder / out, folder / "small.ppm").stdout
        )
        assert (
            main([command, "--weights", str(weights), "--out", str(folder / out), str(folder / "small.ppm")])
            == 0
        )
        assert "\x1b" not in capsys.readouterr().out
