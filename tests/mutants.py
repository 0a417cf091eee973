#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether the tests notice what they are there for: one line is broken at a time, and one test must fail.

    python tests/mutants.py                    all of tests/mutants.toml
    python tests/mutants.py --only PATTERN...  those whose name, file or test holds one of them
    python tests/mutants.py --list

An entry names a file, a fragment that stands there once, what takes its place, and the cheapest test that
fails then: a CMake target with its arguments, or tests of pytest from tests/. Works in build/mutants, on a
copy of the tree with a build of its own, with the Python that runs this, which has what the tests need.
First every test must pass as it is. A mutant is killed by a test that fails, crashes or hangs; a fragment
that is not there once, code that does not compile and a test that cannot run are errors. Exit status 1: one
lived; 2: an error.

The tests of Python are forked from this process, which has imported torch: most take less time than that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
TREE, BUILD = WORK / "tree", WORK / "build"
FURTHER = {"test_shim_": "vimcore_shim_python", "vim_infer": "vim-infer"}  # targets of some Python tests
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "SKBUILD=ON",
    "VIMCORE_TESTS=ON",
    "VIMCORE_ISAS=native",
    "VIMCORE_UNITY=OFF",
)
# Kernels compile longer than they are tested: in half the time with -O1.
FASTER = ("cpp/cmake/options.cmake", ",-O2,-O3>", ",-O2,-O1>")
PRELOADED = ("pytest", "torch", "timm.data", "timm.optim", "timm.scheduler", "torchvision.transforms.v2")


class Fault(Exception):
    """Neither killed nor alive: the entry, or the tree, is wrong."""


@dataclass(frozen=True)
class Test:
    """A program of CTest's with arguments, or tests of pytest.

    Attributes:
        words: target and arguments, or node ids.
    """

    words: tuple[str, ...]

    @property
    def in_python(self) -> bool:
        return self.words[0].startswith("python/")

    @property
    def targets(self) -> tuple[str, ...]:
        if not self.in_python:
            return self.words[:1]
        return ("_core", *(target for part, target in FURTHER.items() if part in str(self)))

    def __str__(self) -> str:
        return " ".join(word.removeprefix("python/") for word in self.words)


@dataclass(frozen=True)
class Mutant:
    """What is broken, and who must notice."""

    name: str
    file: str
    old: str
    new: str
    test: Test

    def apply(self, text: str) -> str:
        """The file with the fault."""
        if (count := text.count(self.old)) != 1:
            raise Fault(f"the fragment stands {count} times in {self.file}")
        return text.replace(self.old, self.new)


def read(path: Path) -> list[Mutant]:
    """The list; mutants of a file follow each other, so that it is rebuilt least."""
    entries = tomllib.loads(path.read_text())["mutant"]
    found = [Mutant(**{**entry, "test": Test(tuple(entry["test"].split()))}) for entry in entries]
    if len({mutant.name for mutant in found}) < len(found):
        raise Fault("two mutants of one name")
    return sorted(found, key=lambda mutant: (Path(mutant.file).suffix == ".py", mutant.file))


# ---- the copy ----------------------------------------------------------------------------------------------


def copy_tree() -> None:
    """Brings the copy up to date, with what is not committed; files that did not change keep their times."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = {name for name in names.split("\0") if name and (ROOT / name).is_file()}
    for path in [p for p in TREE.rglob("*") if p.is_file() or p.is_symlink()]:
        if path.relative_to(TREE).as_posix() not in wanted:
            path.unlink()
    for name in wanted:
        content, there = (ROOT / name).read_bytes(), TREE / name
        if name == FASTER[0]:
            if FASTER[1].encode() not in content:
                raise Fault(f"{name}: there is no {FASTER[1]}")
            content = content.replace(FASTER[1].encode(), FASTER[2].encode())
        if not there.exists() or there.read_bytes() != content:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(content)


def configure() -> None:
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], check=True, capture_output=True, text=True
    )
    options = [*OPTIONS, f"Python_EXECUTABLE={sys.executable}", f"nanobind_DIR={nanobind.stdout.strip()}"]
    if shutil.which("ccache"):
        options.append("CMAKE_CXX_COMPILER_LAUNCHER=ccache")
    command = ["cmake", "-S", str(TREE), "-B", str(BUILD), "-G", "Ninja", *(f"-D{o}" for o in options)]
    quietly("cmake", command)


def build(targets: tuple[str, ...], jobs: int) -> None:
    """Raises Fault with what the compiler says."""
    quietly("build", ["cmake", "--build", str(BUILD), "-j", str(jobs), "--target", *targets])
    if "_core" in targets:
        package = TREE / "python" / "vimcore"
        for extension in BUILD.glob("_core*.so"):
            link = package / extension.name
            link.unlink(missing_ok=True)
            link.symlink_to(extension)


def quietly(what: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-5:]
        raise Fault(f"{what}: " + "\n    ".join(errors[:5]))


def environment() -> dict[str, str]:
    """What the tests run in: the copy's package and program, whatever is installed."""
    own = {
        "PYTHONPATH": str(TREE / "python"),
        "VIM_INFER": str(BUILD / "cpp" / "tools" / "vim-infer"),
        "VIMCORE_SHIM_PACKAGE": str(BUILD / "python"),
        "OMP_WAIT_POLICY": "passive",
        "CCACHE_BASEDIR": str(WORK),
        "CCACHE_NOHASHDIR": "1",
    }
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | own


def write(path: Path, text: str) -> None:
    """Also for Python, which takes a file of the same second and length for the one that it compiled."""
    path.write_text(text)
    if path.suffix == ".py":
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


# ---- tests -------------------------------------------------------------------------------------------------


def program_of(test: Test) -> list[str]:
    found = next((path for path in BUILD.glob(f"tests/*/{test.words[0]}") if path.is_file()), None)
    if found is None:
        raise Fault(f"{test.words[0]}: no such program of the tests")
    return [str(found), *test.words[1:]]


def start(test: Test) -> int:
    """A process of its own group that runs the test and writes to `output`."""
    command = [] if test.in_python else program_of(test)
    if test.in_python:
        for name in PRELOADED:
            importlib.import_module(name)
    sys.stdout.flush()
    if (process := os.fork()) > 0:
        return process
    try:
        os.setsid()
        os.chdir(TREE / "tests")
        output = os.open(WORK / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment())
        if command:
            os.execv(command[0], command)
        import pytest

        sys.path[:1] = [str(TREE / "tests"), str(TREE / "python")]
        status = int(pytest.main(["-qx", "-p", "no:cacheprovider", "--rootdir", ".", *test.words]))
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(9)


def passes(test: Test, timeout: float) -> bool:
    """Runs a test; False: it failed, crashed or hung."""
    process, end, status = start(test), time.monotonic() + timeout, None
    while status is None and time.monotonic() < end:
        time.sleep(0.05)
        done, waited = os.waitpid(process, os.WNOHANG)
        status = os.waitstatus_to_exitcode(waited) if done else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # and what it started
    if status is None:
        os.waitpid(process, 0)
        return False
    if test.in_python and status > 1:  # nothing collected, wrong usage
        raise Fault(f"{test}: pytest could not run it:\n    " + "\n    ".join(last_lines(WORK / "output")))
    return status == 0


def last_lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-5:]


def check_unmutated(mutants: list[Mutant], jobs: int) -> None:
    """Every test passes as it is, those of Python in one process, and they test the copy."""
    tests = list(dict.fromkeys(mutant.test for mutant in mutants))
    build(tuple(dict.fromkeys(target for test in tests for target in test.targets)), jobs)
    ids = dict.fromkeys(word for test in tests if test.in_python for word in test.words)
    if ids:
        where = "import vimcore._core; print(vimcore.__file__, vimcore._core.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", where],
            check=True,
            capture_output=True,
            text=True,
            env=environment(),
            cwd=WORK,
        ).stdout.split()
        if any(not Path(path).is_relative_to(TREE) for path in found):
            raise Fault(f"Python imports {' and '.join(found)} instead of {TREE}")
        tests = [test for test in tests if not test.in_python] + [Test(tuple(ids))]
    for test in tests:
        if not passes(test, 1200):
            lines = "\n    ".join(last_lines(WORK / "output"))
            raise Fault(f"{test.words[0]}: fails as it is:\n    {lines}")


def outcome(mutant: Mutant, timeout: float, jobs: int) -> str:
    """KILLED or LIVED, or ERROR and why."""
    path = TREE / mutant.file
    try:
        original = path.read_text()
        write(path, mutant.apply(original))
        try:
            if not mutant.test.in_python or path.suffix != ".py":
                build(mutant.test.targets, jobs)
            return "LIVED" if passes(mutant.test, timeout) else "KILLED"
        finally:
            write(path, original)
    except (Fault, OSError) as error:
        return f"ERROR  {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only", metavar="PATTERN", nargs="+", default=[""], help="part of name, file or test"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds after which a test hangs")
    args = parser.parse_args()
    mutants = [
        m
        for m in read(ROOT / "tests" / "mutants.toml")
        if any(part in text for part in args.only for text in (m.name, m.file, str(m.test)))
    ]
    if args.list or not mutants:
        for mutant in mutants:
            print(f"{mutant.name:28} {mutant.file:44} {mutant.test}")
        return 0 if mutants else 2
    begin = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    copy_tree()
    configure()
    check_unmutated(mutants, args.jobs)
    print(f"unmutated: all tests pass, {time.monotonic() - begin:.0f} s", flush=True)
    found: dict[str, str] = {}
    for mutant in mutants:
        since = time.monotonic()
        found[mutant.name] = outcome(mutant, args.timeout, args.jobs)
        word, _, why = found[mutant.name].partition(" ")
        seconds, place = f"{time.monotonic() - since:6.1f} s", f"{mutant.name:28} {mutant.file:44}"
        print(f"{word:7}{seconds}  {place} {mutant.test} {why}", flush=True)
    words = [text.split()[0] for text in found.values()]
    counts = {word: words.count(word) for word in ("KILLED", "LIVED", "ERROR")}
    print(f"{len(found)} mutants, {counts}, {(time.monotonic() - begin) / 60:.1f} min")
    return 2 if counts["ERROR"] else 1 if counts["LIVED"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Fault as fault:
        print(f"tests/mutants.py: {fault}", file=sys.stderr)
        sys.exit(2)
