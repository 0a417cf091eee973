# SPDX-License-Identifier: Apache-2.0
"""`vimcore train --track`: the numbers of log.jsonl go to trackers; a missing one is told before training."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from train_helpers import ONCE, SMALL, folder, log, stopped
from vimcore.cli import main
from vimcore.train.track import chosen, open_trackers


class _Tracker:
    """As accelerate's; its class is found under the name "mine"."""

    requires_logging_directory = True
    made: ClassVar[list[_Tracker]] = []

    def __init__(self, name: str, logging_dir: str) -> None:
        self.name, self.folder = name, logging_dir
        self.calls: list[Any] = []
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, (bool, int, float, str)) for value in values.values())
        self.config = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, with one tracker that is installed and one that is not."""
    names = ("accelerate", "accelerate.tracking", "accelerate.state")
    package, tracking, state = (types.ModuleType(name) for name in names)
    package.__spec__ = importlib.machinery.ModuleSpec("accelerate", None)
    tracking.LOGGER_TYPE_TO_CLASS = {"mine": _Tracker, "wandb": _Tracker}  # type: ignore[attr-defined]
    tracking.get_available_trackers = lambda: ["mine"]  # type: ignore[attr-defined]
    state.PartialState = lambda: None  # type: ignore[attr-defined]
    for name, module in zip(names, (package, tracking, state)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_Tracker, "made", [])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = folder(tmp_path_factory.mktemp("data") / "images")
    flags = ["--epochs", "2", "--val-fraction", "0.3", "--log-every", "1"]
    return ["--data", str(data), *SMALL, *ONCE, *flags]


@pytest.mark.slow
@pytest.mark.usefixtures("accelerate")
def test_numbers_reach_a_tracker(arguments: list[str], tmp_path: Path) -> None:
    """Those of the log by their names and steps, of a resumed run from where it goes on."""
    run = stopped(tmp_path / "run", 4, *arguments, "--track", "mine")
    assert main(["train", "--resume", str(run)]) == 0
    first, second = _Tracker.made
    assert (first.name, first.folder, second.folder) == ("run", str(run), str(run))
    assert first.config["embed_dim"] == 16
    assert first.config["img_size"] == "(16,)"
    assert first.calls[-1] == second.calls[-1] == "finished"
    calls = [call for tracker in (first, second) for call in tracker.calls if call != "finished"]
    lines = [line for line in log(run) if line["kind"] in ("step", "eval")]
    assert len(calls) == len(lines)
    for (step, values), line in zip(calls, lines):
        group = "step" if line["kind"] == "step" else f"eval/{line['weights']}"
        assert step == line["step"]
        for name in {*line} - {"kind", "step", "epoch", "weights"}:
            assert values[f"{group}/{name}"] == line[name]


@pytest.mark.slow
@pytest.mark.usefixtures("accelerate")
def test_another_tracker_changes_no_run(arguments: list[str], tmp_path: Path) -> None:
    run = stopped(tmp_path / "run", 4, *arguments, "--track", "none")
    assert _Tracker.made == []
    assert main(["train", "--resume", str(run), "--track", "mine"]) == 0
    assert [step for step, _ in _Tracker.made[0].calls[:-1]] == [5, 6, 6, 6]


class _Kept:
    """As accelerate's of wandb and mlflow, which know runs by names."""

    requires_logging_directory = False
    made: ClassVar[list[tuple[str, dict[str, str]]]] = []
    gone = False

    def __init__(self, project: str, **options: str) -> None:
        self.options = options

    def start(self) -> None:
        if self.gone and self.options:
            raise LookupError("no such run")
        name = self.options.get("id") or self.options.get("run_id") or f"run-{len(self.made)}"
        self.made.append((name, self.options))
        self.tracker = types.SimpleNamespace(id=name, info=types.SimpleNamespace(run_id=name))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert not self.options  # which a run that goes on has

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.usefixtures("accelerate")
def test_a_resumed_run_goes_on_in_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking as tracking

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict.fromkeys(("wandb", "mlflow"), _Kept))
    monkeypatch.setattr(_Kept, "made", [])
    names = ["wandb", "mlflow"]
    open_trackers(names, tmp_path, {"lr": 1}, 0)
    open_trackers(names, tmp_path, {"lr": 1}, 5)
    assert _Kept.made[2:] == [
        ("run-0", {"id": "run-0", "resume": "allow"}),
        ("run-1", {"run_id": "run-1"}),
    ]
    open_trackers(["mlflow"], tmp_path, {}, 0)  # begun anew before its first checkpoint
    assert _Kept.made[4:] == [("run-4", {})]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "run-0", "mlflow": "run-4"}
    monkeypatch.setattr(_Kept, "gone", True)
    with pytest.raises(RuntimeError, match=r"mlflow: no such run; without .*trackers\.json a new run"):
        open_trackers(["mlflow"], tmp_path, {}, 5)
    for damaged in ("{", "[1]", '{"mlflow": 3}'):
        (tmp_path / "trackers.json").write_text(damaged)
        open_trackers(["mlflow"], tmp_path, {}, 5)


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "track: the package of wandb is not installed: pip install wandb"),
        ("wandn", "track: expected none or some of mine, wandb, got 'wandn'"),
        ("tensorboard", "track: tensorboard is not installed; install it with: pip install '.[track]'"),
    ],
)
def test_a_missing_package_is_told_first(
    name: str,
    message: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", *arguments, "--track", name, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ValueError, match=r"track: mlflow needs accelerate; install it with: pip install '\.\[track\]'"
    ):
        chosen(["mlflow"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert chosen(None) == chosen(["none"]) == []
