# SPDX-License-Identifier: Apache-2.0
"""The Python package on CUDA without a GPU: `vimcore_shim`, whose devices are the runtime of tests/shim.

The package is made by CMake (tests/python/CMakeLists.txt). There are no CUDA tensors in a torch without CUDA:
CPU tensors pass for tensors on the first device (`pretend`), their memory is handed over under its name.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

BUILD = Path(__file__).resolve().parents[2] / "build" / "dev" / "python"
os.environ.setdefault("VIMCORE_SHIM_FOREIGN", "1")  # torch's memory is device memory, too
sys.path.insert(0, os.environ.get("VIMCORE_SHIM_PACKAGE", str(BUILD)))
import vimcore_shim  # noqa: E402
import vimcore_shim.nn.vision_mamba  # noqa: E402
from vimcore_shim import ops  # noqa: E402, F401
from vimcore_shim.autograd import tensors  # noqa: E402

# What calls find out about tensors, wherever it was imported.
ORIGINALS = {"on_cuda": tensors.on_cuda, "place": tensors.place}
ORIGINALS |= {"to_dlpack": to_dlpack, "from_dlpack": from_dlpack}

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Gradients: every activation and its gradient are rounded.
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 0.12, torch.float16: 2e-2}


def on_device(capsule: Any, device: int = 0, kind: int = 2) -> Any:
    """The DLPack capsule of host memory, for a CUDA device: there, the shim's memory is the host's.

    Args:
        kind: DLPack's number of the device type, 1 for the CPU.
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    where = ctypes.cast(get(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32))  # behind the address
    where[0], where[1] = kind, device
    return capsule


def on_host(capsule: Any) -> Tensor:
    """The way back."""
    return from_dlpack(on_device(capsule, kind=1))


def array(tensor: Tensor, device: int = 0) -> Any:
    return on_device(to_dlpack(tensor.detach()), device)


def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tensors pass for tensors on cuda:0; what the next calls find as stream and capturing."""
    state = {"stream": 0, "capturing": False}
    changes: dict[str, Callable[..., Any]] = {
        "on_cuda": lambda t: True,
        "place": lambda t: vimcore_shim._core.Place(0, state["stream"], state["capturing"]),
        "to_dlpack": lambda t: on_device(to_dlpack(t)),
        "from_dlpack": on_host,  # what the extension saved
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("vimcore_shim.")]
    for name, change in changes.items():
        for module in modules:
            if vars(module).get(name) is ORIGINALS[name]:
                monkeypatch.setattr(module, name, change)
    return state


def runtime() -> Any:
    """The fake runtime's functions for graphs (tests/shim/python/graphs.cpp)."""
    library = ctypes.CDLL(vimcore_shim._core.__file__)
    for name in ("begin", "end"):
        getattr(library, f"vimcore_shim_{name}").restype = ctypes.c_void_p
    for name in ("end", "replay"):
        getattr(library, f"vimcore_shim_{name}").argtypes = [ctypes.c_void_p]
    library.vimcore_shim_used_bytes.restype = ctypes.c_longlong
    library.vimcore_shim_set_memory.argtypes = [ctypes.c_longlong]
    return library


class Graph:
    """What is called within is recorded, and computes in every replay: torch's own work is not."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.runtime = state, runtime()

    def __enter__(self) -> Graph:
        self.stream = self.runtime.vimcore_shim_begin()
        self.state.update(stream=self.stream, capturing=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.state.update(stream=0, capturing=False)
        self.recorded = self.runtime.vimcore_shim_end(self.stream)

    def replay(self) -> None:
        self.runtime.vimcore_shim_replay(self.recorded)


def twin(model: vimcore.VisionMamba) -> Any:
    """The same network in the shim's package."""
    other = vimcore_shim.VisionMamba(**model.config)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def autocast(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    """As under torch.autocast("cuda", dtype), which a torch without CUDA refuses; None: as outside of it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda" and dtype is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: {"cuda": dtype}[device])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(found: Any, wanted: Any, tolerance: float) -> None:
    """Gradients of two networks; those that are nearly nothing are measured against the largest."""
    assert found.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, g in wanted.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - g).norm()) < tolerance * max(float(g.norm()), 1e-3 * largest), name
