# SPDX-License-Identifier: Apache-2.0
"""A network's weights to and from files: vimcore's own, and the authors' checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .. import _core
from .._core import Preprocess
from ..positions import fit_table, rope_tables
from ..utils.arguments import boolean, integer, sides
from ..utils.files import listed
from ..weights.checkpoints import read_checkpoint, tensor
from ..weights.metadata import CONFIG_KEY, check_labels, pack, unpack
from ..weights.task import holds, unpack_task
from ..weights.wrappers import ROPE_TABLES
from .base import NetworkBase
from .state import computed, described, parametrised, stored_type, tensors_to_save

Network = TypeVar("Network", bound=NetworkBase)
Path = str | os.PathLike[str]


def save(
    model: NetworkBase,
    path: Path,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes weights, architecture, labels and preprocessing to one safetensors file, all or nothing.

    See `VisionMamba.save` for what becomes of other modules and parametrised weights.

    Args:
        labels: one name for each class.
        preprocess: mean, std, resize, crop, interpolation; default: ImageNet evaluation at the model's image
            size. Networks with neither 1 nor 3 channels have none.
        dtype: of the weights in the file, see `VisionMamba.save`.

    Raises:
        ValueError: the file could not describe the network, or labels or preprocessing do not fit.
    """
    config = model._config  # the head of a derived class: as it was told
    if isinstance(model.head, torch.nn.Linear | torch.nn.Identity):
        config = config.replace(num_classes=model.num_classes)
    names = None if labels is None else check_labels(labels, config.num_classes)
    if preprocess is None and (steps := Preprocess.default(config)):
        preprocess = steps.to_dict()
    metadata = pack(config, names, preprocess)
    arrays = tensors_to_save(model, config.param_shapes())
    _core.write_safetensors(path, arrays, metadata, stored_type(dtype))


def load_as(
    kind: type[Network],
    path: Path,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    stride: int | None = None,
    dynamic_img_size: bool = False,
) -> Network:
    """As `load_model`, of `VisionMamba` or of a class derived from it, whose own tensors the file holds.

    Raises:
        TypeError: the constructor of `kind` takes other arguments than `VisionMamba`.
    """
    name, dynamic = os.fsdecode(path), boolean("[VisionMamba] dynamic_img_size", dynamic_img_size)
    _refuse_dense(path)
    # The header's sizes against its tensors, before anything of these sizes is made.
    metadata, _ = _core.check_file(path, not described(kind))
    stored = unpack(metadata, path).config
    config = stored.to_dict()
    if img_size is not None:
        config["img_size"] = sides("[VisionMamba] img_size", img_size)
    if stride is not None:
        config["stride"] = integer("[VisionMamba] stride", stride)
    model = kind._of_config(config)
    state = {key: tensor(value) for key, value in _core.read_safetensors(path)[0].items()}
    fill(model, state, name, old_grid=stored.grid)
    model.dynamic_img_size = dynamic
    return model.eval().to(device)


def _refuse_dense(path: Path) -> None:
    """Says which function reads the file of a network with another head than a classifier's."""
    name = os.fsdecode(path)
    if task := unpack_task(_core.safetensors_header(path)[1], name):
        raise ValueError(f"{name}: holds more than a backbone with a head: {holds(task)}")


def load_checkpoint(
    model: NetworkBase,
    path: Path,
    *,
    weights: str = "model",
    pos_embed: str = "correct",
    head: str = "strict",
    pos_grid: tuple[int, int] | None = None,
) -> None:
    """Loads the authors' weights, ``.pth`` or ``.safetensors``: every key counts, all or nothing.

    What training programs wrap around weights is taken off: keys such as state_dict and state_dict_ema,
    prefixes such as ``module.``, ``_orig_mod.`` and ``backbone.``.

    Args:
        weights: "model", or "ema" for the averaged weights of a training checkpoint.
        pos_embed: "correct" or "authors", see :func:`resize_pos_embed`; only matters when the grids differ.
        head: "skip" leaves the model's classification head as it is, and that of the file aside.
        pos_grid: (rows, columns) of the file's position table where it is not square.

    Raises:
        ValueError: names missing, unexpected and misshapen keys (12 at most), or says what the file is
            instead of weights; the model is unchanged then.
    """
    if head not in ("strict", "skip"):
        raise ValueError(f"head: expected 'strict' or 'skip', got {head!r}")
    if pos_embed not in ("correct", "authors"):
        raise ValueError(f"pos_embed: expected 'correct' or 'authors', got {pos_embed!r}")
    name = os.fsdecode(path)
    state, metadata, _ = read_checkpoint(name, weights)
    if pos_grid is None and CONFIG_KEY in metadata:
        pos_grid = unpack(metadata, name).config.grid
    skip = head == "skip"
    fill(model, state, name, old_grid=pos_grid, way=pos_embed, skip_head=skip, advises_skip=not skip)


def fill(
    model: NetworkBase,
    state: Mapping[str, torch.Tensor],
    path: str,
    *,
    old_grid: tuple[int, int] | None = None,
    way: str = "correct",
    skip_head: bool = False,
    advises_skip: bool = False,
) -> None:
    """Copies ``state`` into the model's parameters after every key and shape has been found right.

    Args:
        advises_skip: an error about the head alone says how to leave it out.
    """
    faults, write = prepared(model, state, old_grid=old_grid, way=way, skip_head=skip_head)
    if advises_skip and faults and all(": head." in fault for fault in faults):
        faults.append('all else fits: load_checkpoint(..., head="skip") keeps the head that the model has')
    if faults:
        raise ValueError(f"{path} does not fit this model:\n  " + listed(faults, "\n  "))
    write()


def prepared(
    model: NetworkBase,
    state: Mapping[str, torch.Tensor],
    *,
    old_grid: tuple[int, int] | None = None,
    way: str = "correct",
    skip_head: bool = False,
) -> tuple[list[str], Callable[[], None]]:
    """What is wrong with ``state``, and a function that copies it into the model where nothing is."""
    config = dict(model.config)

    def counts(name: str) -> bool:
        return name not in ROPE_TABLES and not (skip_head and name.startswith(own))

    own = ("head.",) if "neck.weight" in state else ("head.", "neck.", "norm_neck.")

    given = {name: value for name, value in state.items() if counts(name)}
    wanted, plain = _destinations(model, given)
    wanted = {name: value for name, value in wanted.items() if counts(name)}
    faults = []
    table = given.get("pos_embed")
    if table is not None and "pos_embed" in wanted and table.ndim == 3:
        try:
            given["pos_embed"] = fit_table(table, wanted["pos_embed"], config, old_grid, way)
        except ValueError as error:
            faults.append(f"misshapen: pos_embed: {error}")
            del given["pos_embed"]
    unfitted = {"pos_embed"} if faults else set()
    shapes = {name: tuple(value.shape) for name, value in wanted.items() if name not in unfitted}
    faults += _core.misfits(shapes, {name: tuple(value.shape) for name, value in given.items()})
    for name in [name for name in wanted if name in given and wanted[name].shape == given[name].shape]:
        dtype, other = wanted[name].dtype, given[name].dtype
        if dtype.is_floating_point and not other.is_floating_point:
            faults.append(f"not floating point: {name}: {other}")
        elif not torch.can_cast(other, dtype):
            faults.append(f"{name}: expected {dtype}, got {other}")
    for name, (module, leaf, _) in plain.items():
        if not all(hasattr(step, "right_inverse") for step in module.parametrizations[leaf]):  # type: ignore
            faults.append(f"{name}: its parametrisation takes no plain value; remove_parametrizations() does")
    faults += _rope_faults(state, config)

    def write() -> None:
        with torch.no_grad():
            for name, value in wanted.items():
                if name in plain:
                    module, leaf, _ = plain[name]
                    setattr(module, leaf, given[name].to(value))
                else:
                    value.copy_(given[name])

    return faults, write


def _destinations(
    model: NetworkBase, given: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.nn.Module, str, str]]]:
    """The model's tensors by name, rotations left out, and those among them that a parametrisation computes.

    A parametrised weight stands for what it is computed from where plain values are given.
    """
    wanted = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in ROPE_TABLES and isinstance(value, torch.Tensor)
    }
    plain = {name: place for name, place in parametrised(model).items() if name in given}
    for name, (module, leaf, origin) in plain.items():
        wanted = {k: v for k, v in wanted.items() if not k.startswith(origin)}
        wanted[name] = computed(module, leaf)
    return wanted, plain


def fitted(model: NetworkBase, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose position table fits the model's grid, with the model's own rotation tables.

    Raises:
        ValueError: the table is of no square grid, or the file has rotations other than the model's.
    """
    config = dict(model.config)
    if faults := _rope_faults(state, config):
        raise ValueError("; ".join(faults))
    own = model.state_dict()
    out = {k: v for k, v in state.items() if k not in ROPE_TABLES}
    out.update({k: own[k] for k in ROPE_TABLES if k in own})
    if "pos_embed" in out and "pos_embed" in own and out["pos_embed"].ndim == 3:
        out["pos_embed"] = fit_table(out["pos_embed"], own["pos_embed"], config, None, "correct")
    return out


def _rope_faults(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> list[str]:
    """RoPE tables in a file are optional, but another rotation than the model's would be silently wrong."""
    given = [name for name in ROPE_TABLES if name in state]
    if not given:
        return []
    if not config.get("rope"):
        return [f"unexpected: {name} {tuple(state[name].shape)} (the model has rope=False)" for name in given]
    cos, sin = rope_tables(config)
    faults = []
    for name, table in zip(ROPE_TABLES, (cos, sin)):
        value = state.get(name)
        if value is not None and value.shape == table.shape and (value.double() - table).abs().max() > 1e-3:
            faults.append(f"different: {name}: not the rotation of rope_grid={config.get('rope_grid')}")
    return faults
