# SPDX-License-Identifier: Apache-2.0
"""The binary vim-infer against the Python command and Runtime: the same lines, the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from safetensors import safe_open
from test_images import expected_input
from vimcore import _core
from vimcore.cli import main
from vimcore.io import save_model

LABELS = ["cat", 'a "dog"', "owl\\", "\u00fcber \U0001f600", "tab\t\x01\x7f"]


def find_binary() -> str:
    """The one that was installed with this Python's vimcore, or what VIM_INFER names."""
    beside = Path(sys.executable).parent / "vim-infer"
    named = os.environ.get("VIM_INFER") or (str(beside) if beside.exists() else shutil.which("vim-infer"))
    assert named, "vim-infer is not installed beside this Python"
    return named


BINARY = find_binary()


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [BINARY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def save(path: Path, labels: list[str] | None = None, **options: object) -> Path:
    torch.manual_seed(3)
    arguments = {
        "img_size": (24, 32),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_classes": 5,
        **options,
    }
    model = vimcore.VisionMamba(**arguments)
    if arguments["num_classes"]:
        torch.nn.init.normal_(model.head.weight, std=2)
    save_model(model, path, labels)
    return path


def picture(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        127 + 90 * np.sin((c + 1) * x / 11 + y / (7 + c)) + rng.normal(0, 20, x.shape) for c in range(3)
    ]
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "model.safetensors", LABELS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that is read, some that are not, and odd names."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / "a.b").mkdir()
    for i, sampling in enumerate(["4:4:4", "4:2:2", "4:2:0"]):
        for progressive in (False, True):
            path = folder / "b" / f"{sampling.replace(':', '')}{progressive:d}.jpg"
            picture(40 + 9 * i, 70 - 5 * i, i).save(path, subsampling=sampling, progressive=progressive)
    picture(33, 44, 3).convert("L").save(folder / "b" / "grey.JPEG")
    picture(33, 44, 4).convert("CMYK").save(folder / "b" / "cmyk.jpg")
    picture(90, 31, 5).save(folder / "a.b" / "rgb.png")
    picture(24, 32, 6).convert("P").save(folder / "a.b" / "palette.PNG")
    picture(50, 50, 7).convert("L").save(folder / "a.b" / "grey.png")
    rgba = picture(50, 80, 8).convert("RGBA")
    rgba.putalpha(picture(50, 80, 9).convert("L"))
    rgba.save(folder / "a.b" / "alpha.png")
    picture(5, 6, 10).save(folder / "small.ppm")
    picture(30, 40, 11).convert("L").save(folder / "b" / "deep" / "grey.pgm")
    picture(30, 40, 12).save(folder / 'quote" \\ and\ttab \u00e9.png')
    whole = (folder / "b" / "4440.jpg").read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "text.png").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "nowhere.png").symlink_to(folder / "absent")
    (folder / "b" / "circle").symlink_to(folder)
    return folder


def same_as_python(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Runs both commands with the same arguments; output, messages and status must agree."""
    done = run(*arguments)
    status = main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    assert done.stdout == out
    assert done.stderr.replace("\\x09", "\t") == error.replace("vimcore: ", "vim-infer: ")
    assert done.returncode == status
    return done


# ---- predict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [[], ["--json"], ["--json", "--logits"], ["--logits", "--topk", "2"]])
def test_the_very_same_lines(
    form: list[str], weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--json" not in form:  # as text a label's tab is printed raw by one and escaped by the other
        weights = save(weights.parent / "plain.safetensors", ["cat", "dog", "owl", "\u00fcber", ""])
    done = same_as_python(capsys, "predict", "--weights", weights, *form, pictures)
    assert done.returncode == 1
    assert "5 of 19 images failed" in done.stderr


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
            image = _core.preprocess_image(data, "x", json.dumps(runtime.preprocess))
            assert np.array_equal(np.array(line["logits"], np.float32), runtime(image[None])[0])


def test_logits_of_the_torch_module_with_pillow(weights: Path, pictures: Path) -> None:
    """The Python way without our image code: Pillow decodes and resizes, torch normalises and computes."""
    model = vimcore.VisionMamba.load(weights).eval()
    steps = vimcore.Runtime(weights).preprocess
    how = steps["resize"], steps["crop"], steps["mean"], steps["std"]
    done = run("predict", "--weights", weights, "--json", "--logits", pictures / "a.b", pictures / "b")
    good = [line for line in map(json.loads, done.stdout.splitlines()) if "logits" in line]
    assert len(good) == 12
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
    image = _core.preprocess_image(path.read_bytes(), "x", json.dumps(runtime.preprocess))
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


# ---- features ----------------------------------------------------------------------------------------------


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
        _core.preprocess_image(Path(name).read_bytes(), "x", json.dumps(runtime.preprocess)) for name in good
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


def test_features_skip_bad_pictures(weights: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    done = run("features", "--weights", weights, "--out", out, pictures)
    assert done.returncode == 1
    assert "5 of 19 images failed" in done.stderr
    with safe_open(out, "np") as file:
        assert file.get_tensor("features").shape == (14, 16)
        names = json.loads(file.metadata()["vimcore.images"])
    assert len(names) == 14
    assert str(pictures / "b" / "cut.jpg") not in names

    before = out.read_bytes()
    done = run("features", "--weights", weights, "--out", out, pictures / "empty.jpg")
    assert done.returncode == 1
    assert "nothing is written" in done.stderr
    assert out.read_bytes() == before
    done = run("features", "--weights", weights, "--out", tmp_path / "no" / "f", pictures)
    assert done.returncode == 1
    assert done.stderr == f"vim-infer: {tmp_path}/no/f: cannot write: No such file or directory\n"
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


# ---- info, bench -------------------------------------------------------------------------------------------


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
    assert facts["files"]["images"] == 4
    assert facts["files"]["share"] > 0
    text = run("bench", "--weights", weights, "--seconds", "0", pictures / "a.b").stdout
    assert "24 x 32" in text
    assert "from files:" in text


# ---- usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, "predict", "features", "info", "bench"])
def test_help(command: str | None) -> None:
    done = run("--help") if command is None else run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: vim-infer")
    if command is not None:
        assert "--json" in done.stdout
    assert run("--version").stdout == f"vim-infer {vimcore.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["predict", "x.png"],
        ["predict", "--weights", "w"],
        ["predict", "--weights"],
        ["predict", "--weights", "w", "--topk", "0", "x.png"],
        ["predict", "--weights", "w", "--threads", "many", "x.png"],
        ["predict", "--weights", "w", "--batch", "99999999999999999999", "x.png"],
        ["predict", "--weights", "w", "--img-size", "24x", "x.png"],
        ["predict", "--weights", "w", "--img-size", "0", "x.png"],
        ["predict", "--weights", "w", "--device", "tpu", "x.png"],
        ["predict", "--weights", "w", "--device", "cuda:-1", "x.png"],
        ["predict", "--weights", "w", "--json=yes", "x.png"],
        ["features", "--weights", "w", "x.png"],
        ["info", "a", "b"],
        ["info", "--frobnicate"],
        ["bench", "--weights", "w", "--sizes", "24,,32"],
        ["bench", "--weights", "w", "--seconds", "-1"],
    ],
)
def test_bad_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vim-infer: ")
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "no head"),
        ({"class_token": "none", "pool": "all"}, "every patch"),
        ({"in_chans": 4}, "4 channels"),
    ],
)
def test_networks_that_do_not_classify_pictures(
    options: dict, message: str, tmp_path: Path, pictures: Path
) -> None:
    path = save(tmp_path / "m.safetensors", **options)
    done = run("predict", "--weights", path, pictures)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1000000"], "threads: expected 0 to 1024, got 1000000"),
        (["--batch", "1000000000"], "bytes of memory, this machine has"),
        (["--img-size", "300000"], "bytes of memory, this machine has"),
        (["--img-size", "1000000000"], "img_size height: expected 1 to 1048576"),
    ],
)
def test_more_than_the_machine(options: list[str], message: str, weights: Path, pictures: Path) -> None:
    """Refused before any work, with what is needed."""
    done = run("predict", "--weights", weights, *options, pictures / "a.b")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_device_that_is_not_there(weights: Path, pictures: Path) -> None:
    done = run("predict", "--weights", weights, "--device", "cuda:77", pictures)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cuda" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_and_a_full_disk(weights: Path, pictures: Path) -> None:
    command = [BINARY, "predict", "--weights", str(weights), "--json", str(pictures / "a.b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr == "vim-infer: cannot write the results: No space left on device\n"
