# SPDX-License-Identifier: Apache-2.0
"""The library that multiplies matrices on a GPU, in processes without torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# Where NVIDIA's wheels have it, below a folder of sys.path.
WHEELS = ("nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cublas/lib/libcublasLt.so.12")


def load_cublaslt() -> None:
    """Loads the cuBLASLt of NVIDIA's wheels, which a torch that is imported later will want.

    The core takes the one that is loaded; by itself it looks beside the package only, then takes the
    system's, and torch would get that one in place of its own. Nothing happens where one is loaded already,
    where VIMCORE_CUBLASLT says which one, or where there are no wheels.
    """
    if os.environ.get("VIMCORE_CUBLASLT") or any(map(_is_loaded, WHEELS)):
        return
    for wheel in WHEELS:
        for folder in sys.path:
            path = os.path.join(folder or ".", wheel)
            if os.path.exists(path):
                with contextlib.suppress(OSError):  # the core says what it tried
                    ctypes.CDLL(path)
                return


def _is_loaded(wheel: str) -> bool:
    try:
        ctypes.CDLL(os.path.basename(wheel), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True
