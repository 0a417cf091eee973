# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, for reading it back: log.jsonl and eval.npz. Needs no torch."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.files import shortened

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


def entry_of(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of log.jsonl.

    Raises:
        ValueError: it is not JSON, or a field is missing or of another kind; names file, line and field.
    """
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: no entry of a log: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: no entry of a log: expected an object, got {_brief(entry)}")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise ValueError(f"{where}: kind: expected one of {', '.join(_ENTRIES)}, got {_brief(kind)}")
    for field, (wanted, fits) in _ENTRIES[kind].items():
        if field not in entry and field not in _OPTIONAL:
            raise ValueError(f"{where}: {field}: expected {wanted}, but it is not there")
        if field in entry and not fits(entry[field]):
            raise ValueError(f"{where}: {field}: expected {wanted}, got {_brief(entry[field])}")
    return entry


def _brief(value: Any) -> str:
    return shortened(json.dumps(value), 60)


def _is_real(value: Any) -> bool:
    """A number that float64 can hold, NaN and inf among them."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_finite(value: Any) -> bool:
    return _is_real(value) and math.isfinite(value)


_COUNT = ("a whole number, 1 or more", lambda value: type(value) is int and 1 <= value < 1 << 63)
_TIME = ("a finite number, 0 or more", lambda value: _is_finite(value) and value >= 0)
_ANY = ("a number or null", lambda value: value is None or _is_real(value))
_SHARE = ("a number from 0 to 1", lambda value: _is_finite(value) and 0 <= value <= 1)
_TEXT = ("text", lambda value: isinstance(value, str))
_OPTIONAL = ("images_per_second", "grad_norm")  # null, or not there
_ENTRIES: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "start": {},
    "step": {"step": _COUNT, "epoch": _TIME, "loss": _ANY, "lr": _TIME, **dict.fromkeys(_OPTIONAL, _ANY)},
    "eval": {"step": _COUNT, "epoch": _TIME, "loss": _ANY, "top1": _SHARE, "top5": _SHARE, "weights": _TEXT},
    "fault": {"file": _TEXT, "error": _TEXT},
}


def read_log(path: Path) -> Log:
    """The log of a run, also while it is being written: a last line without an end is left out.

    Raises:
        ValueError: a line is not JSON or holds no numbers where they belong; names file and line.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        entry = entry_of(line, path, number)
        if entry["kind"] in ("step", "eval"):
            key = "step" if entry["kind"] == "step" else entry["weights"]
            found.setdefault(key, {})[entry["step"]] = entry  # of a step done again, the last
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
