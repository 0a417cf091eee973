# SPDX-License-Identifier: Apache-2.0
"""What .ci/lanes.py repeats: a check is left out where its inputs are those that passed, for ten changes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lanes", ROOT / ".ci" / "lanes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lanes"] = module
    spec.loader.exec_module(module)
    return module


def git(folder: Path, *arguments: str) -> None:
    names = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, env={**os.environ, **names}
    )


def change(folder: Path, times: int = 1) -> None:
    for _ in range(times):
        git(folder, "commit", "--allow-empty", "-m", "a change")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path]:
    """A repository with one check, which passes unless there is a file `fail`, and adds a line to `ran`."""
    lanes, root = load(), tmp_path / "tree"
    (root / "part").mkdir(parents=True)
    (root / "part" / "input").write_text("one")
    (root / "other").write_text("one")
    (root / ".gitignore").write_text("ran\nfail\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    change(root)
    monkeypatch.setattr(lanes, "ROOT", root)
    lane = lanes.Lane(
        "a check", ("part",), ("echo >>ran", "[ ! -e fail ]", "[ ! -e spoil ] || echo >>part/input")
    )
    monkeypatch.setattr(lanes, "LANES", {"check": lane})
    return lanes, root


def runs(root: Path) -> int:
    return len((root / "ran").read_text().splitlines()) if (root / "ran").exists() else 0


def test_it_is_repeated_when_an_input_changed(tree: tuple[ModuleType, Path]) -> None:
    lanes, root = tree
    assert "nobody recorded" in lanes.due("check")
    assert lanes.main(["run", "check"]) == 0
    assert lanes.main(["run", "check"]) == 0
    assert (runs(root), lanes.due("check")) == (1, "")
    (root / "other").write_text("two")
    change(root)
    assert lanes.due("check") == ""
    for name, text in (("input", "two"), ("input", None), ("new", "")):
        path = root / "part" / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        assert lanes.due("check") == "an input changed"
        assert lanes.main(["run", "check"]) == 0
        assert lanes.due("check") == ""
    (root / "part" / "new").chmod(0o755)
    assert lanes.due("check") == "an input changed"
    assert runs(root) == 4


def test_it_is_repeated_at_every_tenth_change(tree: tuple[ModuleType, Path]) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    change(root, 9)
    assert lanes.due("check") == ""
    change(root)
    assert lanes.due("check") == "change 10 since it ran"
    assert lanes.main(["run", "check"]) == 0
    assert (runs(root), lanes.due("check")) == (2, "")
    git(root, "reset", "-q", "--hard", "HEAD~3")
    assert lanes.due("check") == "the history is another one"


def test_a_merge_is_one_change(tree: tuple[ModuleType, Path]) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    git(root, "checkout", "-q", "-b", "side")
    change(root, 12)
    git(root, "checkout", "-q", "-")
    git(root, "merge", "--no-ff", "-m", "a merge", "side")
    assert lanes.due("check") == ""


def test_other_tools_are_other_inputs(tree: tuple[ModuleType, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, root = tree
    monkeypatch.setenv("CXX", str(root / "compiler"))
    for version in ("12.2.0", "13.1.0"):
        (root / "compiler").write_text(f"#!/bin/sh\necho 'compiler {version}'\n")
        (root / "compiler").chmod(0o755)
        assert lanes.due("check") != ""
        lanes.main(["run", "check"])
        assert lanes.due("check") == ""
    monkeypatch.setattr(lanes, "distribution", lambda: "another one")
    assert lanes.due("check") == "an input changed"


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"inputs": "x"}', '{"inputs": 1, "change": "?"}', "\0"])
def test_a_damaged_record_counts_for_nothing(tree: tuple[ModuleType, Path], record: str) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    (root / ".ci" / "passed" / "check.json").write_text(record)
    assert lanes.due("check") == "its record is damaged"


def test_a_record_of_other_inputs_or_of_the_future_counts_for_nothing(tree: tuple[ModuleType, Path]) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    path = root / ".ci" / "passed" / "check.json"
    right = json.loads(path.read_text())
    for key, value, why in (
        ("inputs", "0" * 64, "an input changed"),
        ("change", right["change"] + 1, "the history is another one"),
    ):
        path.write_text(json.dumps({**right, key: value}))
        assert lanes.due("check") == why


def test_only_what_passed_is_recorded(
    tree: tuple[ModuleType, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    lanes, root = tree
    (root / "fail").touch()
    assert lanes.main(["run", "check"]) == 1
    assert not (root / ".ci").exists()
    (root / "fail").unlink()
    (root / "spoil").touch()
    assert lanes.main(["run", "check"]) == 0
    assert "not recorded: an input changed while it ran" in capfd.readouterr().out
    assert not (root / ".ci").exists()


def test_forced(tree: tuple[ModuleType, Path]) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    assert lanes.main(["run", "--force", "check"]) == 0
    assert runs(root) == 2
    with pytest.raises(SystemExit):
        lanes.main(["run", "absent"])


def test_without_the_whole_history_it_runs(tree: tuple[ModuleType, Path], tmp_path: Path) -> None:
    lanes, root = tree
    lanes.main(["run", "check"])
    git(root, "add", ".")
    change(root)
    for folder, options in (("whole", []), ("shallow", ["--depth", "1"])):
        git(tmp_path, "clone", "-q", *options, f"file://{root}", folder)
        lanes.ROOT = tmp_path / folder
        assert (lanes.due("check") == "") == (folder == "whole")
    plain = tmp_path / "plain"
    (root / ".git").rename(tmp_path / "gone")
    root.rename(plain)
    lanes.ROOT = plain
    assert lanes.due("check") == "the history cannot be counted here"
    assert lanes.main(["run", "check"]) == 0
    assert runs(plain) == 2


def test_the_checks_of_this_tree() -> None:
    """Whatever a command names is an input, as are lanes.py itself and the records' names."""
    lanes = load()
    for name, lane in lanes.LANES.items():
        assert all((ROOT / path).exists() for path in lane.inputs), name
        scripts = re.findall(r"(?:tests|\.ci)/[\w./]+\.(?:sh|py)", " ".join(lane.commands))
        assert scripts
        for script in [*scripts, ".ci/lanes.py"]:
            assert any(script == path or script.startswith(path + "/") for path in lane.inputs), (
                name,
                script,
            )
    assert {path.stem for path in (ROOT / ".ci" / "passed").glob("*")} <= set(lanes.LANES)
