# SPDX-License-Identifier: Apache-2.0
"""Lists of images: CSV and TSV files with the columns path and label, or path and mask."""

from __future__ import annotations

import codecs
import csv
import io

from .picture_files import read_file

LISTS = (".csv", ".tsv")
_MARKS = (  # at the start of a file; the longer ones first, as one begins like another
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_list(path: str, column: str = "label", default: str | None = None) -> list[tuple[str, str]]:
    """Path and label (or another column) of each row; the first row names the columns, others are allowed.

    Args:
        default: in every row of a list without that column; None: there must be one.

    Raises:
        OSError: the file cannot be read.
        ValueError: with file and line: it is not text, columns are missing, or a row is short.
    """
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter)
    rows: list[tuple[str, str]] = []
    try:
        header = next((row for row in reader if row), [])
        if default is not None and column not in header:
            column = "path"
        else:
            default = None
        if header.count("path") != 1 or header.count(column) != 1:
            wanted = "column path" if column == "path" else f"columns path and {column}"
            raise ValueError(f"{path}: expected the {wanted}, got {header}")
        for row in reader:
            if row:
                name, label = _picked(header, row, column)
                rows.append((name, label if default is None else default))
    except (csv.Error, _RowError) as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    return rows


class _RowError(Exception):
    """What is wrong with one row."""


def _picked(header: list[str], row: list[str], column: str) -> tuple[str, str]:
    fields = dict(zip(header, row))
    name, label = fields.get("path"), fields.get(column)
    if not name or not label:
        raise _RowError(f"expected a path and a {column}, got {row}")
    if any(row[len(header) :]):
        raise _RowError(f"expected {len(header)} fields, got {len(row)}: {row}; quote a comma within a field")
    if "\0" in name + label:
        raise _RowError("expected text, got a NUL character")
    return name, label


def _text(path: str) -> str:
    data = read_file(path, None)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line}: expected UTF-8 or marked UTF-16, got byte {data[error.start]:#04x}; "
            "save the list as UTF-8"
        ) from None
