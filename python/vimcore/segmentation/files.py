# SPDX-License-Identifier: Apache-2.0
"""Networks for segmentation from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..nn.heads.saving import fill_from_file
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import boolean, sides
from ..weights.dense import NAMES
from ..weights.dense_files import segment_file
from ..weights.task import Path
from .networks import FCN, Segmentation, Segmenter, UperNet

_KINDS: dict[str, type[Segmentation]] = {kind.__name__: kind for kind in (FCN, Segmenter, UperNet)}


def load(
    path: Path,
    device: str | torch.device = "cpu",
    *,
    img_size: int | Sequence[int] | None = None,
    dynamic_img_size: bool = False,
) -> Segmentation:
    """The network of a file that `save` wrote, in eval mode; its `task` and `preprocess` are the file's.

    Args:
        img_size: another size in pixels than stored, side or (height, width); the position table is resized.
        dynamic_img_size: images of any size, see `VisionMamba`.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no file of a segmentation network, or its tensors are not those of its architecture.
    """
    dynamic = boolean("[segmentation] dynamic_img_size", dynamic_img_size)
    config, task, preprocess = segment_file(path)
    model = create(task.head, VisionMamba(**config.to_dict()), len(task.classes), task.options)
    fill_from_file(model, path)
    model.task, model.preprocess = task, preprocess
    if img_size is not None:
        model.backbone.set_input_size(sides("[segmentation] img_size", img_size))
    model.backbone.dynamic_img_size = dynamic
    return model.eval().to(device)


def create(head: str, backbone: VisionMamba, num_classes: int, options: Mapping[str, Any]) -> Segmentation:
    """The network with this head, as files call it: "fcn", "linear", "uper" or "segmenter"."""
    kind: Any = _KINDS[NAMES[head]]
    network: Segmentation = kind(backbone, num_classes, **options)
    return network
