# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables, and JSON on one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..utils.files import literal


def print_table(rows: Sequence[Sequence[Any]], indent: str = "") -> None:
    """Rows of cells, the columns aligned; names in them are shown by `literal`."""
    text = [[literal(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    for row in text:
        print((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip())


def print_json(value: Any, *, ascii_only: bool = True) -> None:
    """A value on one line, flushed: a reader of a pipe gets results as they come."""
    print(json.dumps(value, ensure_ascii=ascii_only), flush=True)
