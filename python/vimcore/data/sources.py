# SPDX-License-Identifier: Apache-2.0
"""Data sets of `timm.data.create_dataset`: an archive, the Hugging Face hub, torchvision.

Only those that have a length and an order: a run visits image k of epoch e again after a stop, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pictures import decode
from .pillow_pictures import upright_pixels

STREAMS = ("hfids", "tfds", "wds")
HOW = "tar:FILE, hfds/NAME[#SPLIT] or torch/NAME:FOLDER[#SPLIT]"


def is_source(name: str) -> bool:
    """Whether this names a data set of timm's and no file or folder."""
    kind = name.partition("/")[0].lower()
    return name.startswith("tar:") or (kind in ("hfds", "torch", *STREAMS) and not os.path.exists(name))


class Source:
    """A data set, opened anew in each process: two that read one open archive would disturb each other.

    Args:
        name: one of HOW.
        split: where the name has none.

    Raises:
        ValueError, OSError: there is no such data set, its package is missing, or it is a stream.
    """

    def __init__(self, name: str, split: str) -> None:
        kind = name.partition("/")[0].lower()
        if kind in STREAMS:
            raise ValueError(
                f"data: {name}: {kind} is a stream without a fixed length and order, so that a run could not "
                f"be resumed; expected {HOW}"
            )
        self.name, self.process = name, -1
        self.dataset: Any = None
        self.arguments: dict[str, Any]
        if name.startswith("tar:"):
            path = name.removeprefix("tar:")
            if not path.endswith(".tar"):
                raise ValueError(f"data: {name}: expected a file whose name ends with .tar")
            os.stat(path)  # says what is wrong with it
            self.arguments = {"name": "", "root": path}
            return
        name, _, chosen = name.partition("#")
        name, _, root = name.partition(":")
        self.arguments = {"name": name, "root": root or None, "split": chosen or split}
        if kind == "hfds" and importlib.util.find_spec("datasets") is None:
            raise ValueError(f"data: {self.name}: needs the package datasets: pip install datasets")
        if kind == "torch" and not root:
            raise ValueError(f"data: {self.name}: expected torch/NAME:FOLDER, where torchvision keeps it")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process": -1, "dataset": None}

    def _open(self) -> Any:
        if self.process != os.getpid():
            from timm.data import create_dataset

            try:
                self.dataset = create_dataset(**self.arguments)
            except (AssertionError, ImportError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"data: {self.name}: {reason}") from None
            self.process = os.getpid()
        return self.dataset

    def read(self, place: int) -> NDArray[np.uint8]:
        """(H, W, 3) of a picture."""
        dataset = self._open()
        if hasattr(dataset, "reader"):  # not dataset[place], which silently goes on to the next readable one
            file = dataset.reader[place][0]
            with file:
                return decode(file.read(), "")
        return upright_pixels(dataset[place][0])

    def contents(self) -> tuple[list[str], NDArray[np.int64], list[str]]:
        """Names of the pictures, their labels, names of the classes.

        Raises:
            ValueError: it has no labels.
        """
        dataset = self._open()
        of = getattr(dataset, "reader", dataset)
        labels = next((getattr(of, n) for n in ("targets", "labels", "_labels") if hasattr(of, n)), None)
        if labels is None and hasattr(of, "iter_targets"):
            labels = list(of.iter_targets())
        if labels is None or any(label is None for label in labels):
            raise ValueError(f"data: {self.name}: has no labels")
        labels = np.asarray(labels, np.int64)
        place: dict[Any, int] = next(
            (getattr(of, n) for n in ("class_name_to_idx", "class_to_idx") if getattr(of, n, None)), {}
        )
        by_index = {index: str(name) for name, index in place.items()}
        classes = [
            by_index.get(i, str(i)) for i in range(max(int(labels.max(initial=-1)) + 1, len(by_index)))
        ]
        if hasattr(of, "samples"):
            members = [getattr(sample[0], "name", sample[0]) for sample in of.samples]
        else:
            members = [str(i) for i in range(len(labels))]
        return [f"{self.name}/{member}" for member in members], labels, classes
