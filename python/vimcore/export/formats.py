# SPDX-License-Identifier: Apache-2.0
"""ONNX, OpenVINO and torch.export files: how each is written, and opened to be compared with the core."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

Images = NDArray[np.float32]
INPUT, OUTPUT = "images", "logits"


def _onnx_program(traced: ExportedProgram, metadata: Mapping[str, str]) -> Any:
    """A torch.onnx.ONNXProgram, quietly."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
    finally:
        log.setLevel(level)
    assert program is not None  # with dynamo=True
    program.model.metadata_props.update(metadata)
    return program


def write_onnx(traced: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """One file, weights inside; beyond 2 GiB, ONNX's limit, torch puts them beside it."""
    _onnx_program(traced, metadata).save(path)


def open_onnx(path: Path, threads: int) -> Callable[[Images], Images]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


def write_openvino(traced: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """path and, with the weights in float32, the .bin beside it."""
    import openvino

    between = path.with_suffix(".onnx")
    write_onnx(traced, between, {})
    try:
        model = openvino.convert_model(str(between))
        for key, text in metadata.items():
            model.set_rt_info(text, key.split("."))
        openvino.save_model(model, str(path), compress_to_fp16=False)
    finally:
        for name in path.parent.glob(f"{between.name}*"):
            name.unlink()


def open_openvino(path: Path, threads: int) -> Callable[[Images], Images]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(str(path), "CPU", options)
    return lambda images: np.array(compiled({INPUT: images})[OUTPUT])


def write_pt2(traced: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    torch.export.save(traced, path, extra_files=dict(metadata))


def open_pt2(path: Path, threads: int) -> Callable[[Images], Images]:
    network = torch.export.load(path).module()

    def call(images: Images) -> Images:
        with torch.no_grad():
            found: Images = network(torch.from_numpy(images)).numpy()
            return found

    return call


ONNX = write_onnx, open_onnx
OPENVINO = write_openvino, open_openvino
PT2 = write_pt2, open_pt2
