# SPDX-License-Identifier: Apache-2.0
"""Which cuBLASLt a process without torch loads, with empty libraries in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vimcore
import vimcore.runtime

LOADS = """
import ctypes, sys
from vimcore.utils.cublaslt import load_cublaslt
if len(sys.argv) > 3:
    ctypes.CDLL(sys.argv[3])
sys.path[:] = sys.argv[1:3]
load_cublaslt()
load_cublaslt()
maps = open("/proc/self/maps").read().split()
print(*sorted({word for word in maps if "libcublasLt" in word}), sep="\\n")
"""


def library(folder: Path, version: int) -> Path:
    """An empty one of this version."""
    folder.mkdir(parents=True)
    path = folder / f"libcublasLt.so.{version}"
    command = ["c++", "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{path.name}", "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def loaded(*arguments: Path, **environment: str) -> list[str]:
    command = [sys.executable, "-c", LOADS, *map(str, arguments)]
    kept = {key: value for key, value in os.environ.items() if key != "VIMCORE_CUBLASLT"}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_wheels_library_is_loaded_unless_there_is_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    older = library(second / "nvidia/cublas/lib", 12)
    assert loaded(first, second) == [str(older)]
    newer = library(second / "nvidia/cu13/lib", 13)
    assert loaded(first, second) == [str(newer)]
    beside = library(first / "nvidia/cu13/lib", 13)
    assert loaded(first, second) == [str(beside)]
    other = library(tmp_path / "system", 13)
    assert loaded(first, second, other) == [str(other)]
    assert loaded(first, second, VIMCORE_CUBLASLT="none") == []
    (first / "nvidia/cu13/lib/libcublasLt.so.13").write_text("no library")
    assert loaded(first, second) == []


def test_a_runtime_asks_for_it_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(vimcore.runtime, "load_cublaslt", lambda: asked.append("now"))
    for device in ("cpu", "cuda"):
        assert not asked
        with pytest.raises(vimcore.Error):
            vimcore.Runtime("missing.safetensors", device=device)
    assert asked == ["now"]
