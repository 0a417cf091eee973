# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`: classification of image files, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess
from ..data.clip_files import find_clips, read_clip
from ..data.picture_files import find_images, read_file, reason
from ..data.pictures import network_input
from ..results import Prediction, prediction_of
from ..runtime import Runtime
from ..utils.clips import clip_input

BATCH = 8


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
    steps, frames = runtime.picture_steps("predict", classes=True, clips=True), runtime.config["frames"] or 0
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
        yield prediction_of(path, values, runtime.labels, topk)
