# SPDX-License-Identifier: Apache-2.0
"""Image-text learning as a task of the engine: pairs of a batch are told apart, the best recall is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...clip import Contrastive, Pairs, Sigmoid, Tokenizer, create, export_image_tower, load, save
from ...clip.towers import constrain
from ...data.captions import (
    LAYOUTS,
    CaptionedSample,
    CaptionedTraining,
    collate,
    training_and_validation,
)
from ...data.classes import Sample, Training, Validation, passed_over
from ...data.classes import collate as collate_images
from ...data.digits import jiggle
from ...data.inputs import channels_of, eval_transform, input_of
from ...data.transforms import Augment, UnreadableError, array_train, picture_train
from .. import backbone
from ..task import Data, Metric, Scores, Task
from .evaluation import Embedded, embed, recalls
from .found import Found
from .settings import ClipSettings

LOOKED_AT = 1000  # images whose captions are measured
SHOWN, NEAREST, SIDE = 12, 6, 96  # captions among the pictures of a run, images of each, pixels


class Clip(Task):
    """The settings are `ClipSettings`."""

    metrics = (Metric("r1", "recall at 1"), Metric("r5", "recall at 5"))
    settings: ClipSettings

    def data(self) -> Data:
        """See `Task.data`; channels, mean and deviation are settled."""
        s = self.settings
        if s.data is None:
            raise ValueError(f"data: {LAYOUTS}")
        train, self.valid, about = training_and_validation(s.data, s.val, s.val_fraction)
        channels = channels_of(train.images, s.in_chans)
        size = backbone.size_of(s)
        self.input = input_of(train.images, channels, size, mean=s.mean, std=s.std, crop_pct=s.crop_pct)
        found = {"in_chans": channels, "mean": tuple(self.input.mean), "std": tuple(self.input.std)}
        self.settings = s = s.merged(found)
        transform = eval_transform(self.input, train.images)
        if s.augment == "crop":
            augment = Augment(s.crop_scale, s.crop_ratio, s.hflip, "", 0.0, 0.0)
            transform = (array_train if train.images.arrays else picture_train)(self.input, augment)
        tokenizer = Tokenizer(s.text_context)
        some = [text for captions in train.captions[:LOOKED_AT] for text in captions]
        tokenizer(some)
        if tokenizer.cut:
            about += (
                f"; of the first {len(some)} captions {tokenizer.cut} have more than {s.text_context} tokens "
                "and lose their end"
            )
        return Data(
            CaptionedTraining(Training(train.images, transform), train.captions, _Encode(tokenizer)),
            Validation(self.valid.images, eval_transform(self.input, self.valid.images), (channels, *size)),
            _collate,
            f"{len(train)} images with {sum(map(len, train.captions))} captions to learn from, "
            f"{len(self.valid)} {about}",
            train.fingerprint(),
            passed_over(train.images, self.valid.images),
        )

    def build(self) -> tuple[nn.Module, list[str]]:
        """See `Task.build`."""
        s = self.settings
        assert s.in_chans is not None, "data() comes first"
        network = backbone.create(s, s.in_chans, 0)
        notes = [] if s.init is None else backbone.start_without_head(network, s)
        model = create(
            network,
            s.space_dim,
            width=s.text_width,
            layers=s.text_layers,
            heads=s.text_heads,
            context=s.text_context,
            loss=s.loss,
        )
        pictures = not self.valid.images.arrays
        model.visual.preprocess = self.input.preprocess if pictures else None
        return model, notes

    def layers(self) -> Mapping[str, Any]:
        """See `Task.layers`; projections and text tower follow the last block."""
        trunk = r"^visual\.trunk\."
        stem = trunk + r"(?:cls_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": [(trunk + r"layers\.(\d+)", None)]}

    def prepare(self, batch: CaptionedSample, device: torch.device) -> tuple[Tensor, Tensor, Pairs]:
        """Images (B, C, H, W), tokens (B, context), and what fits together."""
        images = batch.images.to(device, non_blocking=True)
        if self.settings.augment == "jiggle":
            images = jiggle(images.cpu(), torch.default_generator).to(device)
        pairs = Pairs.known(batch.texts.to(device), batch.captions.to(device))
        return images, batch.tokens.to(device, non_blocking=True), pairs

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Pairs]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the pairs of all processes."""
        images, tokens, pairs = batch
        of_images, of_texts, scale, *bias = model(images, tokens)
        kind: Any = Contrastive if self.settings.loss == "clip" else Sigmoid
        loss = kind()(of_images, of_texts, scale, bias[0] if bias else None, pairs)
        return loss, {"logit_scale": scale.detach()}

    def constrain(self, model: nn.Module) -> None:
        """See `Task.constrain`: the temperature."""
        constrain(model)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Sample], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """Recalls of images and of captions."""
        found = embed(model, batches, self.valid.captions, device, precision)
        values = recalls(found)
        text = f"recall at 1 {100 * values['r1']:.2f} %, at 5 {100 * values['r5']:.2f} %"
        return Scores(values, text, found.errors)

    def save(self, model: nn.Module, path: Path) -> None:
        """Both towers; beside it the image tower alone, for programs without torch."""
        export_image_tower(model, beside(path))
        save(model, path)

    def load(self, path: Path, device: torch.device) -> nn.Module:
        """See `Task.load`."""
        return load(path, device)

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Sample],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """eval.npz: some captions with the nearest images."""
        found = embed(model, batches, self.valid.captions, device, precision)
        self._found(found).save(folder / "eval.npz")

    def _found(self, found: Embedded) -> Found:
        captions = np.linspace(0, len(found.captions) - 1, min(SHOWN, len(found.captions))).astype(int)
        near = found.texts[captions] @ found.images.T
        first = np.argsort(-near, 1, kind="stable")[:, :NEAREST]
        names = self.valid.images.files
        files = [[names[found.indices[i]] if names else "" for i in row] for row in first]
        panels = [[self._panel(int(found.indices[i])) for i in row] for row in first]
        right = [[caption in found.own[i] for i in row] for caption, row in zip(captions, first)]
        return Found(
            [found.captions[i] for i in captions],
            np.array(panels, np.uint8),
            np.array(files, np.str_),
            np.array(right),
            np.take_along_axis(near, first, 1),
        )

    def _panel(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(SIDE, SIDE, 3) of a validation image, as the network sees it."""
        try:
            image = eval_transform(self.input, self.valid.images)(self.valid.images.read(index))
        except UnreadableError:  # gone since it was embedded
            image = torch.zeros(len(self.input.mean), *self.input.size)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.input.mean, self.input.std))
        values = (image * std + mean).clamp(0, 1)
        values = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
        small = torch.nn.functional.interpolate(values[None], (SIDE, SIDE), mode="area")[0]
        return (small * 255).round().byte().permute(1, 2, 0).numpy()


class _Encode:
    """One text to tokens; loader processes may have to be sent it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> Tensor:
        return self.tokenizer(text)[0]


def _collate(samples: Any) -> Any:
    """Of training samples with captions, or of validation samples, whose captions the task has."""
    return (collate if isinstance(samples[0], CaptionedSample) else collate_images)(samples)


def beside(path: Path) -> Path:
    """The file of the image tower alone."""
    return path.with_name(f"{path.stem}.image{path.suffix}")
