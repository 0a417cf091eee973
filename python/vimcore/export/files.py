# SPDX-License-Identifier: Apache-2.0
"""Files for other programs, each compared with the core before it takes its name."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import Dim, ExportedProgram

from .. import _core
from .._core import Preprocess
from ..nn.vision_mamba import VisionMamba
from ..utils.extras import required
from ..weights.metadata import EMBEDDING_KEY, pack, task_of_file, unpack
from . import formats
from .network import ExportNetwork

Images = NDArray[np.float32]
Call = Callable[[Images], Images]

TOLERANCE = 1e-4  # of the largest difference, relative to the largest logit where that is above 1
BATCHES = (1, 3)  # that are compared
PAIRS = 5  # calls that are timed of the file and of the core


@dataclass(frozen=True)
class Format:
    """How a kind of file is written and opened.

    Attributes:
        suffix: of the file.
        program: what runs it, for messages.
        packages: to import before anything is computed.
        write: (traced network, file, metadata): writes the file, and others of the same stem.
        open: (file, threads) -> a function of normalised images.
    """

    suffix: str
    program: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]
    open: Callable[[Path, int], Call]


FORMATS = {
    "onnx": Format(".onnx", "ONNX Runtime", ("onnx", "onnxscript", "onnxruntime"), *formats.ONNX),
    "openvino": Format(".xml", "OpenVINO", ("onnx", "onnxscript", "openvino"), *formats.OPENVINO),
    "pt2": Format(".pt2", "torch.export", (), *formats.PT2),
}


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        files: their names, the one to open first.
        difference: the largest between its results and the core's, over the batches compared.
        milliseconds, core_milliseconds: of one image, medians of interleaved calls.
    """

    files: tuple[str, ...]
    difference: float
    milliseconds: float
    core_milliseconds: float


def export(
    weights: str | os.PathLike[str],
    kind: str,
    out: str | os.PathLike[str],
    img_size: int | tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Writes a classifier, or a backbone without head, for a program that knows nothing of vimcore.

    The file takes `images`, normalised (B, C, H, W) float32 with any B, and gives `logits` as the core does;
    labels, preprocessing and architecture stand in its metadata under the keys of vimcore's own files.

    Args:
        weights: a vimcore file.
        kind: a key of FORMATS.
        out: the file to write, with the suffix of its format. OpenVINO's has a second one, .bin, beside it;
            where the CPU has bfloat16, OpenVINO takes that unless INFERENCE_PRECISION_HINT says f32.
        img_size: side or (height, width) in pixels; None: as stored. The file is for this size alone.
        threads: of comparison and timing; None: all cores.
        progress: is told what happens next.

    Raises:
        ValueError: kind, suffix, size or task do not fit.
        RuntimeError: a package is missing, or results differ by more than 1e-4; nothing is left behind.
    """
    if kind not in FORMATS:
        raise ValueError(f"[export] kind: expected one of {', '.join(FORMATS)}, got {kind!r}")
    form, path = FORMATS[kind], Path(out)
    if path.suffix.lower() != form.suffix:
        raise ValueError(f"[export] out: expected a name that ends with {form.suffix}, got {path}")
    with required(f"export to {kind}", "export"):
        for package in form.packages:
            __import__(package)
    task = task_of_file(weights)
    if task != "classify":
        raise ValueError(
            f"[export] weights: {weights} is for --task {task}; classifiers and backbones can be exported, "
            "segmentation runs without Python by vim-infer segment"
        )
    model = VisionMamba.load(weights, img_size=img_size)
    count = threads or torch.get_num_threads()
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the destination, so that files change only their names
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made = Path(folder) / path.name
        progress("following the network")
        traced = trace(model)
        progress(f"writing {path}")
        form.write(traced, made, _metadata(weights, model))
        progress(f"comparing {form.program} with the core")
        call = form.open(made, count)
        difference = _compared(call, model, form.program)
        figures = _timed(call, model, count)
        names = sorted(Path(folder).iterdir(), key=lambda name: name.suffix != path.suffix)
        for name in reversed(names):  # the one that refers to others comes last
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(name, path.parent / name.name)
    return Exported(tuple(str(path.parent / name.name) for name in names), difference, *figures)


def trace(model: VisionMamba) -> ExportedProgram:
    """The graph of a model's eval mode for any batch of images of its size."""
    network = ExportNetwork(model)
    images = torch.zeros(2, *_axes(model))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own code
        return torch.export.export(network, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


def _metadata(weights: str | os.PathLike[str], model: VisionMamba) -> dict[str, str]:
    """As in the file of weights, for this size of images."""
    stored = _core.safetensors_header(os.fspath(weights))[1]
    about = unpack(stored, weights)
    config = model._config
    steps = about.preprocess.rescaled(*config.img_size) if about.preprocess else Preprocess.default(config)
    kept = {EMBEDDING_KEY: stored[EMBEDDING_KEY]} if EMBEDDING_KEY in stored else {}
    return {**pack(config, about.labels, steps.to_dict() if steps else None), **kept}


def _computed(model: VisionMamba, images: Images) -> Images:
    with torch.no_grad():
        found: Images = model(torch.from_numpy(images)).numpy()
        return found


def _images(model: VisionMamba, batch: int) -> Images:
    return np.random.default_rng(batch).standard_normal((batch, *_axes(model)), dtype=np.float32)


def _axes(model: VisionMamba) -> tuple[int, ...]:
    """(C, H, W) of images, (C, T, H, W) of clips."""
    config = model._config
    frames = (config.frames,) if config.frames else ()
    return (config.in_chans, *frames, *config.img_size)


def _compared(call: Call, model: VisionMamba, program: str) -> float:
    """The largest difference; RuntimeError: it is too large."""
    worst = 0.0
    for batch in BATCHES:
        images = _images(model, batch)
        wanted, found = _computed(model, images), call(images)
        if found.shape != wanted.shape:
            raise RuntimeError(
                f"[export] {program} gives {found.shape} for {batch} images, not {wanted.shape}"
            )
        difference = float(np.abs(found - wanted).max())
        allowed = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
        if not difference <= allowed:
            raise RuntimeError(
                f"[export] {program} differs from the core by {difference:.3g}, expected at most "
                f"{allowed:.3g}; nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _timed(call: Call, model: VisionMamba, threads: int) -> tuple[float, float]:
    """Milliseconds for one image, of the file and of the core."""
    images, seconds = _images(model, 1), ([], [])  # type: tuple[Images, tuple[list[float], list[float]]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(PAIRS):
            for times, once in zip(seconds, (call, lambda x: _computed(model, x))):
                begin = time.perf_counter()
                once(images)
                times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 1e3 * median(seconds[0]), 1e3 * median(seconds[1])
