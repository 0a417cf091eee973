# SPDX-License-Identifier: Apache-2.0
"""Acceptance where a GPU can be had for minutes: two calls, with programs that prepare.sh built elsewhere.

    bash tests/gpu/prepare.sh                                             # without a GPU: makes .gpu/
    python tests/gpu/call.py first --out OUT                              # 330 s at most
    python tests/gpu/call.py second --out OUT2 --after OUT/steps.json     # 300 s at most, after repairs

First: is it right (Vim-Ti in three types, products of matrices), what do its kernels cost, the scan against
mamba-ssm's, rows of model and training, then all tests side by side. Second: what failed, memory, the whole
benchmark, sanitizers beside 200 steps of training in each type.

Every step has a limit and writes as it goes; what a killed call had found until then is in --out, eight files
at most: log.txt, steps.json (each step's status and seconds), failed.txt (output of what failed) and the
steps' own. Programs that do not load here are built here. 1 is returned if a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steps import GPU, ROOT, Call, Step

SECONDS = {"first": 320.0, "second": 290.0}
SANITIZED = ("scan", "scan_backward", "ops", "backward")
FINDING = re.compile(r"=========.*(Invalid|Misaligned|Uninitialized|Race reported|hazard)")
CUBLASLT = """
import re, torch
x = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
x @ x  # loads the library where torch has not yet
found = re.search(r"\\S*/libcublasLt\\.so\\S*", open("/proc/self/maps").read())
print(found.group() if found else "none")
"""
LOADS = """
import sys, vimcore
built = vimcore.build_info()
print(built)
sys.exit(not built["cuda"] and "rehearse" not in sys.argv)
"""


def output_of(call: Call, *command: str | Path) -> str:
    """What a command prints, or why it does not."""
    try:
        text = [str(part) for part in command]
        done = subprocess.run(
            text, capture_output=True, text=True, env=call.environment, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def load(call: Call) -> str:
    """Makes sure that package and programs load; the cuBLASLt that torch uses."""
    query = "--query-gpu=name,driver_version,clocks.sm,memory.used"
    call.say(output_of(call, "nvidia-smi", query, "--format=csv,noheader"))
    call.say(f"python {sys.version.split()[0]}, {os.cpu_count()} cores")
    python = [sys.executable, "-c"]
    options = ["rehearse"] if call.rehearse else []
    loads = call.run(Step("the carried package loads", [*python, LOADS, *options], 60, tail=1))
    linked = [output_of(call, "ldd", call.bin / name) for name in call.programs()[:1]]
    if not loads or "not found" in "".join(linked):
        call.say("what was carried does not load here: building")
        build_here(call)
    if call.rehearse:
        return "none"
    library = output_of(call, *python, CUBLASLT).splitlines()[-1]
    call.say(f"cuBLASLt: {library}")
    call.note("cuBLASLt is found", status=0 if Path(library).is_file() else "no")
    return library


def build_here(call: Call) -> None:
    """Package and programs in place of those that were carried."""
    call.prepend("PYTHONPATH", call.work / "nanobind")
    build = call.work / "build"
    environment = {"BUILD": str(build), "PYTHON": sys.executable}
    command = ["bash", GPU / "acceptance.sh", "build"]
    call.run(Step("build", command, 200, environment=environment, tail=5))
    if (build / "site").is_dir():
        shutil.rmtree(call.site, ignore_errors=True)
        shutil.copytree(build / "site", call.site)
        call.prepend("PYTHONPATH", call.site)
    for path in (build / "cmake/tests/cuda").glob("*_gpu"):
        shutil.copy(path, call.bin)


def start_peers(call: Call) -> threading.Thread | None:
    """Builds mamba-ssm's kernels beside other steps, where their sources were carried."""
    if not any((call.work / "sdist").glob("*.tar.gz")):
        call.say("without mamba-ssm's kernels: no sources were carried (MAMBA_SDIST of prepare.sh)")
        return None
    options = ["--source", call.work / "sdist", "--build", call.work / "peers"]
    command = ["nice", "-n", "19", sys.executable, GPU / "peers.py", *options]
    thread = threading.Thread(target=call.run, args=[Step("peers", command, 240, tail=3)], daemon=True)
    thread.start()
    return thread


def bench(call: Call, name: str, only: str, seconds: float, rounds: int) -> Step:
    options = ["--rates", call.out / "rates.json", "--peers", call.work / "peers", "--rounds", str(rounds)]
    only = "scan,train" if call.rehearse else only  # all of it is tried out in test_gpu_bench.py
    options += ["--only", only] if only else []
    command = [sys.executable, GPU / "bench.py", *call.device, *options, "--seconds", str(seconds)]
    return Step(name, [*command, "--json", call.out / "bench.json"], seconds + 25, tail=80)


def rates(call: Call) -> None:
    """The rates of the device, measured while nothing else runs."""
    if call.run(Step("rates", [call.bin / "rates"], 30)):
        shutil.copy(call.work / "logs" / "rates", call.out / "rates.json")


def pytest(call: Call, name: str, limit: float, workers: int, *options: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    command += ["--collect-only"] if call.rehearse else ["--maxfail", "60"]
    threads = {"OMP_NUM_THREADS": "2"}
    return call.run(Step(name, [*command, *options], limit, "pytest.txt", environment=threads, tail=15))


def failed_tests(out: Path) -> list[str]:
    """Names of tests that pytest.txt says failed."""
    text = (out / "pytest.txt").read_text(errors="replace") if (out / "pytest.txt").exists() else ""
    return re.findall(r"^(?:FAILED|ERROR) \S*test_cuda\.py::(.+?)(?: - .*)?$", text, re.MULTILINE)


def first(call: Call, args: argparse.Namespace) -> None:
    """Right at all, what it costs, all tests."""
    del args
    building = start_peers(call)
    library = load(call)
    smoke = [sys.executable, GPU / "smoke.py", *call.device, "--json", call.out / "smoke.json"]
    call.run(Step("Vim-Ti against float64, kernels", smoke, 100, tail=90))
    gemm = f"gemm_check{call.suffix}"
    call.run(call.program(gemm, 60, library, output="gemm.txt", tail=26))
    each = {"VIMCORE_ALGORITHM_PER_BATCH": "1"}
    call.run(
        call.program(
            gemm, 45, library, suffix=" an algorithm per batch", environment=each, output="gemm.txt", tail=26
        )
    )
    call.run(call.program(f"scan_check{call.suffix}", 30, "none", output="scan.txt", tail=30))
    rates(call)
    while building and building.is_alive() and time.monotonic() - call.begin < 170 and call.left > 120:
        time.sleep(0.5)
    call.run(
        bench(
            call,
            "benchmark, the main rows",
            "scan,scan_backward,model,train,latency",
            min(60.0, call.left - 90),
            7,
        )
    )
    names = call.programs()
    steps = [call.program(name, 110, library) for name in names]
    products = [name for name in names if re.match(r"test_(linear|network|backward|training)_", name)]
    if library != "none":
        steps += [call.program(name, 110, "none") for name in products]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            pytest,
            call,
            "pytest",
            120,
            6,
            str(GPU / "test_cuda.py"),
            "-k",
            "not no_more_memory and not training_steps",
        )
        call.together(steps)
        running.result()
    call.note("failed tests", names=failed_tests(call.out))


def sanitizers(call: Call) -> list[Step]:
    """compute-sanitizer over the kernels, where it is and works."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        call.say("SKIPPED sanitizers: no compute-sanitizer here")
        return []
    if not call.run(Step("compute-sanitizer works", [tool, "--error-exitcode", "3", call.bin / "probe"], 30)):
        call.say("SKIPPED sanitizers: compute-sanitizer does not work here")
        return []
    steps = []
    environment = {"VIMCORE_CUBLASLT": "none", "VIMCORE_STABILITY_STEPS": "1"}
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for name in SANITIZED:
            program = call.bin / f"test_{name}_cuda{call.suffix}"
            if not program.exists():
                continue
            options = [tool, "--tool", kind, "--error-exitcode", "3"]
            if kind == "memcheck":
                options += ["--report-api-errors", "no"]  # calls that fail are tested
            command = [*options, program, ROOT / "tests/golden"]
            steps.append(Step(f"{kind} {name}", command, 80, environment=environment, cut_is_failure=False))
    return steps


def second(call: Call, args: argparse.Namespace) -> None:
    """What failed, memory, the whole benchmark, sanitizers beside 200 steps of training in each type."""
    before: dict[str, Any] = json.loads(args.after.read_text()) if args.after else {}
    library = load(call)
    wrong = {name.split()[0] for name, facts in before.items() if facts.get("status", 0) != 0}
    call.together(
        [
            call.program(name, 90, library)
            for name in [*call.programs(), *(f"{name}_check{call.suffix}" for name in ("gemm", "scan"))]
            if name in wrong
        ]
    )
    tests = [f"{GPU / 'test_cuda.py'}::{name}" for name in before.get("failed tests", {}).get("names", [])]
    if tests:
        pytest(call, "tests that failed", 60, 4, *tests)
    pytest(call, "memory, alone", 60, 0, str(GPU / "test_cuda.py"), "-k", "no_more_memory or training_steps")
    rates(call)
    call.run(bench(call, "benchmark", "", min(115.0, call.left - 100), 9))
    stability = [sys.executable, GPU / "stability.py", *call.device, "--seconds", "50"]
    steps = [Step("stability", [*stability, "--json", call.out / "stability.json"], 80, tail=25)]
    checks = sanitizers(call)
    call.together([*steps, *checks])
    for step in checks:
        log = call.work / "logs" / re.sub(r"\W+", "-", step.name)
        findings = len(FINDING.findall(log.read_text(errors="replace"))) if log.exists() else 0
        call.note(step.name, findings=findings)
        if findings:
            call.say(f"FAILED  {step.name}: {findings} findings")
            call.note(step.name, status="findings")
            call.fail(step.name, log)


def main(given: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("first", "second"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--carried", type=Path, default=ROOT / ".gpu", help="what prepare.sh made (.gpu)")
    parser.add_argument("--work", type=Path, default=Path("/tmp"), help="where to unpack (/tmp)")
    parser.add_argument("--after", type=Path, help="steps.json of the first call, for the second")
    parser.add_argument("--seconds", type=float, help="for everything (first: 320, second: 290)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny sizes on the CPU")
    args = parser.parse_args(given)
    args.out, args.carried, args.work = (p.resolve() for p in (args.out, args.carried, args.work))
    if args.seconds is None:
        args.seconds = SECONDS[args.which]
    call = Call(args)
    {"first": first, "second": second}[args.which](call, args)
    failed = [name for name, facts in call.steps.items() if facts.get("status") not in (0, None, "cut short")]
    call.say(f"done: {len(failed)} failed {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
