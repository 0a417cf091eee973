# SPDX-License-Identifier: Apache-2.0
"""What `vimcore info` shows of a file of weights. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from .. import _core
from ..utils.files import listed
from .metadata import unpack


def describe_file(path: str) -> dict[str, Any]:
    """What a vimcore file holds; flops are multiply-adds of one image, scans included.

    Raises:
        ValueError, vimcore.Error: it is damaged, no vimcore file, or its tensors are not its architecture's.
    """
    tensors, metadata = _core.safetensors_header(path)
    config, labels, preprocess = unpack(metadata, path)
    config_json = _core.config_normalize(json.dumps(config))
    facts = _core.config_facts(config_json)
    shapes = {name: tuple(shape) for name, _, shape in tensors}
    wanted = {name: tuple(shape) for name, shape in _core.param_shapes(config_json)}
    wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    wrong += [name for name in shapes if name not in wanted and not name.startswith("rope.")]
    if wrong:
        raise ValueError(f"{path}: tensors do not fit the architecture: {listed(wrong)}")
    return {
        "file": path,
        "bytes": os.path.getsize(path),
        "types": sorted({str(dtype) for _, dtype, _ in tensors}),
        "parameters": sum(map(math.prod, wanted.values())),
        "flops": facts["flops"],
        "tokens": facts["tokens"],
        "grid": list(facts["grid"]),
        "config": json.loads(config_json),
        "labels": labels,
        "preprocess": preprocess,
    }
