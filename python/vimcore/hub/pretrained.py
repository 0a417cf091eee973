# SPDX-License-Identifier: Apache-2.0
"""The authors' weights as files of vimcore. Reading their checkpoints needs torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from ..config import model_options
from ..utils.extras import required
from ..weights.convert import convert
from .fetch import fetch, sha256_of
from .published import LICENCE, Published, published

CLASSES = 1000


class Downloaded(NamedTuple):
    """What was downloaded, where its checkpoint and the vimcore file lie, their facts."""

    weights: Published
    checkpoint: Path
    sha256: str
    config: dict[str, Any]
    assumptions: list[str]


def checkpoint_of(weights: Published, force: bool = False) -> Path:
    """The authors' checkpoint, in the cache of the hub; errors as for `fetch`."""
    note = f"vimcore: weights of {weights.name} from {weights.page}: {LICENCE}"
    return fetch(weights.repo, weights.file, sha256=weights.sha256, pinned=True, note=note, force=force)


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
    with required("reading the authors' checkpoints", "torch"):
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
