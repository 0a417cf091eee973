# SPDX-License-Identifier: Apache-2.0
"""Inference from a file, without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._core import Config, Preprocess
from .data.given import Given, given, input_of
from .hub.repository import locate
from .results import NOT_FINITE, Prediction, Predictions, prediction_of
from .utils import notebook
from .utils.arguments import gpu_number, integer, sides
from .utils.clips import clip_input
from .utils.cublaslt import load_cublaslt
from .utils.extras import needs
from .utils.precision import check_precision
from .weights.metadata import EMBEDDING_KEY, unpack

Images = NDArray[np.float32]


class Runtime:
    """A trained network, ready to classify. Safe to call from several threads at once; the GIL is released.

        runtime = vimcore.Runtime("vim.safetensors")
        runtime.predict("cat.jpg").label       # or bytes, a PIL image, a uint8 array, a list of these
        runtime.embed(["cat.jpg", "dog.jpg"])  # (2, D)

    Pickles as its arguments: a process that unpickles it, such as a spawned worker, opens the file again.

    Args:
        path: a vimcore safetensors file (`VisionMamba.save`, `vimcore convert`).
        device: "cpu", "cuda" (the first GPU) or "cuda:N"; images and logits are in the host's memory anyway,
            copied batch by batch between computations: a `VisionMamba` on the GPU can serve more of them.
        threads: threads of one call on the CPU; None: as many as the machine has cores.
        img_size: side or (height, width) in pixels; None: as stored. Another size resizes the position table.
        dtype: of activations, "float32" or "bfloat16" (on the CPU where the processor has a unit for it, see
            `vimcore doctor`); on a GPU also "float16". Images and logits are float32 anyway.

    Attributes:
        config: the architecture, with the names of the `VisionMamba` constructor.
        labels: class names, or None where the file has none.
        preprocess: how to make the input from a picture: resize and crop in pixels, mean, std; None where the
            input is no picture.
        is_embedding: whether the head gives coordinates, as of an image tower, and no logits of classes.

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
        check_precision("[Runtime] dtype", dtype, device)
        if threads is not None:
            threads = integer("[Runtime] threads", threads, 1)
        if img_size is not None:
            img_size = sides("[Runtime] img_size", img_size)
        self._arguments = (os.path.abspath(path), device, threads, img_size, dtype)
        height, width = img_size or (0, 0)
        if cuda >= 0:
            load_cublaslt()
        self._engine = _core.Engine(path, threads or 0, height, width, cuda, dtype)
        config = self._engine.config
        self.config: dict[str, Any] = config.to_dict()
        self.labels: list[str] | None
        _, self.labels, stored = unpack(self._engine.metadata, path)
        steps = stored.rescaled(*config.img_size) if stored else Preprocess.default(config)
        self.preprocess: dict[str, Any] | None = steps.to_dict() if steps else None
        self.is_embedding = self._engine.metadata.get(EMBEDDING_KEY) == "true"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        dtype: str = "float32",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Runtime:
        """The network of a folder or repository that `VisionMamba.save_pretrained` or `push_to_hub` wrote.

        Args:
            source: OWNER/NAME of a repository, a folder, or a vimcore file.
            device, threads, img_size, dtype: see `Runtime`.
            revision, token, cache_dir, local_files_only, force_download: as of `hf_hub_download`.

        Raises:
            OSError, ValueError, vimcore.Error: it holds no vimcore file.
            RuntimeError: the download fails, or huggingface_hub is missing; says the remedy.
        """
        path, bare = locate(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_only=local_files_only,
            force=force_download,
        )
        if bare is not None:
            raise ValueError(
                f"{path}: holds tensors alone; VisionMamba.from_pretrained reads them, and its "
                "save_pretrained writes what a Runtime reads"
            )
        return cls(path, device, threads, img_size, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments: whoever unpickles it, another process or `copy`, opens the file again."""
        return type(self), self._arguments

    def __repr__(self) -> str:
        path, device, _, _, dtype = self._arguments
        height, width = Config(**self.config).img_size
        count = self.config["num_classes"]
        gives = f"{count} {'coordinates' if self.is_embedding else 'classes'}" if count else "features"
        size = f"{self.config['in_chans']} x {height} x {width}"
        return f"Runtime({os.fsdecode(path)!r}: {size} to {gives}, {dtype} on {device})"

    def _repr_html_(self) -> str:
        """What the network takes and gives, and its architecture, in notebooks."""
        path, device, _, _, dtype = self._arguments
        config = Config(**self.config)
        height, width = config.img_size
        names = self.labels or []
        shown = ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
        count = sum(math.prod(shape) for shape in config.param_shapes().values())
        rows = [
            ("file", os.fsdecode(path)),
            ("input", f"{config.in_chans} x {height} x {width}, {config.tokens} tokens"),
            ("computes", f"{dtype} on {device}"),
            ("parameters", f"{count:,}"),
            ("multiply-adds", f"{config.flops() / 1e9:.4g} G"),
            ("labels", shown or "none"),
        ]
        architecture = notebook.table(list(self.config.items()))
        return (
            f"<b>vimcore.Runtime</b>{notebook.table(rows)}"
            f"<details><summary>architecture</summary>{architecture}</details>"
        )

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of normalised images.

        Args:
            images: (B, C, H, W) float32; of a network of clips (B, C, T, H, W), see `clip_input`.

        Returns:
            (B, num_classes) float32; (B, L, num_classes) with pool="all"; features where there is no head.

        Raises:
            ValueError: shape or type do not fit.
        """
        return self._engine.run(self._floats(images))

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
        return self._engine.features(self._floats(images))

    def _floats(self, images: Any) -> NDArray[np.float32]:
        found = np.ascontiguousarray(images)
        picture = found.dtype.kind not in "fc" or found.ndim < 4  # or a name of a file
        if picture or found.dtype != np.float32:  # of the other byte order, too
            wanted = self._engine.config.images_axes
            remedy = (
                "; runtime.predict and runtime.embed take files, PIL images, uint8 arrays and lists of them"
            )
            raise ValueError(
                f"[Runtime] images: expected {wanted} float32, got "
                f"{_shown(images, found)}{remedy if picture else ''}"
            )
        return found

    def embeddings(self, images: Images) -> Images:
        """One vector for each of the normalised images (B, C, H, W); float32.

        Returns:
            (B, D): the class token after the last norm (the mean of two), else the mean of all tokens, or
            what pool="max" and "last" take; all registers (B, n D); of image towers (`is_embedding`) what
            their head gives.
        """
        c = Config(**self.config)
        if self.is_embedding or (not c.num_classes and not c.head_per_token):
            return self(images)
        tokens = self.features(images)
        if c.class_token == "registers":
            return tokens[:, c.class_positions].reshape(len(tokens), -1)
        if c.class_token == "double":
            return (tokens[:, 0] + tokens[:, -1]) * np.float32(0.5)
        if c.class_token != "none":
            at = (tokens.shape[1] - 1) // 2 if c.class_token == "middle" else c.class_position
            return tokens[:, at]
        if c.pool in ("max", "last"):
            return tokens.max(1) if c.pool == "max" else tokens[:, -1]
        found: Images = tokens.mean(1, dtype=np.float32)
        return found

    # ---- pictures as people have them ----------------------------------------------------------------------

    def predict(
        self, x: Any, topk: int = 5, batch: int = 8, progress: bool | None = None
    ) -> Prediction | Predictions:
        """The most probable classes of pictures.

        Args:
            x: a path, the bytes of a file, a PIL image, a uint8 array (H, W, 3 or 4) or (H, W); or a list of
                these, or an array (N, H, W, 3).
            topk: how many classes.
            batch: pictures that are computed at once.
            progress: a bar on stderr; None: where that is a terminal, for several batches.

        Returns:
            A `Prediction` (`label`, `p`, `top`, `logits`), or a list of them. Notebooks show the pictures.

        Raises:
            ValueError: a picture cannot be read, is named, and the others are not returned; the network has
                no classes or takes no pictures.
        """
        topk, pictures, single = integer("[Runtime] topk", topk, 1), *given("[Runtime] predict", x)
        steps = self.picture_steps("predict", classes=True)
        found = Predictions()
        for some, images in self._batches(pictures, steps, batch, progress):
            for picture, logits in zip(some, self(images)):
                found.append(prediction_of(picture.name, logits, self.labels, topk, picture))
                if (error := found[-1].error) is not None:
                    raise ValueError(f"{picture.name}: {error}")
        return found[0] if single else found

    def embed(self, x: Any, batch: int = 8, progress: bool | None = None) -> Images:
        """Vectors of pictures, see `embeddings`; for cosines they are to be divided by their lengths.

        Args:
            x, batch, progress: as of `predict`.

        Returns:
            (D,) float32 of a single picture, (N, D) of several.

        Raises:
            ValueError: a picture cannot be read, and is named; the network takes no pictures.
        """
        pictures, single = given("[Runtime] embed", x)
        steps, rows = self.picture_steps("embed"), []
        for some, images in self._batches(pictures, steps, batch, progress):
            rows.append(self.embeddings(images))
            for picture, row in zip(some, rows[-1]):
                if not np.isfinite(row).all():
                    raise ValueError(f"{picture.name}: {NOT_FINITE}")
        width = self.config["num_classes"] if self.is_embedding else self.config["embed_dim"]
        found = np.concatenate([np.empty((0, width), np.float32), *rows])
        return found[0] if single else found

    def picture_steps(self, what: str, classes: bool = False, clips: bool = False) -> Preprocess:
        """How pictures, or with `clips` also the frames of clips, become input.

        Raises:
            ValueError: the network takes none, or has no classes where they are asked for.
        """
        c, steps = self.config, self.preprocess
        if c["frames"] and not clips:
            raise ValueError(
                f"[{what}] weights: the network takes clips of {c['frames']} frames, no pictures; "
                "runtime(runtime.clip_input(clip)) and `vimcore predict` classify them"
            )
        if classes:
            if self.is_embedding:
                raise ValueError(
                    f"[{what}] weights: an image tower, whose outputs are no classes; `vimcore search` and "
                    "Runtime.embed use it"
                )
            if not c["num_classes"]:
                raise ValueError(
                    f"[{what}] weights: the network has no head (num_classes=0), so there is nothing to "
                    "predict"
                )
            if len(Config(**c).logits_shape(1)) == 3:
                raise ValueError(
                    f'[{what}] weights: with pool="all" there are logits for every patch, none for the image'
                )
        channels = len(steps["mean"]) if steps else "none that a picture file could fill"
        if steps is None or channels != c["in_chans"]:
            raise ValueError(
                f"[{what}] weights: the network takes {c['in_chans']} channels, "
                f"its preprocessing gives {channels}"
            )
        return Preprocess(**steps)

    def _batches(
        self, pictures: list[Given], steps: Preprocess, batch: int, progress: bool | None
    ) -> Iterator[tuple[list[Given], Images]]:
        batch = integer("[Runtime] batch", batch, 1)
        show = _bar(len(pictures), len(pictures) > batch if progress is None else progress, progress is None)
        try:
            for start in range(0, len(pictures), batch):
                some = pictures[start : start + batch]
                yield some, np.stack([input_of(picture, steps) for picture in some])
                show(len(some))
        finally:
            show(0)


def _shown(given: Any, array: NDArray[Any]) -> str:
    if isinstance(given, np.ndarray) or array.dtype.kind in "buif":
        return f"{type(given).__name__} {array.shape} {array.dtype}"
    return f"{type(given).__name__}"


def _bar(total: int, wanted: bool, terminal_only: bool) -> Callable[[int], None]:
    """A progress bar by tqdm, where it is wanted and installed; 0 ends it."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        if wanted and not terminal_only:
            raise ImportError(f"[Runtime] progress=True needs tqdm; {needs('demo')}") from error
        return lambda done: None
    bar = tqdm(
        total=total, unit="image", leave=False, disable=(None if terminal_only else False) if wanted else True
    )

    def show(done: int) -> None:
        if done:
            bar.update(done)
        else:
            bar.close()

    return show
