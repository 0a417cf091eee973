# SPDX-License-Identifier: Apache-2.0
"""The heads of UPerNet as the package transformers has them.

Their classes need torch alone; importing them as usual takes six seconds, for everything around them. So they
are taken out of the installed source.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def heads(dim: int, channels: int, auxiliary: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """The head and the auxiliary head, with random weights and statistics."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "models" / "upernet" / "modeling_upernet.py"
    wanted = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["nn.Module"]
    ]
    found: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(compile(ast.Module(wanted, []), str(source), "exec"), found)
    config = SimpleNamespace(
        pool_scales=[1, 2, 3, 6],
        hidden_size=channels,
        num_labels=classes,
        auxiliary_in_channels=dim,
        auxiliary_channels=auxiliary,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    pair = found["UperNetHead"](config, [dim] * 4), found["UperNetFCNHead"](config, [dim] * 4)
    for module in (module for head in pair for module in head.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return pair


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under mmsegmentation's names."""
    return {
        key.replace(".batch_norm.", ".bn.").replace("classifier.", "conv_seg."): value
        for key, value in state.items()
    }
