# SPDX-License-Identifier: Apache-2.0
"""Command lines that work, and what makes bad and odd ones of them; used by commands.py."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
from dataclasses import dataclass

SMALL = (
    "--img-size 8 --patch-size 4 --embed-dim 4 --depth 1 --batch-size 4 --epochs 1 --workers 0 --threads 1"
)
TRAIN = f"--data pictures --out new {SMALL} --repeats 1 --mixup 0 --cutmix 0 --val-fraction 0.4"
DENSE = SMALL.replace("--batch-size 4", "--batch-size 1")
TASKS = [  # of vimcore train
    f"--task segment --data scenes --out new {DENSE} --head linear --val-fraction 0.4 --resize 8 16",
    f"--task detect --data coco.json --images pictures/a --out new {DENSE} --val-fraction 0.4 --resize 8 8 "
    "--head-channels 4 --head-box-width 8 --head-scales 1 --head-anchors 8",
    f"--task pretrain --data pictures --out new {SMALL} --objective mim --val-fraction 0.4",
    f"--task clip --data captions.csv --out new {SMALL} --text-width 4 --text-heads 1 --val-fraction 0.4",
]
# Lines that work, of which the bad ones are made. demo, doctor and export take long: only bad ones are run.
# No line downloads: no value is a name that is known.
WORKING = {
    "vimcore": {
        "demo": "--out new --epochs 1",
        "train": TRAIN,
        "eval": "run --data pictures --workers 0 --threads 1 --batch-size 4",
        "predict": "--weights good.safetensors --json pictures",
        "features": "--weights good.safetensors --out new.npz --json pictures",
        "export": "--weights good.safetensors --onnx new.onnx --json",
        "download": "resnet50 --out new.safetensors --json",
        "search": "pictures/a/0.png pictures --weights good.safetensors --no-cache --json",
        "convert": "good.safetensors new.safetensors --json",
        "info": "good.safetensors --json",
        "bench": "--sizes 32 --batch 1 --pairs 1 --sample 0 --pause 0 --seconds 0 --threads 1 --peers=",
        "plot": "run --out new --json",
        "explain": "--weights good.safetensors --what norms,saliency --out new --json pictures",
        "health": "--weights good.safetensors --count 1",
        "plan": "--batch 1 --device cpu --json",
        "doctor": "",
    },
    "vim-infer": {
        "predict": "--weights good.safetensors --json pictures",
        "segment": "--weights dense.safetensors --out new --json pictures",
        "features": "--weights good.safetensors --out new.safetensors --json pictures",
        "info": "--weights good.safetensors --json",
        "bench": "--weights good.safetensors --batches 1 --seconds 0 --json",
    },
}
SURELY_BAD = {
    "demo": ["--epochs=0", "--frobnicate", "--seed=x", "stray"],
    "doctor": ["--frobnicate", "stray"],
    "export": ["--frobnicate", "stray", "--img-size=0"],
}
# What makes a legal line long, or its network large: only small values, and never left to the default.
LONG = set(
    """--epochs --workers --pairs --seconds --sample --pause --sizes --batch --batches --repeats --embed-dim
    --depth --img-size --patch-size --stride --size --peers --accumulate --in-chans --scenes --head-channels
    --updates --text-width --text-layers --text-heads --text-context --space-dim --resize""".split()  # noqa: SIM905
)
# Read to their end, pipes too: what nobody writes to, or never ends, is waited for as it should be.
TEXT_FILES = {"--list", "--labels", "--config"}
ENDLESS = {"odd/fifo.png", "zero"}
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


def options_of(program: str, command: str, binary: str) -> list[str]:
    """The long options of a command."""
    if program == "vim-infer":
        done = subprocess.run([binary, command, "--help"], capture_output=True, text=True, check=True)
        return re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)
    from vimcore import cli

    return [
        o
        for o in cli._parser(command, [command])[1]._option_string_actions
        if o.startswith("--") and o != "--help"
    ]


class Maker:
    """Makes line N of a seed."""

    def __init__(self, seed: int, program: str, paths: list[str], binary: str) -> None:
        self.seed, self.program, self.paths = seed, program, paths
        self.options = {name: options_of(program, name, binary) for name in WORKING[program]}

    def line(self, number: int) -> Line:
        rng = random.Random(f"{self.seed} {self.program} {number}")
        command = rng.choice(list(self.options))
        words = WORKING[self.program][command]
        if command == "predict" and rng.random() < 0.3:
            words = words.replace("good", "dense") + " --out new"
        if command == "train" and rng.random() < 0.4:
            words = rng.choice(TASKS)
        groups = self._groups(words.split())
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
            self._worsen(rng, command, groups)
        words = [word for group in groups for word in group]
        for i, word in enumerate(words):
            option, _, value = word.partition("=")
            if (i and words[i - 1] in TEXT_FILES and word in ENDLESS) or (
                option in TEXT_FILES and value in ENDLESS
            ):
                words[i] = "absent"
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
