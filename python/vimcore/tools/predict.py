# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`: classification of image files, without torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Config, Preprocess
from ..data.clip_files import find_clips, read_clip
from ..data.picture_files import find_images, read_file, reason
from ..data.pictures import network_input
from ..runtime import Runtime
from ..utils.clips import clip_input

BATCH = 8


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the error that prevented it.

    Attributes:
        top: (class index, label or None, probability), most probable first.
        logits: float32 of all classes.
    """

    image: str
    top: list[tuple[int, str | None, float]]
    logits: NDArray[np.float32] | None = None
    error: str | None = None

    def to_json(self, with_logits: bool = False, passed_over: Mapping[str, int] | None = None) -> str:
        """One line of JSON: probabilities with 6 significant digits, logits with 9, which float32 needs.

        Args:
            passed_over: number of skipped files by suffix, added to the line of the last image.
        """
        line = f'{{"image": {json_text(self.image)}'
        if self.error is not None or self.logits is None:
            line += f', "error": {json_text(self.error)}'
        else:
            top = ", ".join(
                f'{{"index": {index}, "label": {json_text(label)}, "p": {p:.6g}}}'
                for index, label, p in self.top
            )
            line += f', "top": [{top}]'
            if with_logits:
                line += ', "logits": [' + ", ".join(f"{float(v):.9g}" for v in self.logits) + "]"
        if passed_over:
            line += f', "passed_over": {json_text(dict(sorted(passed_over.items())))}'
        return line + "}"


def json_text(value: Any) -> str:
    """JSON in UTF-8; bytes of file names that are not UTF-8 are written as \\udc80 to \\udcff."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits (classes)."""
    exponent = np.exp(logits.astype(np.float64) - float(logits.max()))
    return exponent / exponent.sum()


def predict(
    runtime: Runtime, paths: Iterable[str], topk: int = 5, passed_over: Counter[str] | None = None
) -> Iterator[Prediction]:
    """Predictions for images and folders of images, in order; a bad image becomes a Prediction with an error.

    Of a network of clips, for folders of frames and .npy files, see `clip_files`.

    Args:
        passed_over: counts files in folders that are not images, by suffix.

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
    if len(Config(**config).logits_shape(1)) == 3:
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
    steps, frames = Preprocess(**preprocess), config["frames"] or 0
    waiting: list[tuple[str, NDArray[np.float32] | str]] = []
    found = (clip for path in paths for clip in find_clips(path, passed_over))
    for path in found if frames else find_images(paths, passed_over):
        waiting.append((path, _load(path, steps, frames)))
        if len(waiting) == BATCH:
            yield from _classify(runtime, waiting, topk)
            waiting = []
    yield from _classify(runtime, waiting, topk)


def _load(path: str, steps: Preprocess, frames: int) -> NDArray[np.float32] | str:
    """The network's input (C, H, W), of a clip (C, T, H, W), or the reason why the file cannot be read."""
    try:
        if frames:
            return clip_input(read_clip(path, frames), frames, steps)
        return network_input(read_file(path), "", steps)
    except (_core.Error, OSError, ValueError, MemoryError) as error:
        return reason(error).removeprefix(f"{path}: ")  # the path is said by whoever prints this


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
