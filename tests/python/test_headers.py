# SPDX-License-Identifier: Apache-2.0
"""What the header of a vimcore file claims: checked before anything is made of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vimcore
from vimcore import _core
from vimcore.cli import main

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_classes": 5}


def small(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, **options}).eval()


def readers(path: Any) -> tuple[Callable[[], Any], ...]:
    return partial(vimcore.VisionMamba.load, path), partial(vimcore.Runtime, path)


def one_line(run: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, _core.Error)) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A file of a small network with other metadata."""
    small().save(tmp_path / "good.safetensors")
    arrays, metadata = _core.read_safetensors(str(tmp_path / "good.safetensors"))

    def change(**parts: str) -> Path:
        path = tmp_path / "changed.safetensors"
        other = {**metadata, **{f"vimcore.{key}": value for key, value in parts.items()}}
        _core.write_safetensors(str(path), arrays, other)
        return path

    return change


def edited(**options: Any) -> str:
    return json.dumps({**_core.Config(**SMALL).to_dict(), **options})


HOSTILE = {
    "unknown key": (edited(deepness=3), 'unknown option "deepness"'),
    "memory": (edited(memory="fast"), 'unknown option "memory"'),
    "twice": (edited()[:-1] + ', "depth": 3}', 'duplicate key "depth"'),
    "float size": (edited(img_size=32.0), "img_size: expected"),
    "null size": (edited(img_size=None), "img_size: expected"),
    "null patch": (edited(patch_size=None), "patch_size: expected an integer, got null"),
    "no size": ('{"patch_size": 16}', "do not fit"),
    "empty": ("{}", "do not fit"),
    "list": ("[]", "expected an object"),
    "not json": ("{", "end of text"),
    "deep": (edited(depth=4096, embed_dim=512), "do not fit"),
    "wide": (edited(dt_rank=1_000_000), "do not fit"),
    "many classes": (edited(num_classes=1 << 24), "do not fit"),
    "pixels between patches": (edited(stride=32), "stride: expected at most patch_size"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_configurations(kind: str, changed: Callable[..., Path]) -> None:
    config, part = HOSTILE[kind]
    path = changed(config=config)
    for run in readers(path):
        start = time.process_time()
        with pytest.raises((ValueError, _core.Error)) as caught:
            run()
        assert time.process_time() - start < 0.5
        assert part in str(caught.value)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1500


def test_rotation_tables_larger_than_the_machine(tmp_path: Path) -> None:
    options = {**SMALL, "class_token": "head", "rope": True, "pos_embed": False}
    small(**options).save(tmp_path / "a.safetensors")
    arrays, metadata = _core.read_safetensors(str(tmp_path / "a.safetensors"))
    side = (1 << 19) - 16
    metadata["vimcore.config"] = metadata["vimcore.config"].replace("[32, 32]", f"[{side}, {side}]")
    _core.write_safetensors(str(tmp_path / "a.safetensors"), arrays, metadata)
    with pytest.raises(ValueError, match=r"rotation tables of 524272 x 524272 pixels need \d+ GB"):
        vimcore.VisionMamba.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ('["a"]', "expected 5, one for each class, got 1"),
        ('["a", "b", "c", "d", "e", "f"]', "got 6"),
        ("[1, 2, 3, 4, 5]", "expected a string"),
        ('["a", "b", "c", "d", null]', "expected a string"),
        ('["a", "b", "c", "d", ["e"]]', "expected a string"),
        ('{"a": 1}', "expected an array"),
        ("x", "vimcore.labels"),
    ],
)
def test_labels_are_checked_when_they_are_read(
    labels: str, part: str, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(labels=labels)
    for run in readers(path):
        text = one_line(run)
        assert part in text
        assert str(path) in text
    for command in (["predict", "--weights", str(path), "x.png"], ["info", str(path)]):
        assert main(command) == 1
        assert part in capsys.readouterr().err
    assert vimcore.Runtime(changed(labels="[]")).labels is None


@pytest.mark.parametrize(
    ("steps", "part"),
    [
        ({"mean": [0, 0, 1e308]}, "mean: expected -1e+06 to 1e+06, got 1e+308"),
        ({"std": [1, 1, 1e-300]}, "std: expected 1e-06 to"),
        ({"std": [1, 1, -1]}, "std: expected 1e-06 to"),
        ({"resize": 1.5}, "resize: expected an integer"),
        ({"resize": -1}, "resize: expected 0 to"),
        ({"mean": "x"}, "mean: expected an array"),
        ({"colour": 1}, 'unknown key "colour"'),
    ],
)
def test_preprocessing_is_checked_when_it_is_read(
    steps: dict[str, Any], part: str, changed: Callable[..., Path]
) -> None:
    good = _core.Preprocess().to_dict()
    path = changed(preprocess=json.dumps({**good, **steps}))
    for run in readers(path):
        text = one_line(run)
        assert part in text
        assert str(path) in text


@pytest.mark.slow
def test_many_stray_tensors_are_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    small().save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps({**header, **{f"stray.{i}": empty for i in range(100_000)}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for run in readers(path):
        start = time.process_time()
        with pytest.raises(
            (ValueError, _core.Error), match=r"unexpected: stray.0 [^;]*and 99988 more"
        ) as caught:
            run()
        assert time.process_time() - start < 1
        assert len(str(caught.value)) < 1500
