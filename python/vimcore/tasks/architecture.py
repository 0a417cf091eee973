# SPDX-License-Identifier: Apache-2.0
"""The architecture of the weights that a run starts from, as settings. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _core
from .._core import Config, Preprocess
from ..config import model_options
from ..weights.metadata import CONFIG_KEY, unpack
from ..weights.wrappers import format_of
from .settings import Settings

# Of a configuration: those that are settings by themselves; chosen by the run; all others go to `set`.
_SETTINGS = ("img_size", "patch_size", "stride", "embed_dim", "depth", "directions", "class_token", "pool")
_OF_THE_RUN = ("in_chans", "num_classes", "drop_rate", "drop_path_rate")


def with_architecture(typed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What was typed, and from `init` what was not: sizes and options of the network, mean and deviation.

    Of a vimcore file; others do not say what they are. A model that was typed stands for all its sizes.

    Returns:
        Settings by name, and what a reader should know of them.

    Raises:
        OSError, ValueError, vimcore.Error: init cannot be read, or is damaged.
    """
    path = str(typed["init"])
    if "model" in typed or format_of(path) != "safetensors":
        return dict(typed), []
    metadata = _core.safetensors_header(path)[1]
    if CONFIG_KEY not in metadata:
        return dict(typed), []
    config, _, preprocess = unpack(metadata, path)
    found = _architecture(config)
    if "in_chans" not in typed:
        found |= _values(config, preprocess)
    own = {text.partition("=")[0] for text in typed.get("set", ())}
    of_file = [text for text in found.pop("set") if text.partition("=")[0] not in own]
    merged = {**found, **typed, "set": (*of_file, *typed.get("set", ()))}
    return merged, [f"network as in {path}: {_described(config)}; --model and its flags name another"]


def _architecture(config: Config) -> dict[str, Any]:
    """The settings that make this configuration out of the model that is the default."""
    values = config.to_dict()
    found = {name: tuple(v) if isinstance(v := values[name], list) else v for name in _SETTINGS}
    usual = Config(**model_options(Settings.model, found)).to_dict()
    further = [name for name in values if name not in (*_SETTINGS, *_OF_THE_RUN)]
    found["set"] = tuple(f"{n}={_shown(values[n])}" for n in further if values[n] != usual[n])
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(config: Config, preprocess: Preprocess | None) -> dict[str, Any]:
    """Grey, where the network is; mean and deviation where they are not the usual ones."""
    found: dict[str, Any] = {"in_chans": 1} if config.in_chans == 1 else {}
    usual = Preprocess.default(config)
    if preprocess is not None and usual is not None:
        for name in ("mean", "std"):
            if getattr(preprocess, name) != getattr(usual, name):
                found[name] = tuple(getattr(preprocess, name))
    return found


def _described(config: Config) -> str:
    height, width = config.img_size
    return (
        f"{config.depth} blocks of width {config.embed_dim}, {height} x {width} pixels in patches of "
        f"{config.patch_size}"
    )
