# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, for reading it back: log.jsonl and eval.npz. Needs no torch."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIELDS = {
    "step": ("step", "epoch", "loss", "lr", "images_per_second", "grad_norm"),
    "eval": ("step", "epoch", "loss", "top1", "top5"),
}


@dataclass(frozen=True)
class Log:
    """The lines of log.jsonl of either kind, by step, as columns; what a line lacks is NaN."""

    steps: dict[str, NDArray[np.float64]]
    evals: dict[str, dict[str, NDArray[np.float64]]]  # "raw" and "ema" weights


@dataclass(frozen=True)
class Answers:
    """What a network said of N images.

    Attributes:
        labels, predictions: (N,) class indices.
        probabilities: (N, classes).
        names: of the classes.
        files: (N,) where the pictures lie; "": nowhere.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    names: list[str]
    files: list[str]


def read_log(path: Path) -> Log:
    """The log of a run, also while it is being written: a last line without an end is left out.

    Raises:
        ValueError: a line is not JSON or holds no numbers where they belong; names file and line.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            kind = entry["kind"]
            if kind in ("step", "eval"):
                key = "step" if kind == "step" else str(entry["weights"])
                found.setdefault(key, {})[int(entry["step"])] = entry  # of a step done again, the last
                float(entry["epoch"]), float(entry["loss"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no entry of a log ({error})") from None
    columns = {
        key: _columns([rows[step] for step in sorted(rows)], _FIELDS["step" if key == "step" else "eval"])
        for key, rows in found.items()
    }
    steps = columns.pop("step", {name: np.empty(0) for name in _FIELDS["step"]})
    return Log(steps, columns)


def _columns(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    return {
        name: np.array([math.nan if row.get(name) is None else row[name] for row in rows], np.float64)
        for name in fields
    }


def read_answers(path: Path) -> Answers:
    """The arrays of eval.npz; ValueError says what is wrong with them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels, predictions = arrays["labels"], arrays["predictions"]
            probabilities = arrays["probabilities"]
            names, files = [str(n) for n in arrays["names"]], [str(f) for f in arrays["files"]]
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not the answers of a run: {error}") from None
    count, classes = len(labels), len(names)
    for name, found, shape in (
        ("labels", labels, (count,)),
        ("predictions", predictions, (count,)),
        ("probabilities", probabilities, (count, classes)),
    ):
        if found.shape != shape:
            raise ValueError(f"{path}: {name}: expected {shape}, got {found.shape}")
    for name, index in (("labels", labels), ("predictions", predictions)):
        if index.dtype.kind not in "iu" or (count and not 0 <= index.min() <= index.max() < classes):
            raise ValueError(f"{path}: {name}: expected class indices from 0 to {classes - 1}")
    if len(files) != count or count == 0:
        raise ValueError(
            f"{path}: files: expected one for each of at least one image, got {len(files)} for {count}"
        )
    return Answers(labels.astype(np.int64), predictions.astype(np.int64), probabilities, names, files)
