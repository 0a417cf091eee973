# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of detection: objects in image files, in the pictures' own pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from .. import _core
from ..data.detection import Framing, Jitter
from ..data.drawing import colours, drawn, jpeg
from ..data.named_files import read_input
from ..data.picture_files import reason
from ..data.pictures import decode
from ..data.transforms import Input
from ..detection import CascadeMaskRCNN
from ..results import json_text
from ..tasks.detection.answers import shown_of, sure
from ..tasks.detection.evaluation import Row, rows_of
from ..utils.files import atomic, write_text
from ..weights.task import DetectTask
from .result_folder import ResultFolder

RESULTS = "results.json"


@dataclass(frozen=True)
class Predicted:
    """What was found in one image, best first, or the error that prevented it.

    Attributes:
        size: (height, width) of the image.
        rows: COCO's results: category_id (index of the class + 1), bbox, score, segmentation.
        overlay: the file that was written, None: none was wanted.
    """

    image: str
    size: tuple[int, int] = (0, 0)
    rows: list[Row] = field(default_factory=list)
    classes: Sequence[str] = ()
    overlay: str | None = None
    error: str | None = None

    def to_json(self, passed_over: Mapping[str, int] | None = None) -> str:
        """One line of JSON: scores and coordinates with 6 significant digits; masks are in results.json.

        Args:
            passed_over: number of skipped files by suffix, added to the line of the last image.
        """
        line = f'{{"image": {json_text(self.image)}'
        if self.error is not None:
            line += f', "error": {json_text(self.error)}'
        else:
            found = ", ".join(self._object(row) for row in self.rows)
            line += f', "width": {self.size[1]}, "height": {self.size[0]}, "objects": [{found}]'
            if self.overlay is not None:
                line += f', "overlay": {json_text(self.overlay)}'
        if passed_over:
            line += f', "passed_over": {json_text(dict(sorted(passed_over.items())))}'
        return line + "}"

    def _object(self, row: Row) -> str:
        index = row["category_id"] - 1
        box = ", ".join(f"{side:.6g}" for side in corners(row))
        return (
            f'{{"index": {index}, "label": {json_text(self.classes[index])}, "score": {row["score"]:.6g}, '
            f'"box": [{box}]}}'
        )


def corners(row: Row) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of a row."""
    x, y, w, h = row["bbox"]
    return x, y, x + w, y + h


class Detecting:
    """A network with what its file says of images, ready to find objects.

    Args:
        model: of a file, on its device.
        precision: of autocast; float32: none.

    Raises:
        ValueError: no picture file can fill its input.
    """

    def __init__(self, model: CascadeMaskRCNN, precision: torch.dtype = torch.float32) -> None:
        task, steps, c = model.task, model.preprocess, model.backbone._config
        if task is None or steps is None or len(steps.mean) != c.in_chans:
            raise ValueError(
                f"[predict] weights: the network takes {c.in_chans} channels, for which its file has no "
                "preprocessing that a picture file could fill"
            )
        self.model, self.task, self.precision = model.eval(), task, precision
        model.backbone.dynamic_img_size = task.resize[1] > min(c.img_size)
        of = Input(c.in_chans, (c.img_size[0], c.img_size[1]), steps.mean, steps.std, min(c.img_size))
        self.framing = Framing(of, task.resize, Jitter(None, 0.0), masks=False)
        self.device = next(model.parameters()).device
        self.palette = colours(len(task.classes))

    def rows(self, image: NDArray[Any]) -> list[Row]:
        """COCO's results of a picture (H, W, 3)."""
        size = (int(image.shape[0]), int(image.shape[1]))
        values = self.framing.evaluation(image).to(self.device)
        kind = self.device.type
        with torch.no_grad(), torch.autocast(kind, self.precision, self.precision != torch.float32):
            return rows_of(self.model.detections([values], [size])[0], size)

    def overlay(self, image: NDArray[Any], rows: Sequence[Row]) -> bytes:
        """A JPEG of the picture with the objects whose score is SURE or more."""
        found = sure(shown_of(rows, (image.shape[0], image.shape[1])))
        texts = [f"{self.task.classes[k]} {100 * p:.0f} %" for k, p in zip(found.labels, found.scores)]
        return jpeg(drawn(image, found.boxes, found.labels, found.masks, texts, self.palette))


def detect(network: Detecting, pictures: Sequence[str], out: str | None = None) -> Iterator[Predicted]:
    """Objects of picture files, in order; a bad image becomes one with an error.

    Args:
        out: folder for NAME_overlay.jpg of each image, and for results.json: images, annotations and
            categories as in a COCO file, with the category ids of the network's file, written at the end.

    Raises:
        OSError: a result cannot be written.
    """
    folder = ResultFolder(out, pictures) if out is not None else None
    results = _Results(network.task)
    for path in pictures:
        try:
            image = decode(read_input(path), "")
            rows = network.rows(image)
            names = folder.names(path, "_overlay.jpg") if folder is not None else ()
        except (_core.Error, OSError, ValueError, MemoryError) as error:
            yield Predicted(path, error=reason(error))
            continue
        size = (image.shape[0], image.shape[1])
        for name in names:
            with atomic(Path(name)) as file:
                file.write(network.overlay(image, rows))
            results.add(path, size, rows)
        yield Predicted(path, size, rows, network.task.classes, *names)
    if folder is not None:
        results.write(Path(folder.folder) / RESULTS)


class _Results:
    """What results.json is going to say."""

    def __init__(self, task: DetectTask) -> None:
        self.ids = task.ids or tuple(range(1, len(task.classes) + 1))
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": number, "name": name} for number, name in zip(self.ids, task.classes)]

    def add(self, picture: str, size: tuple[int, int], rows: Sequence[Row]) -> None:
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": picture, "width": size[1], "height": size[0]})
        for row in rows:
            width, height = row["bbox"][2:]
            about = {"id": len(self.annotations) + 1, "image_id": number, "iscrowd": 0}
            about["area"] = width * height
            self.annotations.append({**about, **row, "category_id": self.ids[row["category_id"] - 1]})

    def write(self, path: Path) -> None:
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        write_text(path, json.dumps(content) + "\n")
