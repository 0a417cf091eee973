# SPDX-License-Identifier: Apache-2.0
"""How well images find their captions, and captions their images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...clip.text import Tokenizer
from ...clip.zero_shot import encode_texts
from ...data.classes import Sample
from ...utils import distributed

FIRST = (1, 5, 10)
_ROWS = 1024  # of similarities at a time
Watch = Callable[[], None]


@dataclass(frozen=True)
class Embedded:
    """Of all processes.

    Attributes:
        images: (N, E) float32 unit vectors.
        indices: (N,) place of each in the data, ascending.
        texts: (T, E) of the distinct captions.
        captions: these.
        own: of each image the places of its captions among them.
        errors: files of this process's share that could not be read.
    """

    images: NDArray[np.float32]
    indices: NDArray[np.int64]
    texts: NDArray[np.float32]
    captions: list[str]
    own: list[NDArray[np.int64]]
    errors: dict[str, str]


def embed(
    model: nn.Module,
    batches: Iterable[Sample],
    captions: Sequence[tuple[str, ...]],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Embedded:
    """Images and captions in the common space; the processes share the work.

    Args:
        batches: of this process's share.
        captions: of every image of the data.
    """
    network: Any = model
    found: list[NDArray[np.float32]] = []
    places: list[NDArray[np.int64]] = []
    errors: dict[str, str] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, precision, precision != torch.float32):
        for batch in batches:
            errors.update(batch.errors)
            good = batch.indices >= 0
            if bool(good.any()):
                pixels = batch.images[good].to(device, non_blocking=True)
                found.append(network.encode_image(pixels, normalize=True).float().cpu().numpy())
                places.append(batch.indices[good].numpy())
        texts = list(dict.fromkeys(text for own in captions for text in own))
        mine = texts[distributed.rank() :: distributed.world()]
        tokenizer = Tokenizer(network.context_length)
        coded = encode_texts(model, mine, tokenizer).float().cpu().numpy() if mine else None
    model.train(was_training)
    rows = [row for part in distributed.gather(list(zip(places, found))) for row in part]
    if not rows:
        raise RuntimeError("none of the images to validate on could be read")
    indices, images = (np.concatenate(parts) for parts in zip(*rows))
    order = np.argsort(indices, kind="stable")
    every = np.empty((len(texts), images.shape[1]), np.float32)
    for start, part in enumerate(distributed.gather(coded)):
        if part is not None:
            every[start :: distributed.world()] = part
    place = {text: i for i, text in enumerate(texts)}
    own = [np.array([place[text] for text in captions[i]]) for i in indices[order]]
    return Embedded(images[order], indices[order], every, texts, own, errors)


def recalls(found: Embedded) -> dict[str, float]:
    """Shares of images, and of captions, one of whose own is among the first 1, 5, 10.

    Names: image_r1, text_r1, ...; r1, r5, r10 are the means of both. Equal similarities count as misses.
    """
    of_text: list[list[int]] = [[] for _ in found.captions]
    for image, own in enumerate(found.own):
        for text in own:
            of_text[text].append(image)
    seen = np.array([bool(images) for images in of_text])  # captions whose images could all not be read
    ranks = {
        "image": _ranks(found.images, found.texts, found.own),
        "text": _ranks(found.texts[seen], found.images, [np.array(x) for x in of_text if x]),
    }
    values = {f"{what}_r{k}": float((rank < k).mean()) for k in FIRST for what, rank in ranks.items()}
    return {**{f"r{k}": (values[f"image_r{k}"] + values[f"text_r{k}"]) / 2 for k in FIRST}, **values}


def _ranks(
    queries: NDArray[np.float32], others: NDArray[np.float32], own: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Of each query: how many of the others, but for its own, are no farther than the nearest of its own."""
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _ROWS):
        near = queries[start : start + _ROWS] @ others.T
        for i, row in enumerate(near):
            mine = own[start + i]
            best = row[mine].max()
            row[mine] = -np.inf
            ranks[start + i] = int((row >= best).sum())
    return ranks
