# SPDX-License-Identifier: Apache-2.0
"""Classification of picture files, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .images import network_input
from .runtime import Runtime

SUFFIXES = (".jpeg", ".jpg", ".pgm", ".png", ".ppm")
BATCH = 8


@dataclass(frozen=True)
class Prediction:
    """The answer for one image, or the reason why there is none.

    Attributes:
        top: (class index, label or None, probability), most probable first.
        logits: float32 of all classes.
    """

    image: str
    top: list[tuple[int, str | None, float]]
    logits: NDArray[np.float32] | None = None
    error: str | None = None

    def to_json(self, with_logits: bool = False) -> str:
        """One line: probabilities with 6 significant digits, logits with 9, all that float32 holds."""
        if self.error is not None or self.logits is None:
            return json.dumps({"image": self.image, "error": self.error}, ensure_ascii=False)
        top = ", ".join(
            f'{{"index": {index}, "label": {json.dumps(label, ensure_ascii=False)}, "p": {p:.6g}}}'
            for index, label, p in self.top
        )
        line = f'{{"image": {json.dumps(self.image, ensure_ascii=False)}, "top": [{top}]'
        if with_logits:
            line += ', "logits": [' + ", ".join(f"{float(v):.9g}" for v in self.logits) + "]"
        return line + "}"


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """Files as given; folders are walked in sorted order for JPEG, PNG, PPM and PGM files."""
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        for folder, subfolders, files in os.walk(path):
            subfolders.sort()
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES):
                    yield os.path.join(folder, name)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits (classes)."""
    exponent = np.exp(logits.astype(np.float64) - float(logits.max()))
    return exponent / exponent.sum()


def predict(runtime: Runtime, paths: Iterable[str], topk: int = 5) -> Iterator[Prediction]:
    """Predictions for images and folders of images, in order; a bad image becomes a Prediction with an error.

    Raises:
        ValueError: ``topk`` is not positive, or the network has no classes to predict.
    """
    if topk < 1:
        raise ValueError(f"[predict] topk: expected at least 1, got {topk}")
    config = runtime.config
    if not config["num_classes"]:
        raise ValueError(
            "[predict] weights: the network has no head (num_classes=0), so there is nothing to predict"
        )
    if config["class_token"] == "none" and config["pool"] == "all":
        raise ValueError(
            '[predict] weights: with pool="all" there are logits for every patch, none for the image'
        )
    preprocess = runtime.preprocess
    given = len(preprocess["mean"]) if preprocess else "none that a picture file could fill"
    if preprocess is None or given != config["in_chans"]:
        raise ValueError(
            f"[predict] weights: the network takes {config['in_chans']} channels, "
            f"its preprocessing gives {given}"
        )
    options = json.dumps(preprocess)
    waiting: list[tuple[str, NDArray[np.float32] | str]] = []
    for path in find_images(paths):
        waiting.append((path, _load(path, options)))
        if len(waiting) == BATCH:
            yield from _classify(runtime, waiting, topk)
            waiting = []
    yield from _classify(runtime, waiting, topk)


def _load(path: str, options: str) -> NDArray[np.float32] | str:
    """The network's input, or what is wrong with the file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        return network_input(data, path, options)
    except OSError as error:
        return error.strerror or str(error)
    except (_core.Error, ValueError, MemoryError) as error:
        return str(error).removeprefix(f"[decode_image] {path}: ")  # the path is said by whoever prints this


def _classify(
    runtime: Runtime, waiting: list[tuple[str, NDArray[np.float32] | str]], topk: int
) -> Iterator[Prediction]:
    good = [image for _, image in waiting if not isinstance(image, str)]
    logits = iter(runtime(np.stack(good)) if good else ())
    for path, image in waiting:
        if isinstance(image, str):
            yield Prediction(path, [], error=image)
            continue
        values: NDArray[np.float32] = next(logits)
        if not np.isfinite(values).all():
            yield Prediction(
                path, [], error="the network gives values that are not finite; its weights are damaged"
            )
            continue
        p = softmax(values)
        order = np.argsort(-values, kind="stable")[:topk]
        labels: list[str] | Any = runtime.labels
        top = [(int(i), labels[i] if labels else None, float(p[i])) for i in order]
        yield Prediction(path, top, logits=values)
