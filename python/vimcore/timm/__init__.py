# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba in timm: `import vimcore.timm` registers "vimcore_" + each name of `vimcore.list_models()`,
except networks of clips.

    timm.create_model("vimcore_vim_tiny_patch16_224", num_classes=10)
    timm.create_model("vimcore_vim_tiny_patch16_224", features_only=True)
    python -m vimcore.timm train.py --model vimcore_vim_tiny_patch16_224 ...    # a script of timm's

`pretrained=True` loads the weights that the authors published, where there are some (see `vimcore download`),
for any number of classes, channels or pixels. A local file comes by timm's ways: `checkpoint_path=FILE`, or
`pretrained=True, pretrained_cfg_overlay={"file": FILE}`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..utils.extras import needs

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "timm":
        raise
    raise ImportError(f"vimcore.timm needs timm; {needs('train')}") from error

from .._core import Config, Preprocess
from ..config import list_models, model_options
from ..hub.pretrained import FREE, check_options, checkpoint_of
from ..hub.published import PUBLISHED
from ..nn import saving
from ..nn.vision_mamba import VisionMamba
from ..weights.checkpoints import read_checkpoint
from ..weights.wrappers import chosen, plain_names
from .network import TimmVisionMamba

__all__ = ["TimmVisionMamba", "checkpoint_filter_fn"]

_IMAGENET = Preprocess()
_OPTIONS = Config().to_dict()
_SOURCES = ("url", "file", "state_dict", "hf_hub_id")  # of weights, in a pretrained_cfg


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """A checkpoint's tensors for this model: the position table on its grid, no rotation tables.

    Raises:
        ValueError: the position table is of no square grid, or the rotations are others than the model's.
    """
    weights, _ = chosen(state, "model", "checkpoint")
    names, _ = plain_names(map(str, weights), "checkpoint")
    return saving.fitted(model, {names[key]: value for key, value in weights.items() if key in names})


def _default_cfg(name: str) -> dict[str, Any]:
    size, weights = int(model_options(name)["img_size"]), PUBLISHED.get(name)
    source = {"hf_hub_id": weights.repo, "hf_hub_filename": weights.file} if weights else {"url": ""}
    return {
        **source,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": tuple(_IMAGENET.mean),
        "std": tuple(_IMAGENET.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
    }


def _quarters(depth: int, directions: str) -> tuple[int, ...]:
    """Entries of `feature_info` at the ends of the four quarters: 5, 11, 17, 23 of 24 layers."""
    count = depth // 2 if directions == "block" else depth
    return tuple(sorted({max(count * i // 4 - 1, 0) for i in range(1, 5)}))


def _with_weights(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """timm's arguments, with the authors' weights as tensors: read by `read_checkpoint`, their hash checked.

    A pretrained_cfg of its own, or an overlay that names another source, is timm's to follow.
    """
    overlay = dict(given.get("pretrained_cfg_overlay") or {})
    if name not in PUBLISHED or given.get("pretrained_cfg") or any(overlay.get(key) for key in _SOURCES):
        return dict(given)
    options = {key: value for key, value in model_options(name, given).items() if key in _OPTIONS}
    check_options(name, Config(**options).to_dict(), (*FREE, "in_chans"))
    path = checkpoint_of(PUBLISHED[name], cache_dir=given.get("cache_dir"))
    return {**given, "pretrained_cfg_overlay": {**overlay, "state_dict": read_checkpoint(os.fspath(path))[0]}}


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """What timm calls to make the model `name` of vimcore."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = model_options(name, _with_weights(name, kwargs) if pretrained else kwargs)
        quarters = _quarters(options["depth"], options.get("directions", "ssm_conv"))
        model: nn.Module = build_model_with_cfg(
            TimmVisionMamba,
            f"vimcore_{name}",
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": quarters, "feature_cls": "getter"},
            **options,
        )
        facts: Any = model.pretrained_cfg
        facts.pop("state_dict", None)  # tensors that nobody needs any more
        return model

    create.__name__ = create.__qualname__ = f"vimcore_{name}"
    create.__doc__ = f"`vimcore.create_model({name!r})` with timm's arguments."
    return create


def _names() -> list[str]:
    """The networks of images: timm has none of clips."""
    return [name for name in list_models() if "frames" not in model_options(name)]


default_cfgs = generate_default_cfgs({f"vimcore_{n}": _default_cfg(n) for n in _names()})
globals().update({f"vimcore_{name}": register_model(_entrypoint(name)) for name in _names()})
