# SPDX-License-Identifier: Apache-2.0
"""The tensors of a `VisionMamba`, or of a class derived from it, as files hold them: plain values, all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _core
from ..utils.files import listed
from ..weights.wrappers import ROPE_TABLES
from .base import NetworkBase
from .parameters import CausalConv1d, Layer, Mixer, PatchEmbed, Rope, Scale

_OURS = (CausalConv1d, Layer, Mixer, PatchEmbed, Rope, Scale)
_PLAIN = (*_OURS, nn.ModuleList, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Dropout)

# What the names of tensors tell about who put them there, and how plain weights come back.
_REMEDIES = {
    r"_mask\b": "torch.nn.utils.prune.remove(module, name) makes pruning permanent",
    r"_g\b": "torch.nn.utils.remove_weight_norm(module) gives the plain weight",
    r"_u\b": "torch.nn.utils.remove_spectral_norm(module) gives the plain weight",
    r"lora_|base_layer": "merge_and_unload() of PEFT puts adapters into the weights",
    r"_orig_mod\b": "compile the whole network, not modules of it, or save before",
    r"\bhead[.:]": "reset_classifier(num_classes) gives a head that the file can describe",
}


def described(kind: type) -> bool:
    """Whether the configuration describes all tensors of this class: ours, not those derived from it."""
    return bool(vars(kind).get("_described", False))


def parametrised(model: nn.Module) -> dict[str, tuple[nn.Module, str, str]]:
    """Weights that torch.nn.utils.parametrize computes: (module, leaf, prefix of what from) by name."""
    found = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            begin = path + "." if path else ""
            for leaf in module.parametrizations:
                found[begin + leaf] = (module, leaf, f"{begin}parametrizations.{leaf}.")
    return found


def computed(module: nn.Module, leaf: str) -> Tensor:
    """The value of a parametrised weight in eval mode; what it is computed from stays as it is."""
    steps: Any = module.parametrizations[leaf]  # type: ignore[index]
    modes = [(step, step.training) for step in steps.modules()]
    try:
        steps.eval()
        with torch.no_grad():
            value: Tensor = steps()
        return value.detach()
    finally:
        for step, mode in modes:
            step.training = mode


def tensors_to_save(model: NetworkBase, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arrays by name: those of the architecture, then those that a derived class has besides.

    Args:
        wanted: names and shapes of the architecture.

    Raises:
        ValueError: names tensors that are missing or cannot be written, and what to do.
    """
    state = {name: value for name, value in model.state_dict().items() if name not in ROPE_TABLES}
    complete = described(parametrize.type_before_parametrizations(model))
    faults = replaced(model) if complete else []
    order = {name: i for i, name in enumerate(wanted)}
    if not complete:  # its head is its own
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("head.")}
    for name, (module, leaf, origin) in parametrised(model).items():
        if name in wanted:
            state = {k: v for k, v in state.items() if not k.startswith(origin)}
            state[name] = computed(module, leaf)
    others = sorted(set(state) - set(wanted))
    faults += [f"not described: {name}" for name in others if complete]
    shapes = {name: tuple(state[name].shape) for name in wanted if isinstance(state.get(name), Tensor)}
    faults += _core.misfits(wanted, shapes)
    faults += [f"{name}: {why}" for name, value in state.items() if (why := unwritable(value))]
    if faults:
        lines = [listed(faults, "\n  "), *(f"to save it: {remedy}" for remedy in remedies(faults))]
        raise ValueError(
            "[VisionMamba] save: the file cannot describe this network:\n  " + "\n  ".join(lines)
        )
    names = sorted(state, key=lambda name: order.get(name, len(order)))
    return {name: plain_array(state[name]) for name in names}


def replaced(model: NetworkBase) -> list[str]:
    """Modules that are not what the constructor put there: the file would not tell what they do."""
    found = []
    for path, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        if module is not model and kind not in _PLAIN and "parametrizations" not in path.split("."):
            found.append(f"{path}: a {kind.__name__}")
    return found


def unwritable(value: Any) -> str | None:
    """Why a value of a state dict is no array; None where it is one."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}; gather or convert it to a torch.Tensor first"
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        return f"{value.layout}, {value.dtype} on {value.device}, which is no plain array"
    return None


def remedies(faults: Sequence[str], derived: bool = True) -> list[str]:
    """What helps against these faults, by what the names tell; derived: also to derive a class."""
    text = "\n".join(faults)
    found = [remedy for mark, remedy in _REMEDIES.items() if re.search(mark, text)]
    if derived:
        found.append(
            "a class derived from VisionMamba that makes its modules in the constructor saves and loads them"
        )
    return [*found, "torch.save(model.state_dict(), file) writes anything"]


def stored_type(dtype: str | torch.dtype | None) -> str | None:
    """The core's name of the type that a file is to have: "bfloat16" of that or of torch.bfloat16."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def plain_array(value: Tensor) -> Any:
    """A tensor as numpy's array, 16-bit numbers as float32."""
    value = value.detach().to("cpu")
    if value.is_floating_point() and value.itemsize < 4:
        value = value.float()  # exact
    return value.resolve_conj().resolve_neg().contiguous().numpy()
