# SPDX-License-Identifier: Apache-2.0
"""For torch.compile, without importing it: the compiler takes as long to import as the rest of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """What torch.compiler.assume_constant_result does: a traced call becomes its result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
