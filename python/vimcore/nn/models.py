# SPDX-License-Identifier: Apache-2.0
"""Networks of the published sizes by name, also with the weights that the authors published."""

from __future__ import annotations

from typing import Any

from ..config import model_options
from ..hub.pretrained import CLASSES, check_options, checkpoint_of
from ..hub.published import published
from .saving import load_checkpoint
from .vision_mamba import VisionMamba


def create_model(name: str, pretrained: bool = False, **options: Any) -> VisionMamba:
    """A `VisionMamba` of a published size, with random weights or those of the authors.

    Args:
        name: one of `list_models()`.
        pretrained: with the weights that the authors published (`vimcore download` lists them): downloaded at
            the first call, into the cache of huggingface_hub; HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and
            HF_TOKEN are heeded. Another number of classes gets a head with random weights; another img_size
            or stride resizes the position table.
        options: arguments of `VisionMamba` that replace those of the name. With another patch_size the stride
            follows it, unless it is given.

    Raises:
        ValueError: the name is unknown or has no weights, an option is out of range or would change what the
            weights mean, or patch_size is given without stride to a name whose patches overlap.
        TypeError: `VisionMamba` has no such option.
        RuntimeError: the download fails; says why, and the remedy.
    """
    model = VisionMamba(**model_options(name, options))
    if pretrained:
        weights = published(name)
        check_options(name, model.config)
        head = "strict" if model.num_classes == CLASSES else "skip"
        load_checkpoint(model, checkpoint_of(weights), head=head)
    return model
