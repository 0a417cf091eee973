# SPDX-License-Identifier: Apache-2.0
"""A backbone with a head that gives every pixel a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core
from .._core import Config, Preprocess
from ..nn.heads.fcn import FCNHead
from ..nn.heads.layers import resized
from ..nn.heads.neck import Neck, own_names, published, published_names
from ..nn.heads.saving import tensors_to_save
from ..nn.heads.segmenter import MaskTransformer
from ..nn.heads.upernet import UPerHead
from ..nn.readout import patches_of
from ..nn.state import stored_type
from ..nn.structure import made
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import integer, sides
from ..weights.dense import (
    AUXILIARY,
    check_backbone,
    check_classes,
    check_window,
    checked_options,
    head_flops,
    head_shapes,
)
from ..weights.metadata import check_labels, pack
from ..weights.task import Path, SegmentTask, default_palette, pack_task


class Segmentation(nn.Module):
    """What the networks of this module share: sizes of images, files.

    Attributes:
        backbone: the `VisionMamba`. Its parameters that the head makes no use of (norm_f, layers after the
            last one looked at) are frozen, so that DistributedDataParallel finds gradients of all others.
        decode_head: makes the logits.
        num_classes: their number.
        head: "fcn", "linear", "uper" or "segmenter", as files call it.
        normed: whether the head sees what the backbone's final norm makes.
        options: arguments of the constructor besides backbone and num_classes.
        task: what the file that it came from says of classes, colours and windows; None of a new network.
        preprocess: of that file.
    """

    head: str
    decode_head: nn.Module
    normed: ClassVar[bool] = False
    stride_share: ClassVar[tuple[int, int]] = (2, 3)  # of a window, from one to the next

    def __init__(
        self, backbone: VisionMamba, num_classes: int, head: str, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(backbone, VisionMamba):
            raise TypeError(f"[{name}] backbone: expected a VisionMamba, got {type(backbone).__name__}")
        self.num_classes = check_classes(name, num_classes)
        config = backbone._config.replace(num_classes=backbone.num_classes)
        check_backbone(head, config)
        self.head, self.options = head, checked_options(head, options, config)
        self.backbone = backbone
        self.task: SegmentTask | None = None
        self.preprocess: Preprocess | None = None

    def _complete(self, last: int) -> None:
        """At the end of constructors: freezes what has no influence.

        Args:
            last: index of the last layer whose output is looked at.
        """
        if not self.normed:
            self.backbone.norm_f.requires_grad_(False)
            for layer in self.backbone.layers[last + 1 :]:
                layer.requires_grad_(False)
        like = self.backbone.norm_f.weight
        for module in self.children():
            if module is not self.backbone:
                module.to(like.device, like.dtype)
        self._made = made(self)

    # ---- computing -----------------------------------------------------------------------------------------

    def maps(self, images: Tensor) -> Any:
        """What the heads see of images whose sides are multiples of the patch."""
        raise NotImplementedError

    def logits(self, maps: Any) -> tuple[Tensor, ...]:
        """Logits of the heads, coarse; the auxiliary one's second."""
        return (self.decode_head(maps),)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of normalised images.

        Args:
            images: (B, C, H, W) as `VisionMamba` takes them: of its size, of any with dynamic_img_size. Sides
                that are no multiples of the patch are filled up with zeros at the right and bottom for the
                backbone; the logits of that part are cut off.

        Returns:
            (B, num_classes, H, W); of an UperNet in training these and the auxiliary head's.

        Raises:
            ValueError: images do not fit.
        """
        size, patch = images.shape[2:], self.backbone._config.patch_size
        over = [-side % patch for side in size]
        padded = F.pad(images, (0, over[1], 0, over[0])) if any(over) and len(size) == 2 else images
        found = self.logits(self.maps(padded))
        full = [resized(x, padded.shape[2:])[:, :, : size[0], : size[1]] for x in found]
        return full[0] if len(full) == 1 else (full[0], full[1])

    # ---- description ---------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's architecture."""
        return self.backbone.config

    def flops(self, img_size: int | Sequence[int] | None = None) -> int:
        """Multiply-adds of inference for one image of this size (None: the backbone's own).

        Without norms, activations and resizing; the auxiliary head has no part in inference.
        """
        config = self._config(img_size)
        return config.flops() + head_flops(self.head, self.options, self.num_classes, config)

    def _config(self, img_size: int | Sequence[int] | None = None) -> Config:
        config = self.backbone._config.replace(num_classes=0)
        return config if img_size is None else config.replace(img_size=img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides vectors and biases, that training does not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())

    # ---- files ---------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of a file, by name."""
        own = {f"backbone.{name}": shape for name, shape in self._config().param_shapes().items()}
        return {**own, **head_shapes(self.head, self.options, self.num_classes, self._config())}

    def save(
        self,
        path: Path,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        resize: Sequence[int] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Writes weights, architecture and what prediction needs to one safetensors file, all or nothing.

        What is None stays as the file said that the network was loaded from; else it has the default below.

        Args:
            classes: a name each; default: their numbers.
            palette: (red, green, blue) of each class; default: PASCAL VOC's colours.
            window: pixels that the network sees at once, multiples of the patch; default: the backbone's
                img_size.
            stride: pixels from one window to the next; default: two thirds of the window, of a Segmenter all.
            resize: (short, long) that the sides of an image are fitted into before; default: none.
            preprocess: mean, std, resize, crop, interpolation; default: ImageNet's mean and std. Networks
                with neither 1 nor 3 channels have none.
            dtype: of the weights in the file, see `VisionMamba.save`.

        Raises:
            ValueError: the file could not describe the network, or one of these does not fit.
        """
        name = type(self).__name__
        task = self.described(classes, palette, window, stride, resize)
        config = self._config()
        if preprocess is None:
            steps = self.preprocess or Preprocess.default(config)
            if steps is not None and self.preprocess is None:
                steps = steps.replace(resize=min(config.img_size))
            preprocess = steps.to_dict() if steps else None
        metadata = {**pack(config, None, preprocess), **pack_task(task)}
        arrays = tensors_to_save(self, self.backbone, self._made, self.shapes(), name, self._published)
        _core.write_safetensors(path, arrays, metadata, stored_type(dtype))

    @staticmethod
    def _published(name: str) -> str:
        """The state dict's name of a parameter."""
        return name

    def described(
        self,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        resize: Sequence[int] | None = None,
    ) -> SegmentTask:
        """What `save` would write of the task; the arguments are its."""
        name, old = type(self).__name__, self.task
        if classes is None:
            classes = old.classes if old else list(map(str, range(self.num_classes)))
        colours: Any = palette
        if palette is None:
            colours = old.palette if old else default_palette(self.num_classes)
        if window is None:
            seen = old.window if old else self.backbone._config.img_size
        else:
            seen = sides(f"[{name}] window", window)
        check_window(name, seen, self.backbone._config)
        if stride is not None:
            step = sides(f"[{name}] stride", stride)
        elif old is not None and window is None:
            step = old.stride
        else:
            part, whole = self.stride_share
            step = max(seen[0] * part // whole, 1), max(seen[1] * part // whole, 1)
        fitted = old.resize if old else None
        if resize is not None:
            fitted = sides(f"[{name}] resize", resize)
        names = check_labels(classes, self.num_classes)
        return SegmentTask(self.head, self.options, tuple(names), colours, seen, step, fitted)


class FCN(Segmentation):
    """3x3 convolutions and a classifier of pixels on the last map; with convs=0 a linear map of every patch.

    The map is the residual stream after the last layer, not normalised.

    Args:
        backbone: without a head (num_classes=0); its patches tile its images.
        num_classes: 1 to 255.
        channels: of the convolutions; None: the backbone's.
        convs: how many; 0: the linear head.
        head_norm: "batch", or "group", which needs no second image in a batch.
        dropout: share of whole channels set to zero before the classifier, in training.

    Raises:
        ValueError, TypeError: an option is out of range or of another type, or does not go with the backbone.
    """

    def __init__(
        self,
        backbone: VisionMamba,
        num_classes: int,
        channels: int | None = None,
        convs: int = 2,
        head_norm: str = "batch",
        dropout: float = 0.1,
    ) -> None:
        linear = integer("[FCN] convs", convs) == 0
        options = {"channels": channels, "convs": convs, "head_norm": head_norm, "dropout": dropout}
        super().__init__(backbone, num_classes, "linear" if linear else "fcn", options)
        o, dim = self.options, backbone.embed_dim
        self.decode_head = FCNHead(
            dim, o["channels"], o["convs"], self.num_classes, o["head_norm"], o["dropout"]
        )
        self._complete(backbone._config.depth - 1)

    def maps(self, images: Tensor) -> Tensor:
        """(B, D, h, w): the stream after the last layer."""
        return self.backbone.forward_intermediates(images, [-1])[0]


class UperNet(Segmentation):
    """Four layers' maps at four strides, UPerNet's head, and an auxiliary head that only training uses.

    As published for Vim on ADE20K, with `channels` 192 or 384. A class token stays in the network and is left
    out of the maps. The neck is in `neck`; state dicts have its tensors where published ones do, among the
    backbone's.

    Args:
        backbone: without a head (num_classes=0); its patches, of 4, 8 or 16 pixels, tile its images.
        num_classes: 1 to 255.
        channels: within the head; None: the backbone's.
        indices: four layers, negative ones count from the last; None: the last of each quarter.
        aux: whether there is an auxiliary head, on the third layer's map.
        taps: "stream": the residual stream after these layers, not normalised; "mixer": what their mixers add
            to it, as in the published configuration of Vim-Ti.
        head_norm: "batch", or "group", which needs no second image in a batch.
        dropout: share of whole channels set to zero before the classifiers, in training.

    Raises:
        ValueError, TypeError: an option is out of range or of another type, or does not go with the backbone.
    """

    def __init__(
        self,
        backbone: VisionMamba,
        num_classes: int,
        channels: int | None = None,
        indices: Sequence[int] | None = None,
        aux: bool = True,
        taps: str = "stream",
        head_norm: str = "batch",
        dropout: float = 0.1,
    ) -> None:
        options = {"channels": channels, "indices": indices, "aux": aux, "taps": taps}
        super().__init__(
            backbone, num_classes, "uper", {**options, "head_norm": head_norm, "dropout": dropout}
        )
        o, dim, classes = self.options, backbone.embed_dim, self.num_classes
        norm, dropout = o["head_norm"], o["dropout"]
        self.neck = Neck(dim, backbone._config.patch_size, norm)
        self.decode_head = UPerHead(dim, o["channels"], classes, norm, dropout)
        self.auxiliary_head = FCNHead(dim, AUXILIARY, 1, classes, norm, dropout) if o["aux"] else None
        self._register_state_dict_hook(published_names)
        self._register_load_state_dict_pre_hook(own_names)
        self._complete(max(o["indices"]))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, D, H, W) of strides 4, 8, 16 and 32 pixels."""
        indices = self.options["indices"]
        if self.options["taps"] == "stream":
            return self.neck(self.backbone.forward_intermediates(images, indices))
        pairs = [layer for index in indices for layer in (index - 1, index)]
        streams = self.backbone.forward_intermediates(images, pairs)
        return self.neck([after - before for before, after in zip(streams[::2], streams[1::2])])

    def logits(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Those of the head, and in training the auxiliary ones."""
        if self.auxiliary_head is None or not self.training:
            return (self.decode_head(maps),)
        return self.decode_head(maps), self.auxiliary_head(maps[2])

    _published = staticmethod(published)


class Segmenter(Segmentation):
    """A mask transformer on the normalised tokens of the last layer, class tokens left out.

    Args:
        backbone: without a head (num_classes=0); its patches tile its images.
        num_classes: 1 to 255.
        layers: of the transformer; the paper's ablation has 2.
        dropout: within the transformer, in training.

    Raises:
        ValueError, TypeError: an option is out of range or of another type, or does not go with the backbone.
    """

    normed = True
    stride_share = (1, 1)

    def __init__(
        self, backbone: VisionMamba, num_classes: int, layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone, num_classes, "segmenter", {"layers": layers, "dropout": dropout})
        o = self.options
        self.decode_head = MaskTransformer(backbone.embed_dim, self.num_classes, o["layers"], o["dropout"])
        self._complete(backbone._config.depth - 1)

    def maps(self, images: Tensor) -> Tensor:
        """Patches (B, h, w, D), normalised."""
        config = self.backbone._config_for(images)
        return patches_of(self.backbone.forward_features(images), config).unflatten(1, config.grid)

    def logits(self, maps: Tensor) -> tuple[Tensor, ...]:
        """(B, num_classes, h, w)."""
        masks = self.decode_head(maps.flatten(1, 2))
        return (masks.transpose(1, 2).unflatten(2, maps.shape[1:3]),)
