# SPDX-License-Identifier: Apache-2.0
"""Training: `fit`, a small loop for images in memory, and the engine behind `vimcore train`.

history = vimcore.train.fit(model, (images, labels), (images, labels), epochs=20)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .in_memory import Augment, Data, Evaluation, History, evaluate, fit
    from .loop import NonFiniteError
    from .optimizer import parameter_groups
    from .schedule import cosine_lr

_LAZY = {  # so that the settings of a run need no torch
    "Augment": "in_memory",
    "Data": "in_memory",
    "Evaluation": "in_memory",
    "History": "in_memory",
    "cosine_lr": "schedule",
    "evaluate": "in_memory",
    "fit": "in_memory",
    "NonFiniteError": "loop",
    "parameter_groups": "optimizer",
}
__all__ = [
    "Augment",
    "Data",
    "Evaluation",
    "History",
    "NonFiniteError",
    "cosine_lr",
    "evaluate",
    "fit",
    "parameter_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
