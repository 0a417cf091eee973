#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that are slow and rarely concerned run again when their inputs changed, and at every tenth change.

    python3 .ci/lanes.py                    which are due, and why
    python3 .ci/lanes.py run NAME...        runs those that are due and records what passed; --force: all

A record, .ci/passed/NAME.json, holds a hash of the inputs (files of the tree, compiler, distribution) and
how many changes (commits along first parents) the history had. Whoever runs a check commits its record. No
record, a damaged one, another hash, ten changes, or a history that cannot be counted: the check runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERY = 10
BUILD = ("CMakeLists.txt", "CMakePresets.json", "cpp", ".ci/lanes.py")


@dataclass(frozen=True)
class Lane:
    """A check.

    Attributes:
        title: What it shows.
        inputs: Files and folders that its outcome depends on.
        commands: Lines for bash, run in the root of the tree.
        tools: Programs whose version counts; what a check installs itself is named by the distribution.
    """

    title: str
    inputs: tuple[str, ...]
    commands: tuple[str, ...]
    tools: tuple[str, ...] = ("c++",)


LANES = {
    "aarch64": Lane(
        "the same sources with NEON, run under emulation",
        (
            *BUILD,
            *("tests/aarch64.sh", "tests/cpp", "tests/golden"),
            *("tests/cuda/CMakeLists.txt", "tests/python/CMakeLists.txt"),
        ),
        ("bash tests/aarch64.sh",),
    ),
    "cuda": Lane(
        "every kernel for every architecture, registers and spills, instruction counts",
        (
            *(*BUILD, "cuda", "python/src", "python/vimcore/__init__.py", "tests/cuda"),
            *("tests/shim/architecture.h", "tests/constraints.txt"),
        ),
        ("bash tests/cuda/compile_all.sh build/cuda",),
        ("c++", "nvcc"),
    ),
    "wheel": Lane(
        "source archive, wheel with its libraries, Debian package, vim-infer without shared libraries",
        (*BUILD, "python", "pyproject.toml", "README.md", "tests/package/wheel.sh", "tests/constraints.txt"),
        ("bash tests/package/wheel.sh",),
    ),
    "windows": Lane(
        "vim-infer for Windows, used under Wine",
        (*BUILD, "tests/package/windows.sh", "tests/package/mingw.cmake"),
        ("bash tests/package/windows.sh",),
        ("x86_64-w64-mingw32-g++-posix",),
    ),
    "browser": Lane(
        "reports of runs of every task, opened in Chromium",
        (
            *BUILD,
            "python/vimcore/plots",
            "python/vimcore/tasks",
            "tests/browser",
            "tests/python/report_checks.py",
            "tests/constraints.txt",
        ),
        ("bash tests/browser/run.sh",),
        ("chromium",),
    ),
    "fuzz": Lane(
        "hostile input, half a minute for each reader of files",
        (*BUILD, "tests/fuzz"),
        ("bash tests/fuzz/run.sh 30",),
    ),
}


def git(*arguments: str) -> str:
    """What git prints; CalledProcessError or FileNotFoundError where there is no git or no repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def changes() -> int | None:
    """How many changes the history holds; None where that is not known, as in a shallow clone."""
    try:
        if git("rev-parse", "--is-shallow-repository").strip() != "false":
            return None
        return int(git("rev-list", "--count", "--first-parent", "HEAD"))
    except (OSError, subprocess.CalledProcessError):
        return None


def version(tool: str) -> str:
    """Its numbers of version, or that there is no such tool."""
    named = {"c++": os.environ.get("CXX", "c++"), "nvcc": os.environ.get("CUDACXX", "nvcc")}.get(tool, tool)
    program = shutil.which(named) or shutil.which(named, path="/usr/local/cuda/bin")
    if program is None:
        return f"{tool}: none"
    text = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    return " ".join((tool, *re.findall(r"\d+\.\d[\w.-]*", text)))


def distribution() -> str:
    path = Path("/etc/os-release")
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1] if found else sys.platform


def key(lane: Lane) -> str | None:
    """A hash of everything the outcome depends on; None where git does not say which files there are."""
    try:
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *lane.inputs)
    except (OSError, subprocess.CalledProcessError):
        return None
    digest = hashlib.sha256()
    for part in (distribution(), *map(version, lane.tools), *lane.commands):
        digest.update(part.encode() + b"\0")
    for name in sorted(set(filter(None, listed.split("\0")))):
        path = ROOT / name
        if path.is_file():
            digest.update(f"{name}\0{os.access(path, os.X_OK)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def record_of(name: str) -> Path:
    return ROOT / ".ci" / "passed" / f"{name}.json"


def due(name: str) -> str:
    """Why the check has to run; empty when it has not."""
    now = changes()
    if now is None:
        return "the history cannot be counted here"
    try:
        record = json.loads(record_of(name).read_text())
        inputs, at = str(record["inputs"]), int(record["change"])
    except FileNotFoundError:
        return "nobody recorded that it passed"
    except (OSError, ValueError, KeyError, TypeError):
        return "its record is damaged"
    if inputs != key(LANES[name]):
        return "an input changed"
    if not at <= now:
        return "the history is another one"
    return f"change {now - at} since it ran" if now - at >= EVERY else ""


def run(name: str) -> int:
    """Runs the check; when it passes and its inputs are still the same, records that. The exit status."""
    lane, before = LANES[name], key(LANES[name])
    script = "\n".join(("set -euo pipefail", *lane.commands))
    environment = {**os.environ, "PYTHON": sys.executable}
    status = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=False).returncode
    if status:
        return status
    at = changes()
    if before is None or at is None:
        print(f"{name}: passed, not recorded: the history cannot be counted here")
    elif key(lane) != before:
        print(f"{name}: passed, not recorded: an input changed while it ran")
    else:
        record_of(name).parent.mkdir(parents=True, exist_ok=True)
        record_of(name).write_text(json.dumps({"inputs": before, "change": at}, indent=2) + "\n")
        print(f"{name}: passed, recorded in {record_of(name).relative_to(ROOT)}: commit it")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    runs = commands.add_parser("run", help="run checks that are due")
    runs.add_argument("names", nargs="+", choices=LANES, metavar="NAME", help=", ".join(LANES))
    runs.add_argument("--force", action="store_true", help="those that are not due, too")
    options = parser.parse_args(arguments)
    if options.command is None:
        for name in LANES:
            why = due(name)
            print(f"{name:8} {'due: ' + why if why else 'passed with these inputs'}")
        return 0
    for name in options.names:
        why = due(name) or ("asked for" if options.force else "")
        print(f"-- {name}: {LANES[name].title}", flush=True)
        print(f"   {why or 'passed with these inputs: not repeated'}", flush=True)
        if why and (status := run(name)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
