# SPDX-License-Identifier: Apache-2.0
"""Pictures, and where the file has a text tower sentences, as vectors: by the file of any task."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .._core import Preprocess
from ..runtime import Runtime
from ..utils.extras import required
from ..utils.precision import check_precision
from ..weights.metadata import task_of_file

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """Of one file of weights.

    Attributes:
        steps: how pictures become input.
        frames: of a network of clips.
        reads_text: whether sentences have vectors, too.
        dtype: of activations, those of sentences included.
    """

    steps: Preprocess
    frames: int | None
    reads_text: bool
    dtype: str

    def vectors(self, images: Vectors) -> Vectors:
        """(B, D) of normalised images (B, C, H, W), as the network gives them."""

    def tokens(self, images: Vectors) -> Vectors:
        """(B, L, D) normalised tokens of the images."""

    def text(self, sentence: str) -> tuple[Vectors, list[str]]:
        """(D,) unit vector, and what a reader should know."""


def open_embedder(
    path: str,
    device: str = "cpu",
    threads: int | None = None,
    img_size: tuple[int, int] | None = None,
    dtype: str = "float32",
) -> Embedder:
    """What the file of weights offers; classifiers and backbones need no torch.

    Args:
        dtype: of activations, as for `Runtime`.

    Raises:
        ValueError, vimcore.Error: it cannot be read, or takes no pictures; activations are not of this type
            on this device.
    """
    task = task_of_file(path)
    check_precision("--dtype", dtype, device)
    if task == "classify":
        return _OfRuntime(Runtime(path, device, threads, img_size, dtype), dtype)
    if img_size is not None:
        raise ValueError(f"img_size: of classifiers and backbones only; {path} is of another task ({task})")
    with required("features of this file", "clip" if task == "clip" else "dense"):
        import torch
        import torchvision  # noqa: F401
    if threads is not None:
        torch.set_num_threads(threads)
    if task == "clip":
        return _OfTowers(path, device, dtype)
    return _OfBackbone(path, task, device, dtype)


def unit(vectors: Vectors) -> Vectors:
    """(..., D) of length 1; what is not finite stays so."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)


def _computing(device: str, dtype: str) -> Any:
    """Autocast with activations of this type."""
    import torch

    kind = device.partition(":")[0]
    return torch.autocast(kind, getattr(torch, dtype), dtype != "float32")


class _OfRuntime:
    """A classifier or backbone: the vector that its head reads; an image tower: what its head gives."""

    reads_text = False

    def __init__(self, runtime: Runtime, dtype: str) -> None:
        self.runtime, self.steps = runtime, runtime.picture_steps("features", clips=True)
        self.frames, self.dtype = runtime.config["frames"], dtype

    def vectors(self, images: Vectors) -> Vectors:
        return self.runtime.embeddings(images)

    def tokens(self, images: Vectors) -> Vectors:
        return self.runtime.features(images)

    def text(self, sentence: str) -> tuple[Vectors, list[str]]:
        raise ValueError("this file of weights has no text tower")


class _OfBackbone:
    """A network for segmentation or detection: the mean of its backbone's tokens."""

    frames: int | None = None
    reads_text = False

    def __init__(self, path: str, task: str, device: str, dtype: str) -> None:
        from .. import detection, segmentation

        model: Any = (segmentation if task == "segment" else detection).load(path, device)
        self.backbone, self.device, self.dtype = model.backbone, device, dtype
        config, stored = self.backbone._config, model.preprocess
        steps = stored.rescaled(*config.img_size) if stored else Preprocess.default(config)
        if steps is None:
            raise ValueError(f"{path}: takes no pictures, so none has features")
        self.steps = steps

    def vectors(self, images: Vectors) -> Vectors:
        found: Vectors = self.tokens(images).mean(1, dtype=np.float32)
        return found

    def tokens(self, images: Vectors) -> Vectors:
        import torch

        with torch.no_grad(), _computing(self.device, self.dtype):
            tokens = self.backbone.forward_features(torch.from_numpy(images).to(self.device))
        return np.asarray(tokens.float().cpu())

    def text(self, sentence: str) -> tuple[Vectors, list[str]]:
        raise ValueError("this file of weights has no text tower")


class _OfTowers:
    """An image tower and a text tower."""

    frames: int | None = None
    reads_text = True

    def __init__(self, path: str, device: str, dtype: str) -> None:
        from ..clip import load

        self.model, self.device, self.dtype = load(path, device), device, dtype
        steps = self.model.visual.preprocess
        if steps is None:
            raise ValueError(f"{path}: takes no pictures, so none has features")
        self.steps = Preprocess(**steps)

    def vectors(self, images: Vectors) -> Vectors:
        import torch

        with torch.no_grad(), _computing(self.device, self.dtype):
            found = self.model.encode_image(torch.from_numpy(images).to(self.device))
        return np.asarray(found.float().cpu())

    def tokens(self, images: Vectors) -> Vectors:
        raise ValueError("tokens: an image-text model gives one vector a picture")

    def text(self, sentence: str) -> tuple[Vectors, list[str]]:
        from ..clip import Tokenizer
        from ..clip.zero_shot import encode_texts

        tokenizer = Tokenizer(self.model.context_length)
        with _computing(self.device, self.dtype):
            found = encode_texts(self.model, [sentence], tokenizer)[0]
        vector = unit(found.float().cpu().numpy())
        cut = f"the sentence has more than {tokenizer.context} tokens: its end is not looked at"
        return vector, [cut] if tokenizer.cut else []
