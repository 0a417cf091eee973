# SPDX-License-Identifier: Apache-2.0
"""What notebooks show of a value: tables in HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .files import literal


def cell(value: object) -> str:
    """Text as HTML."""
    return html.escape(literal(str(value)))


def table(rows: Sequence[Sequence[object]], head: Sequence[object] = ()) -> str:
    """A table, its cells as text."""

    def row(cells: Sequence[object], kind: str) -> str:
        shown = "".join(f"<{kind} style='text-align:left'>{cell(value)}</{kind}>" for value in cells)
        return f"<tr>{shown}</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
