# SPDX-License-Identifier: Apache-2.0
"""Types of activations, by the names that commands and `Runtime` take, and where they are computed."""

from __future__ import annotations

from typing import Any

from .. import _core

FLOATS = ("float32", "bfloat16", "float16")
ON_CPU = ("float32", "bfloat16")  # the latter where the processor has a unit for it


def check_precision(what: str, dtype: Any, device: str) -> None:
    """Whether activations may be of this type there.

    Args:
        what: the argument, for messages.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: no such type, or not on such a device.
        vimcore.Error: this CPU has no unit for bfloat16.
    """
    types = ON_CPU if device == "cpu" else FLOATS
    if dtype not in types:
        wanted = ", ".join(map(repr, types[:-1]))
        raise ValueError(
            f"{what}: expected {wanted} or {types[-1]!r} on {device.partition(':')[0]}, got {dtype!r:.60}"
        )
    if device == "cpu" and dtype == "bfloat16" and (why := _core.bf16_refusal()):
        raise _core.Error(f"{what}: bfloat16: {why}")
