# SPDX-License-Identifier: Apache-2.0
"""The weights in files that others wrote, `.pth` and `.safetensors`; a stranger's pickle runs no code."""

from __future__ import annotations

import argparse
import errno
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.files import listed
from .wrappers import chosen, format_of, plain_names, read_safetensors


class Checkpoint(NamedTuple):
    """Tensors by name on the CPU, metadata (of safetensors files), and what was unwrapped to get there."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    notes: list[str]


def read_checkpoint(path: str, weights: str = "model", keep: str = "") -> Checkpoint:
    """The weights of a file that `torch.save` or safetensors wrote, without what programs wrap around them.

    Pickles pass through torch's weights-only unpickler: nothing in them is executed.

    Args:
        weights: "model", or "ema" for the averaged weights of a training checkpoint.
        keep: see `plain_names`.

    Raises:
        OSError: the file cannot be opened.
        ValueError, vimcore.Error: it is damaged, something else, or holds something else than tensors.
    """
    return read_with_meta(path, weights, keep)[0]


def read_with_meta(path: str, weights: str = "model", keep: str = "") -> tuple[Checkpoint, dict[Any, Any]]:
    """As `read_checkpoint`, and what mmengine's and mmcv's checkpoints say about themselves under "meta"."""
    if weights not in ("model", "ema"):
        raise ValueError(f"weights: expected 'model' or 'ema', got {weights!r}")
    if format_of(path) == "safetensors":
        if weights == "ema":
            raise ValueError(
                f"{path}: weights='ema' asks for a training checkpoint (.pth); a safetensors file has one set"
            )
        arrays, metadata, notes = read_safetensors(path, keep)
        return Checkpoint({name: tensor(array) for name, array in arrays.items()}, metadata, notes), {}
    content = _unpickled(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of weights, got {type(content).__name__}")
    state, unwrapped = chosen(content, weights, path)
    state = {key: _of_numpy(value) for key, value in state.items()}
    strange = [str(key) for key, value in state.items() if not _is_plain(value)]
    if strange:
        raise ValueError(
            f"{path}: expected tensors under every key, but these hold something else: {listed(strange)}"
        )
    names, notes = plain_names([str(key) for key in state], path, keep)
    tensors = {names[str(key)]: value for key, value in state.items() if str(key) in names}
    meta = content.get("meta")
    return Checkpoint(tensors, {}, unwrapped + notes), meta if isinstance(meta, dict) else {}


def tensor(array: Any) -> torch.Tensor:
    """A tensor on the memory of a numpy array; a tensor as it is."""
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)


def _of_numpy(value: Any) -> Any:
    """A tensor where detectron2 has an array of numbers; all else as it is."""
    if type(value) is np.ndarray and value.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def _is_plain(value: Any) -> bool:
    """A tensor whose elements lie in its memory; a few bytes can claim any shape with strides of 0."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return False
    if value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.itemsize <= value.untyped_storage().nbytes()


# ---- pickles -----------------------------------------------------------------------------------------------

# Packages whose objects lie beside the weights in checkpoints of training programs: losses, settings, paths.
_BESIDE = ("numpy", "mmengine", "omegaconf", "pathlib", "collections", "lightning", "pytorch_lightning")


def _empty(*_: Any) -> Any:
    """Takes the place of numpy's `_reconstruct`, whose arguments could ask for any amount of memory."""
    return np.empty(0, np.uint8)


# What arrays of numbers are pickled as. What an array may hold is in the pickle: no objects of other kinds.
_ARRAYS: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy._core.multiarray._reconstruct": _empty,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}
_TYPES = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]


class _Nothing:
    """Stands for an object beside the weights: takes whatever a pickle gives it, keeps and does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = _ignore


def _called(name: str) -> type:
    """A `_Nothing` under the full name of what it stands for."""
    module, _, leaf = name.rpartition(".")
    return type(leaf, (_Nothing,), {"__module__": module, "__qualname__": leaf})


def _unpickled(path: str) -> Any:
    """What a file of `torch.save` holds; objects of other packages than torch are not made."""
    with open(path, "rb") as file:  # torch would judge a path by its ending
        try:
            beside = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # not a zip archive, or damaged: loading it says so
            beside = []
        others = [name for name in beside if name not in _ARRAYS]
        stands_for = [_called(name) for name in others if name.partition(".")[0] in _BESIDE]
        file.seek(0)
        try:
            allowed: list[Any] = [argparse.Namespace, *stands_for]  # the authors store their command line
            allowed += [(kind, name) for name, kind in _ARRAYS.items()] + _TYPES
            with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
                warnings.simplefilter("ignore")  # an error says it all
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a seek to nowhere
                raise
            raise ValueError(f"{path}: {_reason(str(error))}") from None


def _reason(text: str) -> str:
    """One line for torch's pages of advice, which people who load a stranger's file should not follow."""
    found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(
        r"(?:class|type|function) ['\"]?([\w.]+\.\w+)", text
    )
    if "TorchScript" in text:
        return (
            "a TorchScript archive, no dictionary of weights; save the module's state_dict() with torch.save"
        )
    if found:
        return (
            f"holds an unsupported object, {found[1][:100]}, which was not made, nor was anything executed; "
            "save the state_dict() alone with torch.save"
        )
    return "damaged, or not a file of torch.save; copy or download it again"
