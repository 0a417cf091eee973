# SPDX-License-Identifier: Apache-2.0
"""Detection as a task of the engine: boxes and masks of objects, the best average precision of boxes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import _core
from ...data.detection import Detected, Framing, Jitter, Target, Training, Validation, collate
from ...data.object_sources import Reading, training_and_validation
from ...data.objects import Objects
from ...data.scenes import NAME as SCENES
from ...data.transforms import Input, UnreadableError, default_statistics
from ...detection import CascadeMaskRCNN, load, load_checkpoint
from ...utils import distributed
from ...utils.extras import required
from ...utils.files import write_text
from ...weights.detector import checked_options
from ...weights.task import DetectTask, unpack_task
from ...weights.wrappers import format_of
from .. import backbone
from ..task import Data, Metric, Scores, Task
from .answers import Answers, Worst, quality, reduced, shown_of, sure
from .evaluation import Found, Precision, Row, Truth, detect, gathered
from .settings import DetectionSettings

WORST = 48  # pictures in eval.npz
BOX, MASK = Metric("box_ap", "box AP"), Metric("mask_ap", "mask AP")
Batch = tuple[list[Tensor], list[Target]]


class Detection(Task):
    """The settings are `DetectionSettings`."""

    metrics = (BOX, MASK)
    files = ("eval.npz", "results.json")
    settings: DetectionSettings

    def __init__(self, settings: DetectionSettings) -> None:
        super().__init__(settings)
        if not settings.masks:
            self.metrics = (BOX,)  # type: ignore[misc, assignment]
        self._truth: Truth | None = None

    def data(self) -> Data:
        """See `Task.data`; channels, mean and deviation are settled."""
        with required("evaluation of detectors", "dense"):  # named now, not after the first epoch
            import faster_coco_eval  # noqa: F401
        s = self.settings
        if s.data is None:
            raise ValueError(
                "data: name a COCO file (.json), COCO's folder, a folder of train/ and val/ with images/ and "
                f"masks/ in each, or {SCENES}"
            )
        train, self.valid, about = training_and_validation(s.data, s.val, s.val_fraction, reading_of(s))
        channels = 3 if s.in_chans is None else s.in_chans
        statistics = default_statistics(channels)
        if statistics is None:
            raise ValueError(f"in_chans: expected 1 or 3 for pictures, got {channels}")
        mean, std = s.mean or statistics[0], s.std or statistics[1]
        if len(mean) != channels or len(std) != channels or not min(std) > 0:
            raise ValueError(
                f"mean and std: expected {channels} values each, std positive, got {mean} and {std}"
            )
        size = backbone.size_of(s)
        self.input = Input(channels, size, mean, std, min(size))
        self.settings = s = s.merged({"in_chans": channels, "mean": tuple(mean), "std": tuple(std)})
        jitter = Jitter((s.scale[0], s.scale[1]) if s.augment == "jitter" else None, s.hflip)
        framing = Framing(self.input, resize_of(s), jitter, s.masks)
        return Data(
            Training(train, framing),
            Validation(self.valid, framing),
            collate,
            f"{len(train)} pictures of {len(train.classes)} classes to learn from, {len(self.valid)} {about}",
            train.fingerprint(),
            passed_over(train, self.valid),
        )

    def build(self) -> tuple[CascadeMaskRCNN, list[str]]:
        """See `Task.build`."""
        s = self.settings
        assert s.in_chans is not None, "data() comes first"
        network = backbone.create(s, s.in_chans, 0)
        network.dynamic_img_size = needs_any_size(s)
        model = CascadeMaskRCNN(network, len(self.valid.classes), **s.head_options())
        return model, [] if s.init is None else self._start(model)

    def _start(self, model: CascadeMaskRCNN) -> list[str]:
        """Gives the model the weights of `init`: all of them of a detector like it, else the backbone's."""
        s, path = self.settings, str(self.settings.init)
        about = None
        if format_of(path) == "safetensors":
            about = unpack_task(_core.safetensors_header(path)[1], path)
        if (
            isinstance(about, DetectTask)
            and list(about.classes) == self.valid.classes
            and checked_options(about.options, model.backbone._config) == model.options
        ):
            notes = load_checkpoint(model, path, weights=s.init_weights, pos_embed=s.pos_embed)
            return [f"weights of backbone, pyramid and heads from {path}", *notes]
        notes = backbone.start_without_head(model.backbone, s)
        return [*notes, f"new pyramid and heads for {len(self.valid.classes)} classes"]

    def layers(self) -> Mapping[str, Any]:
        """See `Task.layers`: pyramid and heads follow the last block."""
        stem = r"^backbone\.(?:cls_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": [(r"^backbone\.layers\.(\d+)", None)]}

    def prepare(self, batch: Detected, device: torch.device) -> Batch:
        """Images and targets.

        Raises:
            ValueError: nothing can be read any more.
        """
        if batch.fault:
            raise ValueError(batch.fault)
        images = [image.to(device, non_blocking=True) for image in batch.images]
        targets = [{name: x.to(device, non_blocking=True) for name, x in t.items()} for t in batch.targets]
        return images, targets

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the detector's losses, and each."""
        losses: dict[str, Tensor] = model(*batch)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    def evaluate(
        self, model: nn.Module, batches: Iterable[Detected], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """COCO's average precision of boxes and masks."""
        found = detect(model, batches, device, precision)
        rows = gathered(found)
        mine = figures_of(*self.truth().precision(rows)) if distributed.rank() == 0 else {}
        figures = distributed.gather(mine)[0]
        text = ", ".join(f"{metric.label} {100 * figures[metric.name]:.2f} %" for metric in self.metrics)
        return Scores(figures, text, {**found.errors, **self.truth().errors})

    def truth(self) -> Truth:
        """What is on the pictures to validate on."""
        if self._truth is None:
            self._truth = Truth(self.valid, self.settings.masks)
        return self._truth

    def save(self, model: nn.Module, path: Path) -> None:
        """With classes, ids and preprocessing."""
        assert isinstance(model, CascadeMaskRCNN)
        ids, resize = self.valid.ids, resize_of(self.settings)
        model.save(path, self.valid.classes, ids, resize, self.input.preprocess)

    def load(self, path: Path, device: torch.device) -> CascadeMaskRCNN:
        """See `Task.load`."""
        return load(path, device, dynamic_img_size=needs_any_size(self.settings))

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Detected],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """eval.npz: figures, worst pictures; results.json: all detections, as COCO's server wants them."""
        found = detect(model, batches, device, precision)
        answers(self.truth(), found).save(folder / "eval.npz")
        write_results(self.valid, found.rows, folder / "results.json")


def reading_of(settings: DetectionSettings) -> Reading:
    """How the data is understood."""
    return Reading(settings.images, settings.val_images, settings.scenes)


def resize_of(settings: DetectionSettings) -> tuple[int, int]:
    """(short, long) in pixels that pictures are fitted into: they fit into the network's image size."""
    least = min(backbone.size_of(settings))
    return (least, least) if settings.resize is None else (settings.resize[0], settings.resize[1])


def needs_any_size(settings: DetectionSettings) -> bool:
    """Whether the network has to take images of other sizes than its own."""
    return resize_of(settings)[1] > min(backbone.size_of(settings))


def passed_over(*parts: Objects) -> dict[str, int]:
    """What was passed over and dropped in all of them, by kind; the same counts of one file count once."""
    total = Counter[str]()
    for counts in {id(c): c for part in parts for c in (part.dropped, part.passed_over)}.values():
        total.update(counts)
    return dict(sorted(total.items()))


def figures_of(box: Precision, mask: Precision | None) -> dict[str, float]:
    """COCO's figures by name, as logs have them."""
    found = {f"box_{name}": value for name, value in box.values.items()}
    return found if mask is None else {**found, **{f"mask_{n}": v for n, v in mask.values.items()}}


def answers(truth: Truth, found: Found, worst: int = WORST) -> Answers:
    """Of the pictures that could be read, and their truth, too."""
    objects, order = truth.objects, sorted(set(found.rows) & set(truth.of))
    box, mask = truth.precision(found.rows)
    pairs = {}
    facts: list[tuple[float, int, int]] = []
    for index in order:
        size, rows = truth.of[index]
        pairs[index] = shown_of(rows, size), sure(shown_of(found.rows[index], size))
        facts.append(quality(*pairs[index]))
    qualities, missed, wrong = zip(*facts)
    shown = sorted(range(len(order)), key=lambda i: (qualities[i], -missed[i] - wrong[i]))
    pictures: list[Worst] = []
    for place in shown:
        index = order[place]
        if len(pictures) < worst:
            try:
                pixels = objects.read(index, masks=False).pixels
            except UnreadableError:  # it could be read before: gone meanwhile
                continue
            pictures.append(reduced(place, pixels, *pairs[index]))
    return Answers(
        figures_of(box, mask),
        np.array(box.per_class),
        np.array([] if mask is None else mask.per_class, np.float64),
        np.array(qualities),
        np.array(missed, np.int64),
        np.array(wrong, np.int64),
        [objects.name(index) for index in order],
        objects.classes,
        pictures,
    )


def write_results(objects: Objects, rows: Mapping[int, list[Row]], path: Path) -> None:
    """COCO's results: image and category ids are those of the file, from 1 on where there is none."""
    ids = objects.ids or list(range(1, len(objects.classes) + 1))
    found = [
        {"image_id": objects.number(index), **row, "category_id": ids[row["category_id"] - 1]}
        for index in sorted(rows)
        for row in rows[index]
    ]
    write_text(path, json.dumps(found) + "\n")
