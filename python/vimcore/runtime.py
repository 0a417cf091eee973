# SPDX-License-Identifier: Apache-2.0
"""Inference from a file, without torch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._core import Preprocess
from .utils.arguments import gpu_number, integer, sides
from .utils.clips import clip_input
from .weights.metadata import unpack


class Runtime:
    """A trained network, ready to classify. Safe to call from several threads at once; the GIL is released.

    Pickles as its arguments: a process that unpickles it, such as a spawned worker, opens the file again.

    Args:
        path: a vimcore safetensors file (`VisionMamba.save`, `vimcore convert`).
        device: "cpu", "cuda" (the first GPU) or "cuda:N"; images and logits are in the host's memory anyway.
        threads: threads of one call on the CPU; None: as many as the machine has cores.
        img_size: side or (height, width) in pixels; None: as stored. Another size resizes the position table.
        dtype: of activations, "float32"; on a GPU also "bfloat16" or "float16".

    Attributes:
        config: the architecture, with the names of the `VisionMamba` constructor.
        labels: class names, or None where the file has none.
        preprocess: how to make the input from a picture: resize and crop in pixels, mean, std; None where the
            input is no picture.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
        vimcore.Error: the file is missing, damaged or not a vimcore file; there is no such device, or this
            build does not compute on it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        dtype: str = "float32",
    ) -> None:
        cuda = gpu_number("[Runtime] device", device)
        if device == "cpu" and dtype != "float32":
            raise ValueError(f"[Runtime] dtype: expected 'float32' on the cpu, got {dtype!r}")
        if threads is not None:
            threads = integer("[Runtime] threads", threads, 1)
        if img_size is not None:
            img_size = sides("[Runtime] img_size", img_size)
        self._arguments = (os.path.abspath(path), device, threads, img_size, dtype)
        height, width = img_size or (0, 0)
        self._engine = _core.Engine(path, threads or 0, height, width, cuda, dtype)
        config = self._engine.config
        self.config: dict[str, Any] = config.to_dict()
        self.labels: list[str] | None
        _, self.labels, stored = unpack(self._engine.metadata, path)
        steps = stored.rescaled(*config.img_size) if stored else Preprocess.default(config)
        self.preprocess: dict[str, Any] | None = steps.to_dict() if steps else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments: whoever unpickles it, another process or `copy`, opens the file again."""
        return type(self), self._arguments

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of normalised images.

        Args:
            images: (B, C, H, W) float32; of a network of clips (B, C, T, H, W), see `clip_input`.

        Returns:
            (B, num_classes) float32; (B, L, num_classes) with pool="all"; features where there is no head.

        Raises:
            ValueError: shape or type do not fit.
        """
        return self._engine.run(np.ascontiguousarray(images))

    def clip_input(self, clip: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A batch of one (1, C, frames, h, w) of a clip (T, H, W, 1 or 3) uint8: frames chosen, preprocessed.

        T is the network's number of frames, or a multiple of it: then the middle of each equal part is seen.

        Raises:
            ValueError: the network takes images, or the clip does not fit.
        """
        frames = self.config["frames"]
        if not frames or self.preprocess is None:
            raise ValueError("[Runtime] clip_input: the network takes no clips of pictures")
        try:
            return clip_input(clip, frames, Preprocess(**self.preprocess))[None]
        except ValueError as error:
            raise ValueError(f"[Runtime] clip: {error}") from None

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised tokens (B, L, D), class tokens included, of normalised images (B, C, H, W); float32."""
        return self._engine.features(np.ascontiguousarray(images))
