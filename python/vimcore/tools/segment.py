# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of segmentation: a class for every pixel of image files, in their own size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _core
from ..data.joint import Joint, JointAugment, fitted
from ..data.masks import mask_png, overlay_jpeg
from ..data.named_files import read_input
from ..data.picture_files import reason
from ..data.pictures import decode
from ..data.transforms import Input
from ..results import json_text
from ..segmentation import Segmentation
from ..tasks.segmentation.evaluation import Sight, evaluating
from ..tasks.segmentation.windows import classes_of, logits_by_windows, starts
from ..utils.files import atomic
from ..weights.task import SegmentTask
from .result_folder import ResultFolder

MOST_WINDOWS = 65536  # for one picture, as vim-infer


@dataclass(frozen=True)
class Area:
    """The pixels of one class: how many, and their share of the image."""

    index: int
    label: str
    pixels: int
    share: float


@dataclass(frozen=True)
class Segmented:
    """What was found in one image, or the error that prevented it.

    Attributes:
        classes: (height, width) class indices.
        areas: of the classes that were found, the largest first.
        mask, overlay: files that were written, None: none was wanted.
    """

    image: str
    classes: NDArray[np.uint8] | None = None
    areas: list[Area] = field(default_factory=list)
    mask: str | None = None
    overlay: str | None = None
    error: str | None = None

    def to_json(self, passed_over: Mapping[str, int] | None = None) -> str:
        """One line of JSON, shares with 6 significant digits; the same as vim-infer's.

        Args:
            passed_over: number of skipped files by suffix, added to the line of the last image.
        """
        line = f'{{"image": {json_text(self.image)}'
        if self.error is not None or self.classes is None:
            line += f', "error": {json_text(self.error)}'
        else:
            height, width = self.classes.shape
            areas = ", ".join(
                f'{{"index": {a.index}, "label": {json_text(a.label)}, "pixels": {a.pixels}, '
                f'"share": {a.share:.6g}}}'
                for a in self.areas
            )
            line += f', "width": {width}, "height": {height}, "areas": [{areas}]'
            if self.mask is not None:
                line += f', "mask": {json_text(self.mask)}, "overlay": {json_text(self.overlay)}'
        if passed_over:
            line += f', "passed_over": {json_text(dict(sorted(passed_over.items())))}'
        return line + "}"


class Segmenting:
    """A network with what its file says of images, ready to segment them.

    Args:
        model: of a file, on its device.
        precision: of autocast; float32: none.

    Raises:
        ValueError: no picture file can fill its input.
    """

    def __init__(self, model: Segmentation, precision: torch.dtype = torch.float32) -> None:
        task, steps, channels = model.task, model.preprocess, model.backbone._config.in_chans
        if task is None or steps is None or len(steps.mean) != channels:
            raise ValueError(
                f"[predict] weights: the network takes {channels} channels, for which its file has no "
                "preprocessing that a picture file could fill"
            )
        self.model, self.task = model, task
        size = model.backbone._config.img_size
        model.backbone.dynamic_img_size = task.window != size
        self.joint = Joint(
            Input(channels, size, steps.mean, steps.std, min(size)), False, JointAugment(task.resize)
        )
        self.sight = Sight(task.window, task.stride, precision)
        self.device = next(model.parameters()).device

    def logits(self, image: NDArray[np.uint8]) -> torch.Tensor:
        """(classes, h, w) float32 of a picture (H, W, 3), at the size that the network looks at."""
        self._check((image.shape[0], image.shape[1]))
        values = self.joint.evaluation(image)[None].to(self.device)
        kind, precision = self.device.type, self.sight.precision
        with evaluating(self.model), torch.autocast(kind, precision, precision != torch.float32):
            return logits_by_windows(self.model, values, self.sight.window, self.sight.stride)[0]

    def _check(self, size: tuple[int, int]) -> None:
        """Before memory and time are spent that there are not.

        Raises:
            ValueError: what the file asks for is too much.
        """
        height, width = fitted(size, self.task.resize)
        need = 4 * height * width * (self.model.num_classes + 3)
        if need > _core.machine_bytes():
            raise ValueError(
                f"a picture of {width} x {height} pixels, as its weights want it resized, takes "
                f"{need / 2**30:.0f} GiB, more than this machine has"
            )
        if self.sight.window is None:
            return
        counts = [len(starts(*side)) for side in zip((height, width), self.sight.window, self.sight.stride)]
        if counts[0] * counts[1] > MOST_WINDOWS:
            raise ValueError(
                f"{counts[0]} x {counts[1]} windows for one picture, expected at most {MOST_WINDOWS}; the "
                f"weights have a stride of {self.sight.stride}"
            )

    def classes(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) class indices of a picture (H, W, 3).

        Raises:
            ValueError: the network's logits are not finite.
        """
        logits = self.logits(image)
        if not bool(logits.isfinite().all()):
            raise ValueError("the network gives values that are not finite; its weights are damaged")
        return classes_of(logits, (image.shape[0], image.shape[1]))


def segment(network: Segmenting, pictures: Sequence[str], out: str | None = None) -> Iterator[Segmented]:
    """Classes of picture files, in order; a bad image becomes one with an error.

    Args:
        out: folder for NAME.png, class indices with a palette, and NAME_overlay.jpg of each image.

    Raises:
        OSError: a result cannot be written.
    """
    folder = ResultFolder(out, pictures) if out is not None else None
    for path in pictures:
        try:
            image = decode(read_input(path), "")
            classes = network.classes(image)
            names = folder.names(path, ".png", "_overlay.jpg") if folder is not None else ()
        except (_core.Error, OSError, ValueError, MemoryError) as error:
            yield Segmented(path, error=reason(error))
            continue
        if names:
            palette = network.task.palette
            contents = mask_png(classes, palette), overlay_jpeg(image, classes, palette)
            for name, content in zip(names, contents):
                with atomic(Path(name)) as file:
                    file.write(content)
        yield Segmented(path, classes, areas(classes, network.task), *names)


def areas(classes: NDArray[np.uint8], task: SegmentTask) -> list[Area]:
    """The classes in a map (H, W), the one with most pixels first, equal ones by index."""
    counts = np.bincount(classes.ravel(), minlength=len(task.classes))
    order = np.argsort(-counts, kind="stable")
    return [
        Area(int(i), task.classes[i], int(counts[i]), float(counts[i] / classes.size))
        for i in order
        if counts[i]
    ]
