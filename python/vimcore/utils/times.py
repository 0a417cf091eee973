# SPDX-License-Identifier: Apache-2.0
"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours as well: "4:05", "27:04:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
