# SPDX-License-Identifier: Apache-2.0
"""A short run of tests/fuzz/commands.py, and that it sees what it is there for."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
from vim_infer import BINARY
from vimcore.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
import commands
import hostile


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> commands.Sandbox:
    commands.imported()
    return commands.Sandbox(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize(("program", "count"), [("vimcore", 40), ("vim-infer", 100)])
def test_bad_lines(
    sandbox: commands.Sandbox, program: str, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """No traceback, no signal, status 0, 1 or 2, and a line that says why."""
    args = argparse.Namespace(seed=0, count=count, seconds=60, line=None)
    maker = commands.Maker(args.seed, program, sandbox.paths, BINARY)
    bad = commands.attack(maker, sandbox, BINARY, args)
    out = capfd.readouterr().out
    assert bad == 0, out
    assert f"{program}: {count} lines" in out


READERS = {
    "info": "{} --json",
    "predict": "--weights {} --json pictures/b",
    "plan": "--weights {} --device cpu --batch 1 --json",
    "health": "--weights {} --count 1 --json pictures/b",
    "eval": "{} --data pictures --workers 0 --threads 1 --json",
    "convert": "{} new.safetensors --json",
    "explain": "--weights {} --what norms --out new --json pictures/b",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", READERS)
def test_every_bad_file_of_weights(
    sandbox: commands.Sandbox,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read, or refused in a line that names the file; what one command refuses is no surprise to another."""
    monkeypatch.chdir(sandbox.ready())
    files = sorted(name for name in hostile.files() if name.endswith(".safetensors"))
    read = []
    for name in files:
        status = main([command, *READERS[command].format(name).split()])
        out, error = capsys.readouterr()
        said = [text for text in error.splitlines() if text.startswith("vimcore: ")]
        if status == 0:
            read.append(name)
            assert [json.loads(text) for text in out.splitlines()], name
        else:
            assert status == 1, name
            assert said, (name, out)
            # what does not fit the data is said of the classes, or of the pictures
            assert any(re.search(rf"{re.escape(name)}|classes that|pictures[/:]", t) for t in said), (
                name,
                said,
            )
            assert max(map(len, said)) < 4000, name
    assert "good.safetensors" in read
    assert {"config-null.safetensors", "cut.safetensors", "empty.safetensors"}.isdisjoint(read)


def test_the_lines_of_a_seed_are_the_same(sandbox: commands.Sandbox) -> None:
    makers = [commands.Maker(seed, "vimcore", sandbox.paths, BINARY) for seed in (3, 3, 4)]
    lines = [[str(maker.line(number)) for number in range(40)] for maker in makers]
    assert lines[0] == lines[1] != lines[2]
    assert len(set(lines[0])) > 30


@pytest.mark.parametrize(
    ("status", "error", "why"),
    [
        (1, "Traceback (most recent call last):\n  File\nKeyError: 'x'\n", "traceback"),
        (-11, "", "status -11"),
        (None, "", "not over after 30 s"),
        (1, "", "status 1 without a line that says why"),
        (1, "vimcore: " + 9000 * "x" + "\n", "a line of more than 4000 characters"),
        (2, "vimcore predict: error: no\n", "status 2 without a word about the usage"),
        (1, "vimcore: a.png: no such file\n", None),
        (2, "usage: vimcore predict\nvimcore predict: error: no\n", None),
    ],
)
def test_what_is_a_fault(status: int | None, error: str, why: str | None) -> None:
    line = commands.Line(0, "vimcore", ["predict", "--json", "a.png"], "")
    assert commands.fault(line, commands.Ended(status, "", error)) == why


def test_words_between_json_are_a_fault() -> None:
    line = commands.Line(0, "vimcore", ["predict", "--json", "a.png"], "no stderr")
    good, bad = (commands.Ended(0, out, "") for out in ('{"image": "a"}\n', '{"p": NaN}\n'))
    assert commands.fault(line, good) is None
    assert "not JSON" in str(commands.fault(line, bad))


@pytest.mark.parametrize(
    ("streams", "status"),
    [("no stderr", 0), ("full stderr", 0), ("no stdout", 1), ("full stdout", 1), ("left stdout", 1)],
)
def test_training_goes_on(sandbox: commands.Sandbox, streams: str, status: int) -> None:
    """The files are whole; only the summary that could not be printed shows in the status."""
    folder = sandbox.ready()
    ended = commands.run(
        commands.Line(0, "vimcore", ["train", *commands.TRAIN.split(), "--json"], streams), folder, ""
    )
    assert ended.status == status, ended
    entries = [json.loads(line) for line in (folder / "new" / "log.jsonl").read_text().splitlines()]
    assert [entry for entry in entries if entry["kind"] == "eval"]
    assert (folder / "new" / "best.safetensors").exists()
    if status == 0:
        assert json.loads(ended.out)["best"]
    elif streams == "left stdout":
        assert "cannot write" not in ended.error  # its reader wanted to hear no more
    else:
        assert ended.error.splitlines()[-1].startswith("vimcore: cannot write the results: ")
