# SPDX-License-Identifier: Apache-2.0
"""Weights of ``VisionMamba``: vimcore files, the authors' checkpoints, and position tables between grids."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F

from . import _core
from .arguments import integer, sides
from .checkpoints import read_checkpoint, tensor
from .files import listed
from .metadata import CONFIG_KEY, check_labels, default_preprocess, image_size, pack, patch_grid, unpack
from .state import computed, described, parametrised, tensors_to_save
from .wrappers import ROPE_TABLES

if TYPE_CHECKING:
    from .nn import VisionMamba

Network = TypeVar("Network", bound="VisionMamba")
Path = str | os.PathLike[str]


# ---- position tables ---------------------------------------------------------------------------------------


def class_rows(class_token: str, patches: int) -> list[int]:
    """Rows of a position table that belong to class tokens, for ``patches`` patches."""
    rows = {"none": [], "head": [0], "random": [0], "middle": [patches // 2], "double": [0, patches + 1]}
    if class_token not in rows:
        raise ValueError(f"class_token: expected one of {', '.join(rows)}, got {class_token!r}")
    return rows[class_token]


def resize_pos_embed(
    table: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_token: str = "middle",
    way: str = "correct",
) -> torch.Tensor:
    """Position table for another grid of patches: bicubic, align_corners=False, no antialiasing.

    Args:
        table: (1, rows * columns + class tokens, D).
        old_grid, new_grid: (rows, columns) of patches.
        class_token: where the class tokens stand, as in the constructor.
        way: "correct" takes the rows of the class tokens out, resizes the others and puts them back in their
            new places. "authors" reproduces the published fine-tuning: the first rows are kept as if the
            class tokens stood there, the rest is resized. Both agree for "none" and "head".
    """
    if way not in ("correct", "authors"):
        raise ValueError(f"pos_embed: expected 'correct' or 'authors', got {way!r}")
    old_patches, new_patches = old_grid[0] * old_grid[1], new_grid[0] * new_grid[1]
    old_rows, new_rows = class_rows(class_token, old_patches), class_rows(class_token, new_patches)
    expected = old_patches + len(old_rows)
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] != expected:
        raise ValueError(
            f"[resize_pos_embed] table: expected (1, {expected}, D) "
            f"for a {old_grid[0]} x {old_grid[1]} grid and class_token {class_token!r}, "
            f"got {tuple(table.shape)}"
        )
    if way == "authors":
        old_rows = new_rows = list(range(len(old_rows)))
    if tuple(old_grid) == tuple(new_grid):
        return table.clone()
    keep = torch.ones(expected, dtype=torch.bool)
    keep[old_rows] = False
    wide = table if table.dtype == torch.float64 else table.float()
    grid = wide[:, keep].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", align_corners=False, antialias=False)
    keep = torch.ones(new_patches + len(new_rows), dtype=torch.bool)
    keep[new_rows] = False
    resized = wide.new_empty(1, len(keep), table.shape[2])
    resized[:, keep] = grid.flatten(2).transpose(1, 2)
    resized[:, new_rows] = wide[:, old_rows]
    return resized.to(table.dtype)


# ---- vimcore files -----------------------------------------------------------------------------------------


def save_model(
    model: VisionMamba,
    path: Path,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights, architecture, labels and preprocessing to one safetensors file, all or nothing.

    See `VisionMamba.save` for what becomes of other modules and parametrised weights.

    Args:
        labels: one name for each class.
        preprocess: mean, std, resize, crop, interpolation; default: ImageNet evaluation at the model's image
            size. Networks with neither 1 nor 3 channels have none.

    Raises:
        ValueError: the file could not describe the network, or labels or preprocessing do not fit.
    """
    model = _unwrapped(model)
    config = dict(model.config)
    if not isinstance(model.head, torch.nn.Linear | torch.nn.Identity):  # of a derived class: as it was told
        config["num_classes"] = model._config["num_classes"]
    config_json = _core.config_normalize(json.dumps(config))
    names = None if labels is None else check_labels(labels, int(config["num_classes"]))
    if preprocess is None:
        preprocess = default_preprocess(config)
    metadata = pack(config_json, names, preprocess)
    _core.write_safetensors(path, tensors_to_save(model, _core.param_shapes(config_json)), metadata)


def _unwrapped(model: Any) -> VisionMamba:
    """The network itself, of what torch.compile, DistributedDataParallel or AveragedModel made of it."""
    from .nn import VisionMamba

    inner = model
    while not isinstance(inner, VisionMamba):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise TypeError(f"[VisionMamba] save: expected a VisionMamba, got {type(model).__name__}")
    return inner


def load_model(
    path: Path,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    stride: int | None = None,
) -> VisionMamba:
    """The network of a vimcore file, in eval mode.

    Args:
        img_size, stride: other image size and stride of the patches than stored, pixels; the position table
            is resized, class tokens left alone.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no vimcore file, its tensors do not fit its configuration, or an option does not.
    """
    from .nn import VisionMamba

    return load_as(VisionMamba, path, img_size, device, stride)


def load_as(
    kind: type[Network],
    path: Path,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    stride: int | None = None,
) -> Network:
    """As `load_model`, of `VisionMamba` or of a class derived from it, whose own tensors the file holds.

    Raises:
        TypeError: the constructor of `kind` takes other arguments than `VisionMamba`.
    """
    name = os.fsdecode(path)
    # The header's sizes against its tensors, before anything of these sizes is made.
    metadata, _ = _core.check_file(path, not described(kind))
    config, _, _ = unpack(metadata, path)
    stored = dict(config)
    if img_size is not None:
        config["img_size"] = sides("[VisionMamba] img_size", img_size)
    if stride is not None:
        config["stride"] = integer("[VisionMamba] stride", stride)
    model = kind._of_config(config)
    state = {key: tensor(value) for key, value in _core.read_safetensors(path)[0].items()}
    _fill(model, state, name, old_grid=patch_grid(stored))
    return model.eval().to(device)


def load_checkpoint(
    model: VisionMamba,
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
        pos_grid = patch_grid(unpack(metadata, name)[0])
    _fill(model, state, name, old_grid=pos_grid, way=pos_embed, skip_head=head == "skip")


def _fill(
    model: VisionMamba,
    state: Mapping[str, torch.Tensor],
    path: str,
    *,
    old_grid: tuple[int, int] | None = None,
    way: str = "correct",
    skip_head: bool = False,
) -> None:
    """Copies ``state`` into the model's parameters after every key and shape has been found right."""
    config = dict(model.config)

    def counts(name: str) -> bool:
        return name not in ROPE_TABLES and not (skip_head and name.startswith("head."))

    given = {name: value for name, value in state.items() if counts(name)}
    wanted, plain = _destinations(model, given)
    wanted = {name: value for name, value in wanted.items() if counts(name)}
    faults = [f"missing: {name} {tuple(p.shape)}" for name, p in wanted.items() if name not in given]
    faults += [f"unexpected: {name} {tuple(v.shape)}" for name, v in given.items() if name not in wanted]
    table = given.get("pos_embed")
    if table is not None and "pos_embed" in wanted and table.ndim == 3:
        try:
            given["pos_embed"] = _fit_table(table, wanted["pos_embed"], config, old_grid, way)
        except ValueError as error:
            faults.append(f"misshapen: pos_embed: {error}")
            del given["pos_embed"]
    for name, value in given.items():
        if name in wanted and value.shape != wanted[name].shape:
            faults.append(
                f"misshapen: {name}: expected {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
            )
        elif name in wanted and wanted[name].is_floating_point() and not value.is_floating_point():
            faults.append(f"not floating point: {name}: {value.dtype}")
        elif name in wanted and not torch.can_cast(value.dtype, wanted[name].dtype):
            faults.append(f"{name}: expected {wanted[name].dtype}, got {value.dtype}")
    for name, (module, leaf, _) in plain.items():
        if not all(hasattr(step, "right_inverse") for step in module.parametrizations[leaf]):  # type: ignore
            faults.append(f"{name}: its parametrisation takes no plain value; remove_parametrizations() does")
    faults += _rope_faults(state, config)
    if faults:
        raise ValueError(f"{path} does not fit this model:\n  " + listed(faults, "\n  "))
    with torch.no_grad():
        for name, value in wanted.items():
            if name in plain:
                module, leaf, _ = plain[name]
                setattr(module, leaf, given[name].to(value))
            else:
                value.copy_(given[name])


def _destinations(
    model: VisionMamba, given: Mapping[str, Any]
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


def fitted(model: VisionMamba, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
        out["pos_embed"] = _fit_table(out["pos_embed"], own["pos_embed"], config, None, "correct")
    return out


def _fit_table(
    table: torch.Tensor,
    wanted: torch.Tensor,
    config: Mapping[str, Any],
    old_grid: tuple[int, int] | None,
    way: str,
) -> torch.Tensor:
    new_grid = patch_grid(config)
    if old_grid is None:
        if table.shape == wanted.shape:
            return table
        patches = table.shape[1] - len(class_rows(config["class_token"], 0))
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            raise ValueError(f"{patches} patches are no square grid; name it with pos_grid=(rows, columns)")
        old_grid = (side, side)
    return resize_pos_embed(table, old_grid, new_grid, config["class_token"], way)


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


def rope_tables(config: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' RoPE tables for a configuration: cos and sin, each (rows * columns, D) float64."""
    dim = int(config["embed_dim"]) // 2
    need = 8 * 2 * dim * math.prod(patch_grid(config)) * 4  # cos and sin, and what they are made of
    if need > _core.machine_bytes():
        size = "{} x {}".format(*image_size(config))
        raise ValueError(f"[config] img_size: the rotation tables of {size} pixels need {need / 1e9:.0f} GB")
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64)[: dim // 2] / dim)
    rows, columns = patch_grid(config)
    grid = int(config["rope_grid"])

    def angles(count: int) -> torch.Tensor:
        positions = torch.arange(count, dtype=torch.float64) / count * grid
        return (positions[:, None] * frequencies).repeat_interleave(2, dim=1)

    both = torch.cat(
        [
            angles(rows)[:, None].expand(rows, columns, dim),
            angles(columns)[None].expand(rows, columns, dim),
        ],
        dim=2,
    ).reshape(rows * columns, 2 * dim)
    return both.cos(), both.sin()


__all__ = ["image_size", "load_checkpoint", "load_model", "resize_pos_embed", "save_model"]
