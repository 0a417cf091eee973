# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds of our operators for tools that count in a graph of torch.jit (fvcore)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .library import FORMULAS


def fvcore_handles() -> dict[str, Callable[..., int]]:
    """What fvcore has to know: `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`.

    fvcore counts a multiply-add as one.
    """

    def handle(formula: Callable[..., Any]) -> Callable[..., int]:
        return lambda inputs, outputs: int(formula(*map(_argument, inputs)))

    return {name: handle(formula) for name, formula in FORMULAS.items()}


def _argument(value: Any) -> Any:
    """Shape of a tensor, shapes of a list of them, or the constant itself."""
    if value.type().kind() == "TensorType":
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        parts: Sequence[Any] = list(value.node().inputs())
        return [_argument(part) for part in parts]
    return value.toIValue()
