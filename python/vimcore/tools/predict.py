# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`: classification of image files, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._core import Preprocess
from ..data.clip_files import find_clips, read_clip
from ..data.named_files import named, pictures_of, read_input
from ..data.picture_files import reason
from ..data.pictures import network_input
from ..results import Prediction, prediction_of
from ..runtime import Runtime
from ..utils.clips import clip_input

BATCH = 8
Floats = NDArray[np.float32]


def inputs_of(frames: int | None, arguments: Sequence[str], passed_over: Counter[str]) -> list[str]:
    """What to look at: picture files; for a network of clips, of so many frames, what `clip_files` finds.

    Args:
        arguments: see `data.named_files`.
        passed_over: counts other files in folders, by suffix.
    """
    if not frames:
        return pictures_of(arguments, passed_over)
    return [clip for name in named(arguments) for clip in find_clips(name, passed_over)]


def answers(
    names: Iterable[str],
    steps: Preprocess,
    frames: int | None,
    compute: Callable[[Floats], Floats],
    batch: int = BATCH,
) -> Iterator[tuple[str, Floats | str]]:
    """What a network says of pictures or clips, in order: a row, or the reason why a file cannot be read.

    Args:
        names: as `inputs_of` gives them.
        steps: how pictures become input.
        frames: of a network of clips.
        compute: rows of a batch.
        batch: how many are computed at once.
    """
    waiting: list[tuple[str, Floats | str]] = []

    def rows() -> Iterator[tuple[str, Floats | str]]:
        good = [image for _, image in waiting if not isinstance(image, str)]
        found = iter(compute(np.stack(good)) if good else ())
        for name, image in waiting:
            yield name, image if isinstance(image, str) else next(found)
        waiting.clear()

    for name in names:
        waiting.append((name, _load(name, steps, frames)))
        if len(waiting) == batch:
            yield from rows()
    yield from rows()


def predict(
    runtime: Runtime, names: Iterable[str], topk: int = 5, batch: int = BATCH
) -> Iterator[Prediction]:
    """Predictions for pictures or clips, in order; a bad one becomes a Prediction with an error.

    Args:
        names: as `inputs_of` gives them.
        batch: how many are computed at once; changes no result.

    Raises:
        ValueError: ``topk`` is not positive, or the network has no classes to predict.
    """
    if topk < 1:
        raise ValueError(f"[predict] topk: expected at least 1, got {topk}")
    steps = runtime.picture_steps("predict", classes=True, clips=True)
    for name, row in answers(names, steps, runtime.config["frames"], runtime, batch):
        if isinstance(row, str):
            yield Prediction(name, [], error=row)
        else:
            yield prediction_of(name, row, runtime.labels, topk)


def _load(path: str, steps: Preprocess, frames: int | None) -> Floats | str:
    """The network's input (C, H, W), of a clip (C, T, H, W), or the reason why the file cannot be read."""
    try:
        if frames:
            return clip_input(read_clip(path, frames), frames, steps)
        return network_input(read_input(path), "", steps)
    except (_core.Error, OSError, ValueError, MemoryError) as error:
        return reason(error).removeprefix(f"{path}: ")  # the path is said by whoever prints this
