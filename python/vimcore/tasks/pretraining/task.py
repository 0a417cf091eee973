# SPDX-License-Identifier: Apache-2.0
"""Pretraining as a task of the engine: images without labels, the smallest loss on held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import _core
from ...data.classes import Sample, Training, Validation, collate, passed_over
from ...data.digits import jiggle
from ...data.inputs import channels_of, eval_transform, input_of
from ...data.sampling import derive_seed
from ...data.transforms import Augment, array_train, picture_train
from ...data.unlabelled import training_and_validation
from ...io import load_model, save_model
from ...pretraining import MaskedImages, NextPatch
from ...pretraining.patches import patches, unpatched
from ...utils.distributed import sums
from ...weights.checkpoints import tensor
from .. import backbone
from ..task import Data, Metric, Scores, Task
from .reconstructions import Reconstructions
from .settings import PretrainingSettings

SHOWN = 8  # images among the pictures of a run
Network = MaskedImages | NextPatch


class Pretraining(Task):
    """The settings are `PretrainingSettings`."""

    metrics = (Metric("loss", "loss", 0.0, math.inf, larger_is_better=False, percent=False),)
    settings: PretrainingSettings

    def data(self) -> Data:
        """See `Task.data`; channels, mean and deviation are settled."""
        s = self.settings
        if s.data is None:
            raise ValueError("data: name a folder of pictures or .npy files, or digits; no labels are needed")
        train, self.valid, about = training_and_validation(s.data, s.val, s.val_fraction)
        channels = channels_of(train, s.in_chans)
        size = backbone.size_of(s)
        self.input = input_of(train, channels, size, mean=s.mean, std=s.std, crop_pct=s.crop_pct)
        found = {"in_chans": channels, "mean": tuple(self.input.mean), "std": tuple(self.input.std)}
        self.settings = s = s.merged(found)
        transform = eval_transform(self.input, train)
        if s.augment == "crop":
            augment = Augment(s.crop_scale, s.crop_ratio, s.hflip, "", 0.0, 0.0)
            transform = (array_train if train.arrays else picture_train)(self.input, augment)
        return Data(
            Training(train, transform),
            Validation(self.valid, eval_transform(self.input, self.valid), (channels, *size)),
            collate,
            f"{len(train)} images without labels to learn from, {len(self.valid)} {about}",
            train.fingerprint(),
            passed_over(train, self.valid),
        )

    def build(self) -> tuple[Network, list[str]]:
        """See `Task.build`."""
        s = self.settings
        assert s.in_chans is not None, "data() comes first"
        network = backbone.create(s, s.in_chans, 0)
        notes = [] if s.init is None else backbone.start_without_head(network, s)
        return self._around(network), notes

    def _around(self, network: nn.Module) -> Network:
        s = self.settings
        if s.objective == "mim":
            return MaskedImages(network, s.mask_ratio, s.norm_target, s.norm_floor, s.loss_power)
        return NextPatch(network, s.norm_target, s.norm_floor, s.cluster, s.decoder_dim, s.decoder_depth)

    def layers(self) -> Mapping[str, Any]:
        """See `Task.layers`; what predicts follows the last block."""
        stem = r"^backbone\.(?:cls_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": [(r"^backbone\.layers\.(\d+)", None)]}

    def prepare(self, batch: Sample, device: torch.device) -> Tensor:
        """Images (B, C, H, W)."""
        images = batch.images.to(device, non_blocking=True)
        if self.settings.augment == "jiggle":
            images = jiggle(images.cpu(), torch.default_generator).to(device)
        return images

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of masked patches, or of next ones."""
        return model(batch), {}

    def evaluate(
        self, model: nn.Module, batches: Iterable[Sample], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """The loss; an image has the same mask each time."""
        assert isinstance(model, MaskedImages | NextPatch)
        found = [0.0, 0.0]  # images, loss
        errors: dict[str, str] = {}
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, precision, precision != torch.float32):
            for batch in batches:
                errors.update(batch.errors)
                good = batch.indices >= 0
                if bool(good.any()):
                    arguments = self._mask(model, batch.indices[good])
                    loss = model(batch.images[good].to(device, non_blocking=True), *arguments)
                    found = [found[0] + int(good.sum()), found[1] + float(loss) * int(good.sum())]
        model.train(was_training)
        count, total = sums(found)
        if not count:
            raise RuntimeError("none of the images to validate on could be read")
        return Scores({"loss": total / count}, f"loss {total / count:.4f}", errors)

    def _mask(self, model: Network, indices: Tensor) -> tuple[Tensor, ...]:
        """The masks that images of these indices always have in validation."""
        if not isinstance(model, MaskedImages):
            return ()
        with torch.random.fork_rng(devices=[]):
            masks = []
            for index in indices.tolist():
                torch.manual_seed(derive_seed("mask", index))
                masks.append(model.draw(1))
        return (torch.cat(masks),)

    def save(self, model: nn.Module, path: Path) -> None:
        """The backbone as any network's file, to start others from; beside it what else was learnt."""
        assert isinstance(model, MaskedImages | NextPatch)
        rest = {
            name: value.detach().cpu().numpy()
            for name, value in model.state_dict().items()
            if not name.startswith("backbone.")
        }
        _core.write_safetensors(beside(path), rest, {"vimcore.objective": self.settings.objective})
        save_model(model.backbone, path, None, None if self.valid.arrays else self.input.preprocess)

    def load(self, path: Path, device: torch.device) -> Network:
        """See `Task.load`."""
        model = self._around(load_model(path, device=device))
        rest = {name: tensor(array) for name, array in _core.read_safetensors(beside(path))[0].items()}
        found = model.load_state_dict(rest, strict=False)
        wrong = [n for n in found.missing_keys if not n.startswith("backbone.")] + found.unexpected_keys
        if wrong:
            raise ValueError(f"{beside(path)}: not of this objective: {', '.join(wrong)}")
        return model.to(device).eval()

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Sample],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """eval.npz: some images with what the network predicts of them."""
        assert isinstance(model, MaskedImages | NextPatch)
        images, indices = [], []
        for batch in batches:
            good = batch.indices >= 0
            images.append(batch.images[good])
            indices.append(batch.indices[good])
            if sum(map(len, indices)) >= SHOWN:
                break
        some, places = torch.cat(images)[:SHOWN].to(device), torch.cat(indices)[:SHOWN]
        with torch.no_grad():
            titles, pictures = self._panels(model, some, places)
            losses = [
                float(model(image[None], *self._mask(model, place[None])))
                for image, place in zip(some, places)
            ]
        panels = np.stack([self._pixels(picture) for picture in pictures], 1)
        files = [self.valid.files[i] if self.valid.files else "" for i in places.tolist()]
        Reconstructions(panels, titles, files, np.array(losses)).save(folder / "eval.npz")

    def _panels(self, model: Network, images: Tensor, places: Tensor) -> tuple[list[str], list[Tensor]]:
        """Titles and pictures (N, C, H, W)."""
        config = model.backbone._config
        if isinstance(model, MaskedImages):
            (mask,) = self._mask(model, places)
            found, mask = model.reconstruct(images, mask)
            hidden = patches(images, config.patch_size).masked_fill(mask.to(images.device)[:, :, None], 0.0)
            return ["image", "seen", "predicted"], [images, unpatched(hidden, config), found]
        ahead, behind = model.reconstruct(images)
        return ["image", "from before", "from behind"], [images, ahead, behind]

    def _pixels(self, images: Tensor) -> NDArray[np.uint8]:
        """(N, H, W, 3) of normalised images (N, C, H, W): three channels, or the first one as grey."""
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.input.mean, self.input.std)
        )
        values = images.float() * std + mean
        if self.valid.arrays and not bool(((values >= 0) & (values <= 1)).all()):
            low, high = values.amin((0, 2, 3), True), values.amax((0, 2, 3), True)
            values = (values - low) / (high - low).clamp(min=1e-12)
        shown = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
        return (shown.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def beside(path: Path) -> Path:
    """The file of what stands around the backbone."""
    return path.with_name(f"{path.stem}.objective{path.suffix}")
