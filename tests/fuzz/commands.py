# SPDX-License-Identifier: Apache-2.0
"""Bad and odd command lines for `vimcore` and `vim-infer`.

    python tests/fuzz/commands.py [--seed N] [--count N] [--seconds S] [--program NAME] [--line N]

Every one must end soon, with status 0, 1 or 2, and with a readable line. The lines of a seed are always the
same; --line runs one of them again. `vimcore` runs in forked children of this process, so that nothing is
imported twice; `vim-infer` is the binary that $VIM_INFER names, or the one on the PATH. Lines that are legal
and take long are not made.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hostile
from lines import TRAIN, WORKING, Line, Maker

JSON_LINES = {"predict", "search", "info", "convert", "plan", "eval", "health", "plot", "features", "segment"}
UNCAUGHT = 77  # status of an uncaught exception
MEMORY = 8 << 30  # address space of a line
LIMIT = 30.0  # seconds of a line, on a busy machine


@dataclass
class Ended:
    """How it ended: status, negative for a signal, None where it had to be ended; what it wrote."""

    status: int | None
    out: str
    error: str


# ---- running them ------------------------------------------------------------------------------------------


SHELL = {
    "no stdout": ">&-",
    "no stderr": "2>&-",
    "no streams": ">&- 2>&-",
    "full stdout": ">/dev/full",
    "full stderr": "2>/dev/full",
}


def _python(words: list[str], streams: str) -> int:
    """In a child of ours: what `vimcore` does."""
    from vimcore.cli import main

    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for word, number in (("stdout", 1), ("stderr", 2)):
        if streams == f"full {word}":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        elif streams in (f"no {word}", "no streams"):
            os.close(number)
            setattr(sys, word, None)  # as Python starts then
    try:
        return main(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        if sys.stderr is not None:
            traceback.print_exc()
        return UNCAUGHT  # whatever became of the message


def _fork(line: Line, folder: Path, out: int, error: int) -> int:
    """Process of a line of `vimcore`, in a group of its own."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(error, 2)
            os._exit(_python(line.words, line.streams))
        finally:
            os._exit(UNCAUGHT)
    return child


def _spawn(line: Line, folder: Path, out: int, error: int, binary: str) -> int:
    """Process of a line of `vim-infer`, in a group of its own."""
    script = f'ulimit -v {MEMORY >> 10}; exec "$0" "$@" {SHELL.get(line.streams, "")}'
    command = [os.fsencode(word) for word in ("sh", "-c", script, binary, *line.words)]
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=error, start_new_session=True
    )
    process.returncode = 0  # waited for by its number
    return process.pid


def run(line: Line, folder: Path, binary: str) -> Ended:
    """Runs a line in a folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        target = out.fileno()
        if line.streams == "left stdout":
            reader, target = os.pipe()
            os.close(reader)
        where = (line, folder, target, error.fileno())
        status = _wait(_fork(*where) if line.program == "vimcore" else _spawn(*where, binary))
        if target != out.fileno():
            os.close(target)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Ended(status, *texts)


def _wait(child: int) -> int | None:
    """The status, negative for a signal; None: it had to be ended."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# ---- judging them ------------------------------------------------------------------------------------------


def fault(line: Line, ended: Ended) -> str | None:
    """What is wrong with how a line ended."""
    if ended.status is None:
        return f"not over after {LIMIT:g} s"
    if "Traceback" in ended.out + ended.error or ended.status == UNCAUGHT:
        return "traceback"
    if ended.status not in (0, 1, 2):
        return f"status {ended.status}"
    if not line.streams.endswith(("stdout", "streams")) and (wrong := _not_json(line, ended)):
        return f"not JSON: {wrong!r:.200}"
    if line.streams:
        if line.streams == "full stdout" and ended.status == 0 and "--out" not in line.words:
            return "status 0 without results"
        return None
    lines = ended.error.splitlines()
    longest = max(map(len, line.words), default=0)
    if "--list" in line.words:
        longest += 1 << 20  # it holds names
    if any(len(text) > 4000 + 2 * longest for text in lines):
        return "a line of more than 4000 characters"
    named = [text for text in lines if re.match(rf"{line.program}( \w+)?: ", text)]
    if ended.status == 2 and not (named and (line.program == "vim-infer" or "usage: " in ended.error)):
        return "status 2 without a word about the usage"
    if ended.status == 1 and not named and not (line.words[0] == "health" and ended.out):
        return "status 1 without a line that says why"
    if ended.status == 1 and len(lines) - len(named) > 6:
        return f"{len(lines)} lines on stderr"
    return None


def _not_json(line: Line, ended: Ended) -> str | None:
    """A line of the output that is not JSON where --json was asked for."""
    words = line.words[: line.words.index("--")] if "--" in line.words else line.words
    asked = "--json" in words and not words[words.index("--json") - 1].startswith("-")  # not as a value
    if asked and words[0] in JSON_LINES:
        for text in ended.out.splitlines():
            try:
                json.loads(text, parse_constant=lambda name: 1 / 0)
            except (ValueError, ZeroDivisionError):
                return text
    return None


# ---- all of it ---------------------------------------------------------------------------------------------


class Sandbox:
    """The folder in which lines are run; made anew where the line before changed something."""

    def __init__(self, root: Path) -> None:
        self.pristine, self.folder = root / "pristine", root / "all" / "here"
        self.pristine.mkdir()
        self.folder.parent.mkdir()
        self.paths = hostile.make(self.pristine)
        self.runs: list[str] = []
        self.fresh: object = None

    def _state(self) -> object:
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in [".", *names]:
                facts = os.lstat(os.path.join(folder, name))
                found.append((folder, name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
        return sorted(found)

    def ready(self) -> Path:
        if self.fresh is None or self._state() != self.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            subprocess.run(["cp", "-a", str(self.pristine), str(self.folder)], check=True)
            self.fresh = self._state()
        return self.folder

    def add_run(self) -> None:
        """A run of `vimcore train`, and damaged ones."""
        ended = run(
            Line(0, "vimcore", ["train", *TRAIN.replace("new", "run").split()], ""), self.pristine, ""
        )
        if ended.status != 0:
            raise RuntimeError(f"the run that others are made of failed: {ended.error}")
        damages: dict[str, Callable[[bytes], bytes]] = {
            "cut": lambda data: data[: len(data) // 2],
            "list": lambda data: b"[1]\n",
            "object": lambda data: b'{"a": 1}\n',
        }
        for file in (
            "log.jsonl",
            "config.toml",
            "checkpoint.pt",
            "eval.npz",
            "best.safetensors",
            "classes.json",
        ):
            if not (self.pristine / "run" / file).exists():
                continue
            for name, damage in damages.items():
                folder = self.pristine / f"run-{file}-{name}"
                shutil.copytree(self.pristine / "run", folder)
                (folder / file).write_bytes(damage((folder / file).read_bytes()))
                self.runs.append(folder.name)
        self.runs += ["run"] * 6


def imported() -> None:
    """What the commands import, once for all children."""
    import torch

    torch.set_num_threads(1)  # no pool of threads that a child would miss
    for name in ("timm", "torchvision", "matplotlib.figure", "faster_coco_eval.core", "open_clip"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> int:
    """Returns the exit status: 1 where a line ended badly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10**9, help="lines for each program at most")
    parser.add_argument("--seconds", type=float, default=60, help="for each program at most (default: 60)")
    parser.add_argument("--program", choices=tuple(WORKING), help="default: both")
    parser.add_argument("--line", type=int, help="only this one, with everything it writes")
    args = parser.parse_args()
    binary = os.environ.get("VIM_INFER") or shutil.which("vim-infer") or ""
    programs = [args.program] if args.program else list(WORKING)
    if "vim-infer" in programs and not binary:
        parser.error("there is no vim-infer on the PATH; name it in $VIM_INFER")
    bad = 0
    with tempfile.TemporaryDirectory(prefix="vimcore-fuzz-") as root:
        sandbox = Sandbox(Path(root))
        if "vimcore" in programs:
            imported()
            sandbox.add_run()
        for program in programs:
            paths = sandbox.paths + (sandbox.runs if program == "vimcore" else [])
            bad += attack(Maker(args.seed, program, paths, binary), sandbox, binary, args)
    return 1 if bad else 0


def attack(maker: Maker, sandbox: Sandbox, binary: str, args: argparse.Namespace) -> int:
    """Runs the lines of one program, and says which end badly; their number."""
    begin, tries, bad = time.monotonic(), 0, 0
    statuses: dict[int | None, int] = {}
    numbers = range(args.count) if args.line is None else [args.line]
    for number in numbers:
        if time.monotonic() - begin > args.seconds:
            break
        line = maker.line(number)
        ended = run(line, sandbox.ready(), binary)
        tries += 1
        statuses[ended.status] = statuses.get(ended.status, 0) + 1
        why = fault(line, ended)
        if args.line is not None:
            print(f"{line}\n{ended.out}{ended.error}status {ended.status}")
        if why:
            bad += 1
            last = (ended.error.strip().splitlines() or [""])[-1]
            print(f"FAULT {why}: {line}\n    {last:.300}")
            again = f"--seed {args.seed} --program {line.program} --line {number}"
            print(f"    again: python tests/fuzz/commands.py {again}", flush=True)
    shares = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items(), key=str))
    took = time.monotonic() - begin
    print(
        f"{maker.program}: {tries} lines in {took:.0f} s, {tries - bad} survived ({shares}), {bad} faults",
        flush=True,
    )
    return bad


if __name__ == "__main__":
    sys.exit(main())
