# SPDX-License-Identifier: Apache-2.0
"""What `vimcore info` shows of a file of weights. Needs no torch."""

from __future__ import annotations

import math
import os
from typing import Any

from .. import _core
from .metadata import unpack


def describe_file(path: str) -> dict[str, Any]:
    """What a vimcore file holds; flops are multiply-adds of one image, scans included.

    Raises:
        ValueError, vimcore.Error: it is damaged, no vimcore file, or its tensors are not its architecture's.
    """
    tensors, _ = _core.safetensors_header(path)
    config, labels, preprocess = unpack(_core.check_file(path)[0], path)
    return {
        "file": path,
        "bytes": os.path.getsize(path),
        "types": sorted({dtype for _, dtype, _ in tensors}),
        "parameters": sum(map(math.prod, config.param_shapes().values())),
        "flops": config.flops(),
        "tokens": config.tokens,
        "grid": list(config.grid),
        "config": config.to_dict(),
        "labels": labels,
        "preprocess": preprocess.to_dict() if preprocess else None,
    }
