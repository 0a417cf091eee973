# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written atomically, read without executing anything."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ..utils.files import atomic

FORMAT = 1


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Everything that a run needs to go on."""
    with atomic(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU; nothing in the file is executed.

    Raises:
        OSError, ValueError: there is none, or it is damaged or of another version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensor that no checkpoint of ours has
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint that this version of vimcore can continue")
    return content
