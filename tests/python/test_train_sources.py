# SPDX-License-Identifier: Apache-2.0
"""Data sets by timm's names: archives, torchvision's, the hub's; what streams is refused."""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_helpers import ONCE, SMALL, folder, log, stopped
from vimcore.cli import main
from vimcore.data.classes import open_images, training_and_validation
from vimcore.data.transforms import UnreadableError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def archive(data: Path) -> Path:
    """The same pictures, one of them damaged, in the order that the file system has them in."""
    path = data.parent / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(data, "")
    return path


def flags(name: object) -> list[str]:
    more = ["--epochs", "2", "--val-fraction", "0.3", "--log-every", "1", "--lr", "1e-2"]
    return ["--data", str(name), *SMALL, *ONCE, *more]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "torch"])
def test_trained_and_resumed(kind: str, data: Path, archive: Path, tmp_path: Path) -> None:
    """From these as from the folder itself, read by two processes, stopped and resumed: the same bits."""
    name = f"tar:{archive}" if kind == "tar" else f"torch/image_folder:{data}"
    found, wanted = open_images(name), open_images(str(data))
    assert found.classes == wanted.classes == ["digit 0", "digit 1", "digit 7"]
    assert np.array_equal(found.labels, wanted.labels)
    assert [Path(file).name for file in found.files] == [Path(file).name for file in wanted.files]
    for i in (0, 13, 35):
        assert np.array_equal(found.read(i), wanted.read(i))
        assert np.array_equal(pickle.loads(pickle.dumps(found)).read(i), wanted.read(i))
    assert np.array_equal(found.subset(np.array([20, 3])).read(1), wanted.read(3))

    assert main(["train", *flags(data), "--out", str(tmp_path / "whole")]) == 0
    run = stopped(tmp_path / "run", 4, *flags(name), "--workers", "2")
    assert main(["train", "--resume", str(run), "--workers", "0"]) == 0
    assert log(run) == log(tmp_path / "whole")
    for weights in ("last", "last_ema", "best"):
        weights += ".safetensors"
        assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert main(["eval", str(run), "--workers", "0", "--json"]) == 0


@pytest.mark.slow
def test_a_damaged_member(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Skipped and told, as a file is; timm alone would go on to the next one in silence."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(data, "")
        (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        tar.add(tmp_path / "bad.png", "digit 0/zzz.png")
    images = open_images(f"tar:{tmp_path / 'a.tar'}")
    bad = next(i for i, name in enumerate(images.files) if name.endswith("zzz.png"))
    with pytest.raises(UnreadableError):
        images.read(bad)
    assert images.read(bad + 1).shape[2] == 3
    arguments = [*flags(f"tar:{tmp_path / 'a.tar'}"), "--val", f"tar:{tmp_path / 'a.tar'}"]
    assert main(["train", *arguments, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert f"vimcore: skipped tar:{tmp_path / 'a.tar'}/digit 0/zzz.png: " in capsys.readouterr().err


def test_processes_do_not_share_an_open_archive(archive: Path) -> None:
    """A child that reads moves no position in the parent's file."""
    images = open_images(f"tar:{archive}")
    wanted = images.read(5)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            for i in range(36):
                images.read(i)
            os._exit(0)
        for _ in range(20):
            assert np.array_equal(images.read(5), wanted)
        assert os.waitpid(child, 0)[1] == 0


class _Hub:
    """As much of a data set of the package `datasets` as timm looks at."""

    def __init__(self, data: Path, split: str) -> None:
        names = sorted(data.rglob("*.png"))
        names = names if split == "train" else names[::5]
        labels = [int(name.parent.name[-1] == "7") for name in names]
        self.rows = [
            {"image": {"bytes": n.read_bytes(), "path": n.name}, "label": i} for n, i in zip(names, labels)
        ]
        classes = types.SimpleNamespace(names=["other", "seven"])
        self.info = types.SimpleNamespace(features={"label": classes}, splits=None)

    def cast_column(self, *_: object) -> _Hub:
        return self

    def remove_columns(self, *_: object) -> list[dict[str, Any]]:
        return [{"label": row["label"]} for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_the_hub(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through timm's reader; splits by name, else train to learn from and validation to validate on."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str, cache_dir: str | None) -> _Hub:
        asked.append((name, split))
        return _Hub(data, split)

    module = types.ModuleType("datasets")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.Image = lambda decode: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    train, valid, _ = training_and_validation("hfds/Some/Digits", "hfds/Some/Digits", 0.1)
    assert asked == [("Some/Digits", "train"), ("Some/Digits", "validation")]
    assert train.classes == ["other", "seven"]
    assert (len(train), len(valid), int(train.labels.sum())) == (36, 8, 12)
    assert np.array_equal(train.read(4), open_images(str(data)).read(4))
    open_images("hfds/Some/Digits#test")
    assert asked[-1] == ("Some/Digits", "test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wds/shards", "wds is a stream without a fixed length and order"),
        ("hfids/mnist", "hfids is a stream"),
        ("tfds/mnist", "tfds is a stream"),
        ("tar:absent.tar", "absent.tar: No such file or directory"),
        ("tar:a.zip", "expected a file whose name ends with .tar"),
        ("torch/cifar10", "expected torch/NAME:FOLDER"),
        ("torch/nothing:.", "Unknown torchvision dataset nothing"),
        ("hfds/mnist", "hfds/mnist: needs the package datasets"),
    ],
)
def test_refused(
    name: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["train", "--data", name, "--out", str(tmp_path / "run")]) == 1
    out, error = capsys.readouterr()
    assert message in error
    assert (out, error.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_such_a_name_is_a_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "images").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    assert len(open_images("torch/images")) == 36
