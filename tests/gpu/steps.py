# SPDX-License-Identifier: Apache-2.0
"""Steps of a call (call.py): programs with limits, of which a killed call loses only the one it was in."""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"


@dataclass(frozen=True)
class Step:
    """A program with a limit.

    Attributes:
        output: File in --out for what it prints; None: the log has the end of it.
        tail: Lines of it that the log gets.
        cut_is_failure: Whether it has to end by itself.
    """

    name: str
    command: Sequence[str | Path]
    limit: float
    output: str | None = None
    tail: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    cut_is_failure: bool = True


class Call:
    """One call: what it has, how long it may take, what it found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rehearse: bool = args.rehearse
        self.out: Path = args.out
        self.work: Path = args.work / "vimcore-gpu-call"
        self.begin = time.monotonic()
        self.end = self.begin + args.seconds
        self.suffix = "" if self.rehearse else "_gpu"
        self.device = ["--device", "cpu"] if self.rehearse else []
        self.steps: dict[str, dict[str, Any]] = {}
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        signal.signal(signal.SIGTERM, self.stop)
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)  # of a call before, on the same machine
        (self.work / "logs").mkdir(parents=True)
        with tarfile.open(args.carried / "carried.tar.xz") as archive:
            # its own file; Python before 3.11.4 and 3.10.12 knows no filters
            archive.extractall(self.work, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
        self.bin, self.site = self.work / "bin", self.work / "site"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.environment |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
        self.prepend("PYTHONPATH", self.site)
        if ctypes.util.find_library("gomp") is None:
            self.prepend("LD_LIBRARY_PATH", self.work / "lib")

    def prepend(self, variable: str, folder: Path) -> None:
        if folder.is_dir():
            before = self.environment.get(variable)
            self.environment[variable] = f"{folder}:{before}" if before else str(folder)

    def stop(self, *_: object) -> None:
        """Nothing runs on when the call is ended from outside."""
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(143)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.begin:5.0f} s  {text}"
        with self.lock, (self.out / "log.txt").open("a") as log:
            print(line, flush=True)
            log.write(line + "\n")

    def note(self, name: str, **facts: Any) -> None:
        """Into steps.json, which is whole at any moment."""
        with self.lock:
            self.steps.setdefault(name, {}).update(facts)
            part = self.out / "steps.part"
            part.write_text(json.dumps(self.steps, indent=1) + "\n")
            part.replace(self.out / "steps.json")

    def fail(self, name: str, log: Path) -> None:
        """The beginning and the end of what a step printed, to failed.txt."""
        lines = log.read_text(errors="replace").splitlines()
        if len(lines) > 60:
            lines = [*lines[:30], f"... {len(lines) - 60} lines ...", *lines[-30:]]
        with self.lock, (self.out / "failed.txt").open("a") as failed:
            failed.write("\n".join([f"== {name}", *lines, ""]) + "\n")

    def run(self, step: Step) -> bool:
        """Whether it passed."""
        limit = min(step.limit, self.left - 3)
        if limit < min(5.0, step.limit):
            self.say(f"SKIPPED {step.name}: no time left")
            self.note(step.name, status="skipped")
            return False
        log = self.work / "logs" / re.sub(r"\W+", "-", step.name)
        own = self.out / step.output if step.output else log
        folder = self.work / "folders" / log.name
        folder.mkdir(parents=True, exist_ok=True)  # programs write into it
        self.note(step.name, status="running")
        begin = time.monotonic()
        with own.open("ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                [str(part) for part in step.command],
                cwd=folder,
                env={**self.environment, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self.running.add(process)
            status: int | str
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = "cut" if step.cut_is_failure else "cut short"
                end(process)
            self.running.discard(process)
        seconds = time.monotonic() - begin
        self.note(step.name, status=status, seconds=round(seconds, 1))
        passed = status in (0, "cut short")
        how = "ok     " if status == 0 else "CUT    " if passed else "FAILED "
        self.say(f"{how} {step.name} ({seconds:.0f} s{'' if status == 0 else f', {status}'})")
        with own.open("rb") as printed:
            printed.seek(start)
            text = printed.read().decode(errors="replace")
        for line in text.splitlines()[-step.tail :] if step.tail else ():
            self.say(f"    {line[:200]}")
        if not passed:
            log.write_text(text) if own != log else None
            self.fail(step.name, log)
        return passed

    def together(self, steps: Iterable[Step]) -> None:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(self.run, steps))

    def program(self, name: str, limit: float, library: str, *, suffix: str = "", **options: Any) -> Step:
        """A test program, whose products go to this library."""
        arguments = [] if name.startswith(("gemm", "scan")) else [ROOT / "tests/golden"]
        environment = {"VIMCORE_CUBLASLT": library, **options.pop("environment", {})}
        label = f"{name}{suffix}" + (" built-in" if library == "none" and not self.rehearse else "")
        return Step(label, [self.bin / name, *arguments], limit, environment=environment, **options)

    def programs(self) -> list[str]:
        return sorted(path.name for path in self.bin.glob(f"test_*{self.suffix}"))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started."""
    for how, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
