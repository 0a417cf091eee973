# SPDX-License-Identifier: Apache-2.0
"""`vimcore train` among damaged files, full disks, leftovers and other processes: one line that says what."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import ONCE, SMALL, folder, log, stopped
from vimcore.cli import main
from vimcore.tasks.settings import Settings, read_toml
from vimcore.train.lock import Lock, remove_leftovers
from vimcore.train.restore import _Checker, check
from vimcore.utils import files
from vimcore.utils.files import atomic, named

Content = dict[str, Any]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = folder(tmp_path_factory.mktemp("data") / "images")
    flags = ["--epochs", "2", "--val-fraction", "0.3", "--log-every", "1", "--augment", "none"]
    return ["--data", str(data), *SMALL, *ONCE, *flags]


@pytest.fixture(scope="module")
def template(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 updates that was stopped after 4, in its second epoch; not to be changed."""
    return stopped(tmp_path_factory.mktemp("template") / "run", 4, *arguments)


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def bytes_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name != Lock.NAME}


def refusal(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a resume says that fails and leaves the run as it is."""
    before = bytes_of(run)
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("vimcore: ")
    assert bytes_of(run) == before
    return error.removeprefix("vimcore: ")


# ---- checkpoints -------------------------------------------------------------------------------------------


def moments(content: Content) -> Content:
    return content["optimizer"]["state"][3]


def poison(tensor: torch.Tensor, value: float = float("nan")) -> None:
    tensor.flatten()[0] = value


CHANGES: list[tuple[Callable[[Content], object], str]] = [
    (lambda c: c.update(epoch=-5), "epoch: expected a whole number from 0 to 2, got -5"),
    (lambda c: c.update(epoch=1.0), "epoch: expected a whole number from 0 to 2, got 1.0"),
    (lambda c: c.update(epoch=True), "epoch: expected a whole number from 0 to 2, got True"),
    (lambda c: c.update(done=10**9), "done: expected a whole number from 0 to 3, got 1000000000"),
    (lambda c: c.update(epoch=2), "done: expected a whole number from 0 to 0, got 1"),
    (lambda c: c.update(step=10**12), "step: expected a whole number from 0 to 6, got 1000000000000"),
    (lambda c: c.update(step=5), "step: expected 4, of epoch 1 and 1 updates of 3, got 5"),
    (lambda c: c.update(step=None), "step: expected a whole number from 0 to 6, got None"),
    (lambda c: c.pop("done"), "checkpoint: missing: 'done'"),
    (lambda c: c.update(more=1), "checkpoint: not expected: 'more'"),
    (lambda c: c.update(identity=[]), "identity: expected a dictionary, got []"),
    (lambda c: c["identity"].pop("images"), "identity: missing: 'images'"),
    (lambda c: c["identity"].update(per_update="8"), "identity.per_update: expected int, got '8'"),
    (lambda c: c.update(model=3), "model: expected a dictionary, got 3"),
    (lambda c: c["model"].pop("head.bias"), "model: missing: 'head.bias'"),
    (
        lambda c: c["model"].update({"head.bias": torch.zeros(4)}),
        "head.bias: expected float32 (3,), got float32 (4,)",
    ),
    (
        lambda c: c["model"].update({"head.bias": [0, 0, 0]}),
        "head.bias: expected float32 (3,), got [0, 0, 0]",
    ),
    (lambda c: c["model"].update({"head.bias": c["model"]["head.bias"].double()}), "got float64 (3,)"),
    (lambda c: c["model"].update({"head.bias": torch.zeros(3).to_sparse()}), "expected float32 (3,)"),
    (
        lambda c: poison(c["model"]["pos_embed"]),
        "model.pos_embed: expected finite numbers, got 1 that are not",
    ),
    (lambda c: c["average"].pop(), "average: expected a list of"),
    (lambda c: c.update(average=None), "average: expected averaged weights (ema is not 0), got None"),
    (lambda c: poison(c["average"][2], float("inf")), "average.2: expected finite numbers"),
    (
        lambda c: c["optimizer"]["param_groups"][0].update(lr=float("nan")),
        "param_groups[0].lr: expected a finite",
    ),
    (
        lambda c: c["optimizer"]["param_groups"][1].update(lr=-1.0),
        "param_groups[1].lr: expected a finite number",
    ),
    (lambda c: c["optimizer"]["param_groups"][0].update(maximize=True), "maximize: expected False, got True"),
    (
        lambda c: c["optimizer"]["param_groups"][0].update(weight_decay=9.0),
        "weight_decay: expected 0.1, got 9.0",
    ),
    (
        lambda c: c["optimizer"]["param_groups"][0]["params"].reverse(),
        "param_groups[0].params: expected [0, 1",
    ),
    (
        lambda c: c["optimizer"]["param_groups"].pop(),
        "optimizer.param_groups: expected a list of 2, got one of 1",
    ),
    (
        lambda c: c["optimizer"].update(state={}),
        "optimizer.state: missing: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and",
    ),
    (lambda c: c["optimizer"]["state"].update({99: {}}), "optimizer.state: not expected: 99"),
    (lambda c: moments(c).pop("exp_avg"), "optimizer.state[3]: missing: 'exp_avg'"),
    (lambda c: moments(c).update(exp_avg=torch.zeros(1)), "state[3].exp_avg: expected float32"),
    (lambda c: poison(moments(c)["exp_avg_sq"], -1.0), "exp_avg_sq: expected no value below 0, got -1"),
    (lambda c: moments(c)["step"].fill_(1e9), "optimizer.state[3].step: expected 4, got 1000000000.0"),
    (lambda c: c.update(scaler={"scale": float("nan")}), "scaler: not expected: 'scale'"),
    (lambda c: c.update(best=None), "best: expected a dictionary, got None"),
    (lambda c: c["best"].update(top1=float("nan")), "best.top1: expected a finite number, 0 to 1, got nan"),
    (lambda c: c["best"].update(epoch=7), "best.epoch: expected a whole number from 1 to 1, got 7"),
    (lambda c: c["best"].update(weights="none"), "best.weights: expected raw or ema, got 'none'"),
]


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr("vimcore.train.state.check", lambda *given: seen.extend(copy.deepcopy(given)))
        assert main(["train", "--resume", str(run)]) == 0
    path, saved, expected = seen
    assert path == run / "checkpoint.pt"
    check(path, saved, expected)
    older = copy.deepcopy(saved)
    for group in older["optimizer"]["param_groups"]:
        group.pop("foreach")  # as if torch had this option since
    check(path, older, expected)
    older["optimizer"]["param_groups"][0].pop("betas")
    with pytest.raises(ValueError, match="missing: 'betas'"):
        check(path, older, expected)
    for change, message in CHANGES:
        content = copy.deepcopy(saved)
        change(content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            check(path, content, expected)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value)) < 400


@pytest.mark.slow
def test_nothing_of_such_a_checkpoint_is_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoint.pt"
    original = torch.load(path, weights_only=True)
    not_ours = "not a checkpoint that this version of vimcore can continue"
    for content, message in (
        ({**original, "epoch": -5}, "epoch: expected a whole number from 0 to 2, got -5"),
        ({**original, "average": original["average"][:3]}, "average: expected a list of 41, got one of 3"),
        ({**original, "model": original["model"]["head.bias"].to_sparse()}, "model: expected a dictionary"),
        ({**original, "format": 2}, not_ours),
        ([], not_ours),
        (torch.zeros(2), not_ours),
    ):
        torch.save(content, path)
        assert refusal(run, capsys).startswith(f"{path}: {message}")
    torch.save(original, path)
    (run / "best.safetensors").unlink()
    assert refusal(run, capsys).startswith(f"{run / 'best.safetensors'}: not there")
    path.unlink()
    assert "no checkpoint.pt yet; start the run again with --out" in refusal(run, capsys)


def test_a_scaler_that_does_not_fit() -> None:
    """Of float16, which needs a GPU."""
    own = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    look = _Checker(Path("x"))._scaler
    look({**own, "scale": 0.5, "_growth_tracker": 7}, own)
    for name, value in (
        ("scale", 0.0),
        ("scale", float("inf")),
        ("growth_factor", 3.0),
        ("_growth_tracker", -1),
    ):
        with pytest.raises(ValueError, match=f"^x: scaler.{name}: expected "):
            look({**own, name: value}, own)


# ---- logs --------------------------------------------------------------------------------------------------

STEP = {"kind": "step", "step": 1, "epoch": 0.5, "loss": 1.0, "lr": 0.1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "no entry of a log: expected an object, got [1]"),
        ("hello", "no entry of a log: Expecting value"),
        ("[" * 10000, "no entry of a log: "),
        ("{}", "kind: expected one of start, longer, step, eval, fault, got null"),
        (json.dumps({**STEP, "kind": ["step"]}), "kind: expected one of"),
        (json.dumps({"kind": "step"}), "step: expected a whole number, 1 or more, but it is not there"),
        (json.dumps({**STEP, "step": -3}), "step: expected a whole number, 1 or more, got -3"),
        (json.dumps({**STEP, "step": 1.5}), "step: expected a whole number"),
        (json.dumps({**STEP, "step": 10**30}), "step: expected a whole number"),
        (json.dumps({**STEP, "lr": float("nan")}), "lr: expected a finite number, 0 or more, got NaN"),
        (json.dumps({**STEP, "loss": "low"}), 'loss: expected a number or null, got "low"'),
        (json.dumps({**STEP, "grad_norm": 10**400}), "grad_norm: expected a number or null"),
        (
            json.dumps({**STEP, "kind": "eval", "top1": 2, "top5": 1, "weights": "raw"}),
            "top1: expected a number from",
        ),
        (json.dumps({"kind": "fault", "file": 3, "error": ""}), "file: expected text, got 3"),
    ],
)
def test_logs_that_do_not_fit(line: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle; what a crash cut off at the end is left out, see test_killed_and_resumed."""
    path = run / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line.encode() + b"\n", *lines[2:]]))
    error = refusal(run, capsys)
    assert error.startswith(f"{path}, line 3: {message}")
    assert len(error) < 400


def test_a_log_that_is_gone(run: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "log.jsonl").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert (
        f"vimcore: {run / 'log.jsonl'}: not there; a new one begins after update 4" in capsys.readouterr().err
    )
    assert [line["step"] for line in log(run) if line["kind"] == "step"] == [5, 6]


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "x=1"], "set: x: VisionMamba has no such argument; it has average_directions, "),
        (["--set", "d_stat=1"], "set: d_stat: VisionMamba has no such argument; it has d_state"),
        (["--set", "self=1"], "set: self: VisionMamba has no such argument"),
        (["--set", "memory=3"], "set: memory: has a setting of its own, --memory"),
        (["--set", "depth=3"], "set: depth: has a setting of its own, --depth"),
        (["--set", "num_classes=3"], "set: num_classes: follows from the data"),
        (["--set", "norm=rms", "norm=layer"], "set: norm: given twice"),
        (["--set", "norm=[1]"], "norm: expected a string, got an array"),
        (
            ["--set", "layer_scale=NaN"],
            "set: layer_scale: expected a finite number that 64 bits hold, got nan",
        ),
        (["--threads", "100000"], "threads: expected 1 to 1024, got 100000"),
        (["--workers", "1000000"], "workers: expected 0 to 1024, got 1000000"),
        (["--lr", "inf"], "lr: expected a finite number, got inf"),
        (["--mean", "nan"], "mean: expected a finite number, got nan"),
        (["--data", "x\udcff"], r"data: expected text in UTF-8, got x\xff"),
    ],
)
def test_wrong_flags(
    flags: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, *flags, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert (error.count("\n"), error[:9]) == (1, "vimcore: ")
    assert not (tmp_path / "run").exists()


def test_settings_of_a_run_that_do_not_fit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "config.toml"
    original = path.read_text()
    for old, new, message in (
        ("lr = 0.0005 ", "# lr ", "not there, though the run began with them: lr"),
        ("lr = 0.0005 ", "lr = nan ", "lr: expected more than 0, got nan"),
        ("epochs = 2 ", "epochs = 1.5 ", "epochs: expected int, got 1.5"),
        ("epochs = 2 ", "epoch = 2 ", "epoch: there is no such setting; close to it: epochs"),
        ("[data]", "[date]", "[date]: expected one of the sections model"),
        ("[data]", "[data", "not a TOML file"),
    ):
        assert original.count(f"\n{old}") == 1
        path.write_text(original.replace(f"\n{old}", f"\n{new}"))
        assert refusal(run, capsys).startswith(f"{path}: {message}")


def test_settings_of_any_text(tmp_path: Path) -> None:
    for text in ("".join(map(chr, range(1, 0x300))), "\x7f", 'a\\"\n\t', "\U0001f600\ufeff\u2028"):
        settings = Settings(data=text, set=(text,))
        (tmp_path / "config.toml").write_bytes(settings.to_toml().encode())
        assert Settings().merged(read_toml(str(tmp_path / "config.toml"))) == settings


@pytest.mark.slow
def test_a_folder_of_odd_name_is_resumed(arguments: list[str], tmp_path: Path) -> None:
    data = Path(shutil.copytree(arguments[1], tmp_path / "a\x7fb\nc\x01"))
    run = stopped(tmp_path / "run", 2, "--data", str(data), *arguments[2:])
    assert main(["train", "--resume", str(run)]) == 0


# ---- other processes ---------------------------------------------------------------------------------------


@pytest.fixture
def holder(run: Path) -> Iterator[int]:
    """The number of a process that writes the run, and has one of its own that loads images."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            Lock(run).take()
            child = os.fork()
            if child:
                os.write(writer, str(child).encode())
            time.sleep(60)
        finally:
            os._exit(0)  # whatever happens, here are no further tests
    os.close(writer)
    child = int(os.read(reader, 20))
    yield number
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    with contextlib.suppress(ChildProcessError):  # a test that passed has waited for it
        if os.waitpid(number, os.WNOHANG)[0] == 0:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)


@pytest.mark.slow
def test_two_runs_in_one_folder(
    run: Path, holder: int, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, a new one and a resumed one; when the first was killed, it is not."""
    message = (
        f"{run}: process {holder} on {os.uname().nodename} is writing this run; wait until it ends, stop it, "
    )
    assert refusal(run, capsys).startswith(message)
    assert main(["train", *arguments, "--out", str(run)]) == 1
    assert message in capsys.readouterr().err
    (run / "checkpoint.pt").rename(run / "kept")
    assert main(["train", *arguments, "--out", str(run)]) == 1  # as when neither had a checkpoint yet
    assert message in capsys.readouterr().err
    (run / "kept").rename(run / "checkpoint.pt")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert main(["train", "--resume", str(run)]) == 0
    Lock(run).take()


def test_a_file_system_without_locks(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert main(["train", "--resume", str(run)]) == 0
    assert f"vimcore: {run / '.lock'}: No locks available: take care that no other" in capsys.readouterr().err


def test_leftovers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a killed process left is removed, what a living one or a user wrote is not."""
    alive, dead = os.getppid(), 2**22 + 1  # more than Linux has
    gone = [f".checkpoint.pt.{dead}.tmp", f".checkpoint.pt.{alive}.tmp", f".vimcore-{dead}-0.tmp"]
    gone += [f".eval.npz.{dead}.tmp", f".log.jsonl.{os.getpid()}.tmp", f".x.{10**30}.tmp"]
    stay = [f".eval.npz.{alive}.tmp", f".vimcore-{alive}-3.tmp", "checkpoint.tmp", "x.5.tmp", ".x.tmp"]
    for name in gone + stay:
        (run / name).write_bytes(b"half")
    assert main(["train", "--resume", str(run)]) == 0
    told = f"vimcore: removed half-written files of a killed process: {', '.join(sorted(gone))}\n"
    assert told in capsys.readouterr().err
    names = {path.name for path in run.iterdir()}
    assert names & set(gone) == set()
    assert set(stay) <= names
    assert remove_leftovers(run, ()) == []


# ---- full disks --------------------------------------------------------------------------------------------


class Full(files._Remembering):
    """A file that can be made, not filled."""

    def __init__(self, path: Path) -> None:
        path.touch()
        super().__init__(Path("/dev/full"))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_Remembering", Full)


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, file: file.write(x.numpy().tobytes()), lambda x, f: np.savez(f, x=x)]
)
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_disk_names_the_file(
    write: Callable[[torch.Tensor, Any], object], size: int, tmp_path: Path, full: None
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device") as caught, atomic(path) as file:
        write(torch.ones(size), file)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_full_disk_ends_a_run(run: Path, full: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = bytes_of(run)
    assert main(["train", "--resume", str(run)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"vimcore: {run}/[a-z.]+: No space left on device\n", error.splitlines(True)[-1])
    assert bytes_of(run) == before


def test_a_closed_stderr(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that is meant for it lands on stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["train", "--resume", str(run), "--json"]) == 0
    (summary,) = capsys.readouterr().out.splitlines()
    assert json.loads(summary)["updates"] == 6


def test_errors_that_are_not_the_disk_s(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), atomic(tmp_path / "x"):
        raise KeyError("mine")
    with pytest.raises(OSError, match="other") as caught, named("x"):
        raise OSError(errno.EIO, "other", "its own")
    assert caught.value.filename == "its own"
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power cut leaves the old file or the new one; and the name before `atomic` is left."""
    steps: list[tuple[str, str, bytes]] = []
    fsync, replace = os.fsync, os.replace

    def flushing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append(("flush", str(path), path.read_bytes() if path.is_file() else b""))
        fsync(descriptor)

    def replacing(old: Path, new: Path) -> None:
        steps.append(("replace", str(old), new.read_bytes()))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", replacing)
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with atomic(path) as file:
        file.write(b"new")
    temporary = steps[0][1]
    assert temporary != str(path)
    assert steps == [
        ("flush", temporary, b"new"),
        ("replace", temporary, b"old"),
        ("flush", str(tmp_path), b""),
    ]
    assert path.read_bytes() == b"new"
