# SPDX-License-Identifier: Apache-2.0
"""Files of weights that others wrote: format, and what is wrapped around the weights. Needs no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from .. import _core
from ..utils.files import listed
from .metadata import CONFIG_KEY

# Keys of a checkpoint under which programs put the weights, and the averaged ones.
KEYS = {
    "model": ("model", "state_dict", "model_state_dict", "module", "net"),
    "ema": ("model_ema", "state_dict_ema", "ema_state_dict"),
}
# Prefixes: DistributedDataParallel and AveragedModel, Lightning and others, mmengine.
PREFIXES = ("module", "model", "net", "backbone")
# Parts of a name that stand for a wrapped module: torch.compile, FSDP, activation checkpointing.
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTER = "n_averaged"  # of torch's AveragedModel
ANCHOR = "patch_embed.proj.weight"  # every Vision Mamba has it
ROPE_TABLES = ("rope.freqs_cos", "rope.freqs_sin")  # which follow from the configuration


def format_of(path: str) -> str:
    """ "safetensors" or "pickle", whatever the file is called.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is a pipe or device, or says what else it is.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(
            f"{path}: not a regular file but a folder; name the file of weights in it, as "
            "RUN/best.safetensors"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return "pickle"
    length = int.from_bytes(head[:8], "little")
    if path.endswith(".safetensors") or (head[8:9] == b"{" and length <= status.st_size - 8):
        return "safetensors"  # reading it says what is wrong with it
    if kind := _core.foreign_kind(head, status.st_size):
        raise ValueError(f"{path}: {kind}")
    return "pickle"


def read_safetensors(path: str, keep: str = "") -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Arrays by name without wrappers, metadata, what was unwrapped; the names of a vimcore file stay."""
    arrays, metadata = _core.read_safetensors(path)
    if CONFIG_KEY in metadata:
        return arrays, metadata, []
    names, notes = plain_names(arrays, path, keep)
    return {names[name]: array for name, array in arrays.items() if name in names}, metadata, notes


def chosen(content: Mapping[Any, Any], weights: str, path: str) -> tuple[Mapping[Any, Any], list[str]]:
    """The weights in a checkpoint, and what a reader should know about where they stood.

    Args:
        weights: "model" or "ema".

    Raises:
        ValueError: there are several sets of weights, or no averaged ones.
    """
    notes: list[str] = []
    for level in range(3):
        found = [key for key in KEYS[weights] if isinstance(content.get(key), Mapping)]
        if len(found) > 1:
            raise ValueError(
                f"{path}: weights under several keys: {', '.join(found)}; save one of them alone"
            )
        if not found and level == 0 and weights == "ema":
            keys = listed(sorted(map(str, content)))
            raise ValueError(f"{path}: no averaged weights ({', '.join(KEYS['ema'])}) among its keys: {keys}")
        if not found:
            break
        if found[0] != KEYS[weights][0]:  # the authors' own layout needs no word
            notes.append(f"weights taken from the key {found[0]!r}")
        content, weights = content[found[0]], "model"
    return content, notes


def plain_names(names: Iterable[str], path: str, keep: str = "") -> tuple[dict[str, str], list[str]]:
    """Names without wrappers by name, and what was taken off; the counter of an average is left out.

    A prefix is taken off where it stands before a whole network. Names besides it stay, so that nothing is
    passed over: whoever reads the tensors finds them unexpected.

    Args:
        keep: the end of a prefix that is no wrapper: of networks with heads the backbone's name.

    Raises:
        ValueError: there are several networks, or two names become one.
    """
    short = {name: ".".join(p for p in name.split(".") if p not in PARTS) for name in names}
    notes = [f"{part} taken out of the names" for part in PARTS if any(part in n.split(".") for n in short)]
    found = sorted({n[: -len(ANCHOR)] for n in short.values() if n == ANCHOR or n.endswith("." + ANCHOR)})
    if len(found) > 1:
        several = listed([repr(p) for p in found])
        raise ValueError(f"{path}: several networks, under {several}; save one of them alone")
    prefix = found[0] if found else _common(short.values())
    prefix = prefix.removesuffix(keep)
    wrapped = all(n.startswith(prefix) or n == COUNTER for n in short.values())
    if prefix and (wrapped or all(part in PREFIXES for part in prefix[:-1].split("."))):
        notes.append(f"prefix {prefix!r} taken off the names")
        if COUNTER in short.values():
            short = {name: n for name, n in short.items() if n != COUNTER}
            notes.append(f"{COUNTER} left out, the number of averages")
        short = {name: n.removeprefix(prefix) for name, n in short.items()}
    if len(set(short.values())) < len(short):
        seen: set[str] = set()
        twice = [n for n in short.values() if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
        raise ValueError(f"{path}: without its wrappers, {twice[0]} is there twice")
    return short, notes


def _common(names: Iterable[str]) -> str:
    """The known prefixes that all names begin with, for weights of no network of ours."""
    prefix, rest = "", [n for n in names if n != COUNTER]
    while rest and rest[0].split(".")[0] in PREFIXES:
        part = rest[0].split(".")[0] + "."
        if not all(n.startswith(part) for n in rest):
            break
        prefix, rest = prefix + part, [n.removeprefix(part) for n in rest]
    return prefix
