# SPDX-License-Identifier: Apache-2.0
"""Arguments as Python's own types: numbers of numpy and torch are taken where a number is meant."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any


def integer(what: str, value: Any, least: int | None = None) -> int:
    """A whole number: an int, or what counts as one (`__index__`), but no bool.

    Raises:
        TypeError, ValueError: name `what` and the value.
    """
    number = native(what, value)
    if type(number) is not int:
        raise TypeError(f"{what}: expected an integer, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{what}: expected {least} or more, got {number}")
    return number


def real(what: str, value: Any) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: name `what` and the value.
    """
    number = native(what, value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{what}: expected a number, got {value!r:.60}")
    return float(number)


def boolean(what: str, value: Any) -> bool:
    """True or False, of numpy too.

    Raises:
        TypeError: names `what` and the value.
    """
    if isinstance(found := native(what, value), bool):
        return found
    raise TypeError(f"{what}: expected True or False, got {value!r:.60}")


def sides(what: str, value: Any) -> tuple[int, int]:
    """(height, width) in pixels of one number or of two.

    Raises:
        TypeError, ValueError: name `what` and the value.
    """
    found = native(what, value)
    if not isinstance(found, list):
        found = [found, found]
    if len(found) != 2:
        raise ValueError(f"{what}: expected one side or (height, width), got {value!r}")
    return integer(what, found[0], 1), integer(what, found[1], 1)


def gpu_number(what: str, value: Any) -> int:
    """The number of a GPU for "cuda" (the first) or "cuda:N"; -1 for "cpu".

    Raises:
        ValueError: names `what` and the value.
    """
    if not isinstance(value, str) or re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", value) is None:
        raise ValueError(f"{what}: expected 'cpu', 'cuda' or 'cuda:N', got {value!r:.60}")
    return -1 if value == "cpu" else int(value.partition(":")[2] or 0)


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the core, which says what is wrong with their types and ranges."""
    return {name: native(f"[config] {name}", value) for name, value in given.items()}


def native(what: str, value: Any) -> Any:
    """The value as None, bool, int, finite float, str or a list of these; errors name `what`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy":
        return bool(value)
    if hasattr(value, "__index__"):
        try:
            return operator.index(value)
        except TypeError:  # an array, or a tensor that is no integer
            pass
    if getattr(value, "shape", None) in (None, ()) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{what}: expected a number or text, got {value!r:.60}") from None
        if not math.isfinite(number):
            raise ValueError(f"{what}: expected a finite number, got {number}")
        return number
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        return [native(what, item) for item in value]
    raise TypeError(f"{what}: expected a number or text, got {type(value).__name__}")
