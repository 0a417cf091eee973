# SPDX-License-Identifier: Apache-2.0
"""The authors' weights as files of vimcore. Reading their checkpoints needs torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._core import Config
from ..config import model_options
from ..utils.extras import required
from ..weights.convert import convert
from .fetch import fetch, sha256_of
from .published import LICENCE, Published, published

CLASSES = 1000
# Weights stay what they are where these are others than published. Classes get a head of their own.
FREE = ("img_size", "stride", "num_classes", "drop_rate", "drop_path_rate")


class Downloaded(NamedTuple):
    """What was downloaded, where its checkpoint and the vimcore file lie, their facts."""

    weights: Published
    checkpoint: Path
    sha256: str
    config: dict[str, Any]
    assumptions: list[str]


def check_options(name: str, made: Mapping[str, Any], free: Sequence[str] = FREE) -> None:
    """Refuses options of `VisionMamba` with which the weights of `name` would be another network's.

    Raises:
        ValueError: names the first of them.
    """
    meant = Config(**model_options(name)).to_dict()
    changed = [key for key in meant if key not in free and key in made and made[key] != meant[key]]
    if "in_chans" in changed:
        raise ValueError(
            f"[create_model] in_chans: the published weights are for {meant['in_chans']} channels; "
            f"timm.create_model('vimcore_{name}', pretrained=True, in_chans={made['in_chans']}), after "
            "`import vimcore.timm`, makes others of them"
        )
    if changed:
        raise ValueError(
            f"[create_model] {changed[0]}={made[changed[0]]!r}: the published weights are for "
            f"{meant[changed[0]]!r}; leave it out, or pretrained=True"
        )


def checkpoint_of(
    weights: Published, force: bool = False, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The authors' checkpoint, in the cache of the hub; arguments and errors as for `fetch`."""
    note = f"vimcore: weights of {weights.name}, {weights.megabytes} MB from {weights.page}: {LICENCE}"
    return fetch(
        weights.repo,
        weights.file,
        sha256=weights.sha256,
        pinned=True,
        note=note,
        force=force,
        cache_dir=cache_dir,
    )


def download(
    name: str,
    destination: str | os.PathLike[str],
    *,
    average: bool = False,
    dtype: str | None = None,
    force: bool = False,
) -> Downloaded:
    """Writes the weights that the authors published as a vimcore file, with ImageNet's class names.

    Args:
        name: of `create_model`.
        average: the averaged weights of the checkpoint, not the trained ones.
        dtype: of the weights in the file, see `VisionMamba.save`.
        force: download the checkpoint although it is in the cache.

    Raises:
        ValueError: there are no such weights, or the file's tensors are not those of the network.
        RuntimeError: the download fails, see `fetch`; a package is missing.
    """
    weights = published(name)
    with required("reading the authors' checkpoints", "hub"):
        import torch  # noqa: F401  before a download that would be of no use
    path = checkpoint_of(weights, force)
    labels = imagenet_names()
    config, assumptions = convert(
        str(path),
        os.fspath(destination),
        weights="ema" if average else "model",
        settings=model_options(name),
        labels=labels,
        dtype=dtype,
    )
    if labels is None:
        assumptions.append("labels none: timm, which has ImageNet's names, is not installed")
    return Downloaded(weights, path, sha256_of(path), config, assumptions)


def imagenet_names() -> list[str] | None:
    """The names of ImageNet's 1000 classes in the usual order, by timm; None: it is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ModuleNotFoundError:
        return None
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    return [str(name) for name in names]
