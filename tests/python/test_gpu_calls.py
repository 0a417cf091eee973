# SPDX-License-Identifier: Apache-2.0
"""Acceptance in two calls (tests/gpu/call.py), with the CPU in place of the device: every step runs, what a
killed call had found is there, a step that hangs costs no more than its time.

The programs are those of the shim, which CMake builds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from test_gpu_bench import RATES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("VIMCORE_SHIM_PROGRAMS", ROOT / "build/dev/tests/cuda"))
SANITIZER = """#!/bin/sh
# Runs the program at the end of the command line.
case "$*" in *racecheck*) echo '========= Race reported between Write access and Read access' ;; esac
for last; do :; done
case $last in */probe) exec "$last" ;; esac
echo '========= ERROR SUMMARY: 0 errors'
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """carried/carried.tar.xz as prepare.sh makes it, of some programs of the shim; a sanitizer in tools/."""
    pack = tmp_path / "pack"
    (pack / "bin").mkdir(parents=True)
    for name in ("gemm_check", "test_casts_cuda"):
        shutil.copy(PROGRAMS / name, pack / "bin" / name)
    script(pack / "bin/rates", f"#!/bin/sh\necho '{json.dumps(RATES)}'\n")
    script(pack / "bin/probe", "#!/bin/sh\nexit 0\n")
    script(pack / "bin/test_broken_cuda", "#!/bin/sh\necho 'CHECK failed: 1 == 2'\nexit 1\n")
    script(pack / "bin/test_ops_cuda", "#!/bin/sh\nexit 0\n")
    script(tmp_path / "tools/compute-sanitizer", SANITIZER)
    (tmp_path / "carried").mkdir()
    with tarfile.open(tmp_path / "carried/carried.tar.xz", "w:xz", preset=0) as archive:
        archive.add(pack, ".")
    return tmp_path


def start(folder: Path, which: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests/gpu/call.py"), which, "--rehearse", *options]
    for name in ("carried", "out", "work"):
        command += [f"--{name}", str(folder / name)]
    environment = {**os.environ, "PATH": f"{folder / 'tools'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def steps(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/steps.json").read_text())


def test_every_step_of_both_calls_runs(folder: Path) -> None:
    process = start(folder, "first")
    printed = process.communicate()[0]
    found = steps(folder)
    passed = [name for name, facts in found.items() if facts.get("status") == 0]
    assert process.returncode == 1, printed
    assert found.pop("test_broken_cuda")["status"] == 1
    assert found.pop("failed tests") == {"names": []}
    assert set(passed) == set(found), printed
    expected = {"the carried package loads", "Vim-Ti against float64, kernels", "gemm_check", "rates"}
    expected |= {"gemm_check an algorithm per batch", "benchmark, the main rows", "test_casts_cuda", "pytest"}
    assert expected <= set(found)
    out = folder / "out"
    assert "CHECK failed: 1 == 2" in (out / "failed.txt").read_text()
    assert json.loads((out / "smoke.json").read_text())["float32"]["repeats"]
    assert json.loads((out / "bench.json").read_text())["rows"]
    assert (out / "gemm.txt").read_text().count("Ti x_proj") == 6
    assert "done: 1 failed ['test_broken_cuda']" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 8

    shutil.copy(out / "steps.json", folder / "before.json")
    shutil.rmtree(out)
    process = start(folder, "second", "--after", str(folder / "before.json"))
    print(process.communicate()[0], (out / "failed.txt").read_text())
    found = steps(folder)
    assert {name for name, facts in found.items() if facts["status"] != 0} == {
        "test_broken_cuda",
        "racecheck ops",
    }
    assert found["racecheck ops"]["findings"] == 1
    assert found["memcheck ops"] == {"status": 0, "seconds": found["memcheck ops"]["seconds"], "findings": 0}
    assert {"memory, alone", "benchmark", "stability", "compute-sanitizer works"} <= set(found)
    assert len(list(out.iterdir())) <= 8


def test_a_killed_call_loses_the_step_it_was_in_and_a_step_that_hangs_its_time(folder: Path) -> None:
    with tarfile.open(folder / "carried/carried.tar.xz", "w:xz", preset=0) as archive:
        script(folder / "pack/bin/gemm_check", "#!/bin/sh\necho first line\nexec sleep 30\n")
        archive.add(folder / "pack", ".")
    process = start(folder, "first")
    limit = time.monotonic() + 120
    path = folder / "out/steps.json"
    while not (path.exists() and "gemm_check" in path.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    found = steps(folder)
    assert found["Vim-Ti against float64, kernels"]["status"] == 0
    assert found["gemm_check"] == {"status": "running"}
    assert (folder / "out/smoke.json").exists()

    # what remains of the time goes to the other steps
    shutil.rmtree(folder / "out")
    process = start(folder, "first", "--seconds", "25")
    printed = process.communicate(timeout=60)[0]
    found = steps(folder)
    assert found["gemm_check"]["status"] == "cut", printed
    assert "skipped" in {facts.get("status") for facts in found.values()}
    assert "first line" in (folder / "out/failed.txt").read_text()
