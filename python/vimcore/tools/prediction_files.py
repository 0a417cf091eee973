# SPDX-License-Identifier: Apache-2.0
"""Files of predictions, of the format that their suffix says: the same bytes as vim-infer's; no torch."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from ..results import Prediction
from ..utils.files import atomic, csv_row

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


class Writer(Protocol):
    """Of an open file."""

    def add(self, prediction: Prediction, passed_over: Mapping[str, int] | None) -> None:
        """The prediction of the next picture; with the last one also the files that were passed over."""

    def end(self) -> None:
        """There are no more."""


def check_out(path: str, suffixes: Sequence[str], name: str = "out") -> str:
    """The suffix in small letters, before the work begins whose results go there.

    Args:
        name: of the option.

    Raises:
        ValueError: it is none of these.
        OSError: the folder is not there, or cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in suffixes:
        raise ValueError(f"{name}: expected a name that ends with {', '.join(suffixes)}, got {path}")
    folder = os.path.dirname(path) or "."
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES if os.path.isdir(folder) else errno.ENOENT, "cannot write there", path)
    return suffix


@contextlib.contextmanager
def prediction_file(path: str, topk: int, classes: int, logits: bool) -> Iterator[Writer]:
    """A file that takes its name when all is written.

    Args:
        topk: classes of a picture.
        classes: of the network.
        logits: whether those of all classes are written.

    Raises:
        ValueError: there is no such format.
        ImportError: what the format needs is not installed.
    """
    suffix = check_out(path, SUFFIXES)
    columns = [
        name if rank == 1 else f"{name}_{rank}"
        for rank in range(1, min(topk, classes) + 1)
        for name in ("index", "label", "p")
    ]
    columns += [f"logit_{i}" for i in range(classes)] if logits else []
    if suffix == ".parquet":
        _require_parquet()
    with atomic(Path(path)) as file:
        writer: Writer
        if suffix == ".csv":
            writer = _Csv(file, columns, logits)
        elif suffix == ".parquet":
            writer = _Parquet(file, columns, logits)
        else:
            writer = _Json(file, logits, array=suffix == ".json")
        yield writer
        writer.end()


class _Json:
    """An object a line; or an array of these."""

    def __init__(self, file: IO[bytes], logits: bool, array: bool) -> None:
        self.file, self.logits, self.array = file, logits, array
        self.before = b"[\n" if array else b""

    def add(self, prediction: Prediction, passed_over: Mapping[str, int] | None) -> None:
        self.file.write(self.before + prediction.to_json(self.logits, passed_over).encode())
        self.before = b",\n" if self.array else b"\n"

    def end(self) -> None:
        self.file.write(b"\n]\n" if self.array else b"\n")


class _Csv:
    """A row a picture, the best class first; bytes of names as they are."""

    def __init__(self, file: IO[bytes], columns: Sequence[str], logits: bool) -> None:
        self.file, self.logits, self.width = file, logits, len(columns)
        file.write(csv_row(["image", *columns, "error"]))

    def add(self, prediction: Prediction, passed_over: Mapping[str, int] | None) -> None:
        cells: list[str] = [""] * self.width
        if prediction.error is None:
            found = [(str(i), label or "", f"{p:.6g}") for i, label, p in prediction.top]
            cells = [cell for row in found for cell in row]
            if self.logits and prediction.logits is not None:
                cells += [f"{float(value):.9g}" for value in prediction.logits]
        self.file.write(csv_row([prediction.image, *cells, prediction.error or ""]))

    def end(self) -> None:
        pass


class _Parquet:
    """The columns of the CSV file, numbers as numbers."""

    def __init__(self, file: IO[bytes], columns: Sequence[str], logits: bool) -> None:
        self.file, self.columns, self.logits = file, columns, logits
        self.rows: list[dict[str, object]] = []

    def add(self, prediction: Prediction, passed_over: Mapping[str, int] | None) -> None:
        cells: list[object] = [cell for entry in prediction.top for cell in entry]
        if prediction.error is None and self.logits and prediction.logits is not None:
            cells += [float(value) for value in prediction.logits]
        image = os.fsencode(prediction.image).decode(errors="backslashreplace")
        self.rows.append({"image": image, **dict(zip(self.columns, cells)), "error": prediction.error})

    def end(self) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        kinds = {"index": arrow.int32(), "label": arrow.string(), "p": arrow.float64()}
        fields = [(name, kinds.get(name.partition("_")[0], arrow.float32())) for name in self.columns]
        schema = arrow.schema([("image", arrow.string()), *fields, ("error", arrow.string())])
        parquet.write_table(arrow.Table.from_pylist(self.rows, schema), self.file)


def _require_parquet() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("out: .parquet needs pyarrow: pip install pyarrow") from error
