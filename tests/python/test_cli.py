# SPDX-License-Identifier: Apache-2.0
"""The command line: results, exit statuses, one readable line for an error."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
import vimcore.cli
from vimcore import _core
from vimcore.cli import COMMANDS, main
from vimcore.data.digits import encode_png
from vimcore.io import save_model
from vimcore.utils.extras import needs, required

LABELS = ["cat", "dog", "owl", "\u00fcber"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for 24 x 32 pictures of any size."""
    torch.manual_seed(3)
    model = vimcore.VisionMamba(img_size=(24, 32), patch_size=8, embed_dim=16, depth=2, num_classes=4)
    torch.nn.init.normal_(model.head.weight, std=2)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(model, path, LABELS)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of folders with twelve pictures, a damaged one, an empty one and a file that is no picture."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for i in range(12):
        part = folder / ("b" if i % 2 else "a")
        part.mkdir(parents=True, exist_ok=True)
        shape = (30 + i, 50 - i) if i % 3 == 0 else (30 + i, 50 - i, 3)
        (part / f"{11 - i:02d}.png").write_bytes(encode_png(rng.integers(0, 256, shape).astype(np.uint8)))
    (folder / "a" / "bad.png").write_bytes(b"not a picture")
    (folder / "b" / "empty.JPG").write_bytes(b"")
    (folder / "b" / "notes.txt").write_text("not looked at")
    return folder


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- predict -----------------------------------------------------------------------------------------------


def test_predict_a_folder(weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["predict", "--weights", str(weights), "--json", "--logits", "--topk", "2", str(pictures)])
    out, error = capsys.readouterr()
    assert status == 1  # two of the pictures are damaged; the others are done
    found = lines(out)
    names = [os.path.relpath(line["image"], pictures) for line in found]
    a = [f"a/{i:02d}.png" for i in range(1, 12, 2)] + ["a/bad.png"]
    b = [f"b/{i:02d}.png" for i in range(0, 12, 2)] + ["b/empty.JPG"]
    assert names == a + b
    assert found[-1].pop("passed_over") == {".txt": 1}
    assert error.splitlines()[-2:] == ["vimcore: passed over: 1 .txt", "vimcore: 2 of 14 images failed"]
    bad = [line for line in found if "error" in line]
    assert [os.path.basename(line["image"]) for line in bad] == ["bad.png", "empty.JPG"]
    for line in bad:
        assert set(line) == {"image", "error"}
        assert line["error"]
        assert line["image"] not in line["error"]
        assert f"vimcore: {line['image']}: {line['error']}" in error.splitlines()

    runtime = vimcore.Runtime(weights)
    for line in found:
        if "error" in line:
            continue
        data = Path(line["image"]).read_bytes()
        image = _core.preprocess_image(data, "x", _core.Preprocess(**runtime.preprocess))
        logits = runtime(image[None])[0]
        assert set(line) == {"image", "top", "logits"}
        assert np.array_equal(np.array(line["logits"], np.float32), logits)  # 9 digits hold every bit
        p = torch.softmax(torch.from_numpy(logits).double(), 0).numpy()
        order = np.argsort(-logits)[:2]
        assert [entry["index"] for entry in line["top"]] == order.tolist()
        assert [entry["label"] for entry in line["top"]] == [LABELS[i] for i in order]
        assert [entry["p"] for entry in line["top"]] == pytest.approx(p[order].tolist(), rel=1e-5)


def test_predict_as_table(weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(pictures / "a" / "01.png")
    assert main(["predict", "--weights", str(weights), "--topk", "9", image]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == image
    assert len(rows) == 5  # no more classes than there are
    assert rows[1].split()[1] == "%"
    assert sum(float(row.split()[0]) for row in rows[1:]) == pytest.approx(100, abs=0.01)
    assert {row.split()[-1] for row in rows[1:]} == set(LABELS)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_predict_does_not_depend_on_company_or_threads(
    weights: Path, pictures: Path, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["predict", "--weights", str(weights), "--json", "--logits", "--threads", threads]
    main([*common, str(pictures)])
    together = {line["image"]: line for line in lines(capsys.readouterr().out)}
    for image in sorted(together)[:4]:
        main([*common, image])
        assert lines(capsys.readouterr().out) == [together[image]]


def test_predict_without_labels(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vimcore.VisionMamba(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_classes=3)
    model.save(tmp_path / "m.safetensors")
    arguments = [
        "predict",
        "--weights",
        str(tmp_path / "m.safetensors"),
        "--json",
        str(pictures / "a" / "01.png"),
    ]
    assert main(arguments) == 0
    (line,) = lines(capsys.readouterr().out)
    assert [entry["label"] for entry in line["top"]] == [None] * 3


@pytest.mark.slow
def test_training_says_what_it_needs() -> None:
    program = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\n"
        "from vimcore.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for missing, arguments in (("timm", ["train", "--data", "digits"]), ("torchvision", ["eval", "run"])):
        done = subprocess.run(
            [sys.executable, "-c", program, missing, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr == f"vimcore: training needs {missing}; {needs('train')}\n"


@pytest.mark.slow
def test_help_is_quick() -> None:
    """No command imports torch, timm or matplotlib, or the module of another command, before it runs."""
    program = (
        "import contextlib, io, sys\n"
        "from vimcore.cli import COMMANDS, main\n"
        "for missing in ('torch', 'timm', 'matplotlib'): sys.modules[missing] = None\n"
        "for command in COMMANDS:\n"
        "    before = set(sys.modules)\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main([command, '--help'])\n"
        "    new = {n for n in set(sys.modules) - before if n.startswith('vimcore.cli.')}\n"
        "    shared = {f'vimcore.cli.{name}' for name in ('computing', 'output', 'progress', 'results')}\n"
        "    assert new - shared == {f'vimcore.cli.{command}'}, (command, new)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_a_file_or_folder() -> None:
    here = Path(vimcore.cli.__file__).parent
    files = {path.stem for path in here.glob("*.py")} | {path.parent.name for path in here.glob("*/*.py")}
    assert files == {*COMMANDS, "__init__", "computing", "output", "progress", "results", "streams"}


def test_a_missing_package_is_named() -> None:
    text = r"drawing needs absent_package; .*'\.\[demo\]'"
    with pytest.raises(RuntimeError, match=text), required("drawing", "demo"):
        importlib.import_module("absent_package.part")
    with pytest.raises(ModuleNotFoundError, match=r"vimcore\.absent"), required("drawing", "demo"):
        importlib.import_module("vimcore.absent")  # our own mistake: nothing to install


@pytest.mark.slow
def test_predict_needs_no_torch(weights: Path, pictures: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from vimcore.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.exit(status)"
    )
    for arguments in (
        ["predict", "--weights", str(weights), "--json", str(pictures / "a" / "01.png")],
        ["info", str(weights)],
        ["--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "no head"),
        ({"class_token": "none", "pool": "all"}, "every patch"),
        ({"in_chans": 4}, "4 channels"),
    ],
)
def test_predict_with_networks_that_do_not_classify_pictures(
    tmp_path: Path, pictures: Path, options: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vimcore.VisionMamba(
        **{"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 3, **options}
    )
    model.save(tmp_path / "m.safetensors")
    assert main(["predict", "--weights", str(tmp_path / "m.safetensors"), str(pictures)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


# ---- info --------------------------------------------------------------------------------------------------


def test_info(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(weights), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = vimcore.VisionMamba.load(weights)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["flops"] == model.flops()
    assert facts["config"] == model.config
    assert facts["labels"] == LABELS
    assert facts["preprocess"]["crop"] == [24, 32]
    assert (facts["tokens"], facts["grid"]) == (13, [3, 4])
    assert facts["bytes"] == weights.stat().st_size
    assert main(["info", str(weights)]) == 0
    text = capsys.readouterr().out
    for part in (
        f"{facts['parameters']:,}",
        "3 x 4 patches, class tokens: 1",
        "cat, dog",
        "embed_dim",
        '"middle"',
    ):
        assert part in text


def test_info_of_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, half, text = (
        tmp_path / name for name in ("bare.safetensors", "half.safetensors", "text.safetensors")
    )
    _core.write_safetensors(str(bare), {"x": np.zeros(3, np.float32)}, {})
    config = json.dumps({"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1})
    _core.write_safetensors(str(half), {"x": np.zeros(3, np.float32)}, {"vimcore.config": config})
    text.write_text("hello")
    for path, message in (
        (bare, "no vimcore.config"),
        (half, "tensors do not fit vimcore.config"),
        (text, "text.safetensors"),
        (tmp_path / "absent.safetensors", "absent.safetensors"),
    ):
        assert main(["info", str(path)]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert message in error
        assert error.startswith("vimcore: ")
        assert error.count("\n") == 1


# ---- usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"] if command is None else [command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    if command is None:
        assert all(name in text for name in COMMANDS)
    else:
        assert "--json" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["predict", "x.png"],
        ["predict", "--weights", "w"],
        ["predict", "--weights", "w", "--topk", "0", "x.png"],
        ["predict", "--weights", "w", "--threads", "many", "x.png"],
        ["demo", "--epochs", "-1"],
        ["info"],
        ["convert", "a"],
        ["doctor", "--frobnicate"],
        ["train", "--frobnicate"],
        ["train", "--preset", "huge"],
        ["train", "--lr", "fast"],
        ["eval"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: vimcore" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "usage", "said"),
    [
        (["predict", "--weights", "w", "--jsn", "x.png"], "predict", "--jsn (did you mean --json?)"),
        (["plan", "--device-memry=8G"], "plan", "--device-memry=8G (did you mean --device-memory?)"),
        (["predcit", "x.png"], "[-h]", "no command 'predcit' (did you mean predict?); see vimcore --help"),
        (["frobnicate", "predict"], "[-h]", "no command 'frobnicate'; see vimcore --help"),
        (["info", "a", "b"], "info", "unrecognized arguments: b\n"),
        (["doctor", "--frobnicate"], "doctor", "unrecognized arguments: --frobnicate\n"),
        (["--threads", "doctor"], "[-h]", "unrecognized arguments: --threads\n"),
        (["plan", "--threads", "1025"], "plan", "expected a whole number from 1 to 1024, got '1025'"),
        (["bench", "--sample", "nan"], "bench", "expected a number of seconds from 0 to 1000000, got 'nan'"),
        (["bench", "--batch", "1,"], "bench", "expected a whole number from 1 to 1000000000, got ''"),
    ],
)
def test_the_command_that_was_meant_answers(
    arguments: list[str], usage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"usage: vimcore {usage}")
    assert said in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert vimcore.__version__ in capsys.readouterr().out


def test_missing_weights_and_empty_folder(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--weights", str(tmp_path / "absent"), "x.png"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["predict", "--weights", str(weights), str(tmp_path)]) == 1
    assert "no pictures found" in capsys.readouterr().err
    assert main(["predict", "--weights", str(weights), "--json", str(tmp_path / "absent.png")]) == 1
    (line,) = lines(capsys.readouterr().out)
    assert line == {"image": str(tmp_path / "absent.png"), "error": "No such file or directory"}


def test_a_reader_that_leaves(weights: Path, pictures: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vimcore",
        "predict",
        "--weights",
        str(weights),
        "--json",
        str(pictures / "a"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=120) == 1
    assert error == ""
