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
import json
import os
import random
import re
import resource
import shlex
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

SMALL = (
    "--img-size 8 --patch-size 4 --embed-dim 4 --depth 1 --batch-size 4 --epochs 1 --workers 0 --threads 1"
)
TRAIN = f"--data pictures --out new {SMALL} --repeats 1 --mixup 0 --cutmix 0 --val-fraction 0.4"
# Lines that work, of which the bad ones are made. demo and doctor take long: only bad ones are run.
WORKING = {
    "vimcore": {
        "demo": "--out new --epochs 1",
        "train": TRAIN,
        "eval": "run --data pictures --workers 0 --threads 1 --batch-size 4",
        "predict": "--weights good.safetensors --json pictures",
        "convert": "good.safetensors new.safetensors --json",
        "info": "good.safetensors --json",
        "bench": "--sizes 32 --batch 1 --pairs 1 --sample 0 --pause 0 --seconds 0 --threads 1 --peers=",
        "plot": "run --out new --json",
        "health": "--weights good.safetensors --count 1",
        "plan": "--batch 1 --device cpu --json",
        "doctor": "",
    },
    "vim-infer": {
        "predict": "--weights good.safetensors --json pictures",
        "features": "--weights good.safetensors --out new.safetensors --json pictures",
        "info": "--weights good.safetensors --json",
        "bench": "--weights good.safetensors --batches 1 --seconds 0 --json",
    },
}
SURELY_BAD = {
    "demo": ["--epochs=0", "--frobnicate", "--seed=x", "stray"],
    "doctor": ["--frobnicate", "stray"],
}
# What makes a legal line long, or its network large: only small values, and never left to the default.
LONG = set(
    """--epochs --workers --pairs --seconds --sample --pause --sizes --batch --batches --repeats --embed-dim
    --depth --img-size --patch-size --stride --size --peers --accumulate --in-chans""".split()  # noqa: SIM905
)
BRIEF = ["", "0", "-1", "1", "x", "nan", "-inf", "1,"]
NUMBERS = [
    *BRIEF,
    "2",
    "0.5",
    "1e3",
    "1e400",
    "inf",
    "0x10",
    "1_0",
    "100000",
    "1" + "0" * 23,
    "9" * 5000,
    "\u0663",
    "8x8",
]
WORDS = """- -- -x None true NaN [1, {} null cpu cuda cuda:99 cuda:999999999999999999 mps float16 a=b = x=1
    self=1 memory=3 depth=x img_size=8 img_size= norm_eps=nan pool=max tiny-released tiny-long-released 80G
    1e999T svg ema least %s%n{} \u00e9\U0001f600 \udcff \x01\x7f[31m""".split()  # noqa: SIM905
WORDS += ["", " ", "a b", "two\nlines", "x" * 300, "9" * 400 + "T"]
KINDS = ["value"] * 6 + ["add"] * 3 + ["other", "drop", "bare", "equals", "equals", "stray", "cut"]
STREAMS = ["no stdout", "no stderr", "no streams", "full stdout", "full stderr", "left stdout"]
JSON_LINES = {"predict", "info", "convert", "plan", "eval", "health", "plot", "features"}
UNCAUGHT = 77  # status of an uncaught exception
MEMORY = 8 << 30  # address space of a line
LIMIT = 30.0  # seconds of a line, on a busy machine


@dataclass
class Line:
    """One line to run: its number under the seed, program, words, and what is wrong with its streams."""

    number: int
    program: str
    words: list[str]
    streams: str

    def __str__(self) -> str:
        text = (
            " ".join([self.program, *map(shlex.quote, self.words)])
            .encode("utf-8", "backslashreplace")
            .decode()
        )
        return f"{text:.600}" + (f"   ({self.streams})" if self.streams else "")


@dataclass
class Ended:
    """How it ended: status, negative for a signal, None where it had to be ended; what it wrote."""

    status: int | None
    out: str
    error: str


# ---- making lines ------------------------------------------------------------------------------------------


def options_of(program: str, command: str, binary: str) -> list[str]:
    """The long options of a command."""
    if program == "vim-infer":
        done = subprocess.run([binary, command, "--help"], capture_output=True, text=True, check=True)
        return re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)
    from vimcore import cli

    return [o for o in cli._parser(command)[1]._option_string_actions if o.startswith("--") and o != "--help"]


class Maker:
    """Makes line N of a seed."""

    def __init__(self, seed: int, program: str, paths: list[str], binary: str) -> None:
        self.seed, self.program, self.paths = seed, program, paths
        self.options = {name: options_of(program, name, binary) for name in WORKING[program]}

    def line(self, number: int) -> Line:
        rng = random.Random(f"{self.seed} {self.program} {number}")
        command = rng.choice(list(self.options))
        groups = self._groups(WORKING[self.program][command].split())
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
            self._worsen(rng, command, groups)
        words = [word for group in groups for word in group]
        if command == "train" and rng.random() < 0.5:
            words.append("--dry-run")
        if command in SURELY_BAD:
            words.append(rng.choice(SURELY_BAD[command]))
        if rng.random() < 0.02:
            command = rng.choice(["", "predicts", "--", "-x", "\udcff"])
        streams = rng.choice(STREAMS) if rng.random() < 0.08 else ""
        return Line(number, self.program, [command, *words], streams)

    @staticmethod
    def _groups(words: list[str]) -> list[list[str]]:
        """Options with their values, and other words."""
        groups: list[list[str]] = []
        for word in words:
            if (
                groups
                and groups[-1][0].startswith("--")
                and len(groups[-1]) == 1
                and groups[-1][0] != "--json"
            ):
                groups[-1].append(word) if not word.startswith("--") else groups.append([word])
            else:
                groups.append([word])
        return groups

    def _value(self, rng: random.Random, option: str, command: str) -> str:
        if option in LONG and command != "plan":
            return rng.choice(BRIEF)
        return rng.choice(rng.choice([self.paths, self.paths, NUMBERS, WORDS]))

    def _worsen(self, rng: random.Random, command: str, groups: list[list[str]]) -> None:
        """One change for the worse."""
        at = rng.randrange(len(groups)) if groups else 0
        group = groups[at] if groups else ["--json"]
        kind = rng.choice(KINDS)
        if kind == "value":
            position = rng.randrange(len(group))
            option = group[0] if len(group) > 1 and position else ""
            group[position] = (
                self._value(rng, option, command) if option or not group[0].startswith("--") else group[0]
            )
        elif kind in ("add", "other"):
            option = rng.choice(self.options[command if kind == "add" else rng.choice(list(self.options))])
            extra = [option, *(self._value(rng, option, command) for _ in range(rng.choice([0, 1, 1, 1, 2])))]
            groups.insert(rng.choice([at, len(groups)]), extra)
        elif kind == "drop" and groups and group[0].partition("=")[0] not in LONG:
            del groups[at]
        elif kind == "bare":
            del group[1:]
        elif kind == "equals" and len(group) == 2:
            group[:] = [f"{group[0]}={self._value(rng, group[0], command)}"]
        elif kind == "stray":
            groups.insert(at, [rng.choice([*WORDS, *self.paths])])
        elif kind == "cut" and group[0].startswith("--"):
            group[0] = group[0][: rng.randrange(3, len(group[0]) + 1)]


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
    import vimcore.bench
    import vimcore.convert
    import vimcore.demo
    import vimcore.doctor
    import vimcore.health
    import vimcore.run_plots
    import vimcore.training.commands
    import vimcore.training.evaluate
    import vimcore.training.run  # noqa: F401

    torch.set_num_threads(1)  # no pool of threads that a child would miss


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
