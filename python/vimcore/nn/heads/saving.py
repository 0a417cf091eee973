# SPDX-License-Identifier: Apache-2.0
"""The tensors of a backbone with heads to and from files: plain values under the names of the state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ... import _core
from ...utils.files import listed
from ...weights.checkpoints import tensor
from ...weights.task import Path
from ...weights.wrappers import ROPE_TABLES
from ..state import computed, described, parametrised, plain_array, remedies, replaced, unwritable
from ..structure import Made, made
from ..vision_mamba import VisionMamba

TABLES = tuple(f"backbone.{name}" for name in ROPE_TABLES)  # which follow from the configuration


def tensors_to_save(
    model: nn.Module,
    backbone: VisionMamba,
    built: Made,
    wanted: Mapping[str, tuple[int, ...]],
    name: str,
    renamed: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Arrays by name, in the order of `wanted`.

    Args:
        model: the whole network; `backbone` is its attribute of that name.
        built: what its modules were when it was made (`structure.made`).
        wanted: names and shapes that the file says it has.
        name: of the class, for messages.
        renamed: from names of parameters to those of the state dict.

    Raises:
        ValueError: names tensors that are missing or cannot be written, and what to do.
    """
    state = {key: value for key, value in model.state_dict().items() if key not in TABLES}
    faults = _changed(model, backbone, built)
    for key, (module, leaf, origin) in parametrised(model).items():
        key, origin = renamed(key), renamed(origin)
        if key in wanted:
            state = {k: v for k, v in state.items() if not k.startswith(origin)}
            state[key] = computed(module, leaf)
    faults += [f"not described: {key}" for key in sorted(set(state) - set(wanted))]
    shapes = {key: tuple(state[key].shape) for key in wanted if isinstance(state.get(key), Tensor)}
    faults += _core.misfits(wanted, shapes)
    faults += [f"{key}: {why}" for key, value in state.items() if (why := unwritable(value))]
    if faults:
        lines = [listed(faults, "\n  "), *(f"to save it: {remedy}" for remedy in remedies(faults, False))]
        raise ValueError(f"[{name}] save: the file cannot describe this network:\n  " + "\n  ".join(lines))
    return {key: plain_array(state[key]) for key in wanted}


def _changed(model: nn.Module, backbone: VisionMamba, built: Made) -> list[str]:
    """Modules that are not what the constructor put there: the file would not tell what they do."""
    if not described(type(backbone)):
        return [f"backbone: a {type(backbone).__name__}"]
    found = [f"backbone.{fault}" for fault in replaced(backbone)]
    now = {path: kind for path, kind in made(model).items() if "parametrizations" not in path.split(".")}
    for path, (kind, settings) in now.items():
        if path.startswith("backbone.") or path not in built:  # others: their tensors are not described
            continue
        same = kind is built[path][0] or (kind is nn.SyncBatchNorm and built[path][0] is nn.BatchNorm2d)
        if not same:
            found.append(f"{path}: a {kind.__name__}")
        elif settings != built[path][1]:
            found.append(f"{path}: other settings than it was built with")
    return found


def fill_from_file(model: nn.Module, path: Path) -> None:
    """Gives a model the tensors of a file, all of whose names and shapes were found right before.

    Raises:
        vimcore.Error: the file cannot be read.
        RuntimeError: it is another one by now.
    """
    state = {name: tensor(array) for name, array in _core.read_safetensors(path)[0].items()}
    own = {name: table for name, table in model.state_dict().items() if name in TABLES}
    model.load_state_dict({**own, **state})
