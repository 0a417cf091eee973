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
    for name in ("gemm_check", "scan_check", "test_casts_cuda"):
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
    environment["VIMCORE_SHIM_RACE"] = "0"  # CTest has the same programs with it
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
    expected |= {"scan_check"}
    expected |= {"gemm_check an algorithm per batch", "benchmark, the main rows", "test_casts_cuda", "pytest"}
    assert expected <= set(found)
    out = folder / "out"
    assert "CHECK failed: 1 == 2" in (out / "failed.txt").read_text()
    assert json.loads((out / "smoke.json").read_text())["float32"]["repeats"]
    assert json.loads((out / "bench.json").read_text())["rows"]
    assert (out / "gemm.txt").read_text().count("Ti x_proj") == 6
    assert "done: 1 failed ['test_broken_cuda']" in (out / "log.txt").read_text()
    assert "whole" in (out / "scan.txt").read_text()
    assert len(list(out.iterdir())) <= 9

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


def test_a_killed_call_loses_the_step_it_was_in(folder: Path) -> None:
    with tarfile.open(folder / "carried/carried.tar.xz", "w:xz", preset=0) as archive:
        script(folder / "pack/bin/gemm_check", "#!/bin/sh\necho first line\nexec sleep 300\n")
        archive.add(folder / "pack", ".")
    (folder / "before.json").write_text('{"gemm_check": {"status": "cut"}}')
    process = start(folder, "second", "--after", str(folder / "before.json"))
    limit = time.monotonic() + 120
    path = folder / "out/steps.json"
    while not (path.exists() and "gemm_check" in path.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    found = steps(folder)
    assert found["the carried package loads"]["status"] == 0, printed
    assert found["gemm_check"] == {"status": "running"}
    assert set(found) == {"the carried package loads", "gemm_check"}


HANGS = """
import argparse, sys, time
from pathlib import Path
from steps import Call, Step

folder = Path(sys.argv[1])
paths = dict(out=folder / "out", work=folder / "work", carried=folder / "carried")
call = Call(argparse.Namespace(rehearse=True, seconds=100.0, **paths))
wait = "echo first line; trap '' TERM; sleep 300 & wait"
assert not call.run(Step("hangs", ["bash", "-c", wait], 1.0, tail=1))
assert call.run(Step("goes on", ["sleep", "300"], 0.5, cut_is_failure=False))
call.end = time.monotonic() + 1
assert not call.run(Step("has no time", ["true"], 60.0))
"""


def test_a_step_that_hangs_costs_its_time(folder: Path) -> None:
    """Also one that does not listen; what remains of the time goes to the other steps."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/gpu")}
    subprocess.run([sys.executable, "-c", HANGS, str(folder)], env=environment, check=True, timeout=100)
    found = {name: facts["status"] for name, facts in steps(folder).items()}
    assert found == {"hangs": "cut", "goes on": "cut short", "has no time": "skipped"}
    assert (folder / "out/failed.txt").read_text() == "== hangs\nfirst line\n\n"
    assert "SKIPPED has no time: no time left" in (folder / "out/log.txt").read_text()
