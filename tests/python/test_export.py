# SPDX-License-Identifier: Apache-2.0
"""Files for ONNX Runtime, OpenVINO and torch.export: their results, what they say of themselves, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from helpers import build, images_for, small
from torch import Tensor
from vimcore.cli import main
from vimcore.export import FORMATS, export
from vimcore.export.network import ExportNetwork
from vimcore.nn.saving import save

DESIGNS: dict[str, dict[str, Any]] = {
    "middle": {},
    "none, mean": {"class_token": "none", "pool": "mean", "directions": "none"},
    "none, all": {"class_token": "none", "pool": "all", "directions": "ssm"},
    "double, pairs": {"class_token": "double", "directions": "block"},
    "head, rope": {"class_token": "head", "rope": True, "rope_residual": True, "rope_grid": 2},
    "sum, scale": {"average_directions": False, "layer_scale": 0.1, "norm": "layer"},
    "registers, neck": {"class_token": "registers", "registers": 4, "neck_reduction": 2},
    "clips": {"class_token": "head", "frames": 2},
    "backbone": {"num_classes": 0, "d_state": 8},
}


@pytest.mark.parametrize("options", DESIGNS.values(), ids=DESIGNS)
def test_network_of_other_operations_is_the_network(options: Mapping[str, Any]) -> None:
    config = small(**options)
    model, images = build(config).eval(), images_for(config, 3, torch.float32)
    with torch.no_grad():
        found, wanted = ExportNetwork(model)(images), model(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "vim.safetensors"
    save(build(small(in_chans=3)), path, labels=["ä", "b", "c"])
    return path


def run_onnx(path: Path, images: Tensor) -> tuple[Any, dict[str, str]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    return session.run(["logits"], {"images": images.numpy()})[0], metadata


def run_openvino(path: Path, images: Tensor) -> tuple[Any, dict[str, str]]:
    import openvino

    model = openvino.Core().read_model(str(path))
    metadata = {
        f"vimcore.{key}": model.get_rt_info(["vimcore", key]).astype(str) for key in ("labels", "config")
    }
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # its default is bfloat16 where the CPU has that
    return openvino.compile_model(model, "CPU", exact)({"images": images.numpy()})["logits"], metadata


def run_pt2(path: Path, images: Tensor) -> tuple[Any, dict[str, str]]:
    metadata = {"vimcore.labels": "", "vimcore.config": ""}
    network = torch.export.load(path, extra_files=metadata).module()
    with torch.no_grad():
        return network(images).numpy(), metadata


PROGRAMS = {"onnx": run_onnx, "openvino": run_openvino, "pt2": run_pt2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
def test_files_give_the_logits_and_tell_what_they_are(
    kind: str, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command, at another size than the file's, for a batch that was not compared while exporting."""
    out = tmp_path / f"vim{FORMATS[kind].suffix}"
    command = ["export", "--weights", str(weights), f"--{kind}", str(out), "--img-size", "12", "16", "--json"]
    assert main(command) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["files"][0] == str(out)
    assert said["difference"] < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(f).name for f in said["files"])
    images = images_for(replace(small(in_chans=3), img_size=(12, 16)), 5, torch.float32)
    found, metadata = PROGRAMS[kind](out, images)
    wanted = vimcore.Runtime(weights, img_size=(12, 16))(images.numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert json.loads(metadata["vimcore.labels"]) == ["ä", "b", "c"]
    assert json.loads(metadata["vimcore.config"])["img_size"] == [12, 16]


def test_a_file_that_computes_something_else_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(FORMATS["pt2"], open=lambda path, threads: lambda images: np.zeros((len(images), 3), "f"))
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(RuntimeError, match="differs from the core"):
        export(weights, "pt2", tmp_path / "vim.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(
    weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"ends with \.onnx"):
        export(weights, "onnx", tmp_path / "vim.pt")
    with pytest.raises(ValueError, match="one of onnx, openvino, pt2"):
        export(weights, "tflite", tmp_path / "vim.tflite")
    from vimcore.segmentation import FCN

    dense = tmp_path / "dense.safetensors"
    FCN(build(small(num_classes=0, class_token="none")), 3, channels=8).save(dense, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="vim-infer segment"):
        export(dense, "pt2", tmp_path / "vim.pt2")
    assert main(["export", "--weights", str(weights)]) == 1
    assert "--onnx" in capfd.readouterr().err
