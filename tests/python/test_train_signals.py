# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C end `vimcore train` also where it waits for images; SIGKILL may come anywhere."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import ONCE, SMALL, folder, log
from vimcore.cli import main
from vimcore.data.classes import Training, Validation
from vimcore.train import signals as stopping
from vimcore.train.signals import Signals, Stuck, signals

pytestmark = pytest.mark.slow

RESUME = "go on with: vimcore train --resume "


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = folder(tmp_path_factory.mktemp("data") / "images")
    flags = ["--epochs", "2", "--val-fraction", "0.3", "--log-every", "1"]
    return ["--data", str(data), *SMALL, *ONCE, *flags]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(["train", *arguments, "--out", str(run)]) == 0
    return run


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "PATIENCE", 0.3)
    monkeypatch.setattr(stopping, "APART", 0.1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # for a loader to end


def stick(patch: pytest.MonkeyPatch, of: type, at: int, marker: Path) -> None:
    """Read number `at`, from 0, of this kind of data set makes the file `marker` and does not end."""
    read, count = of.__getitem__, iter(range(1000))

    def stuck(dataset: Any, key: Any) -> Any:
        if next(count) == at:
            marker.touch()
            time.sleep(60)
        return read(dataset, key)

    patch.setattr(of, "__getitem__", stuck)


def signalling(marker: Path, *numbers: int, apart: float = 0.2) -> threading.Thread:
    """Signals to this process, after the file is there."""

    def send() -> None:
        while not marker.exists():
            time.sleep(0.005)
        for number in numbers:
            time.sleep(apart)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("workers", "numbers", "patience"),
    [
        ("0", [signal.SIGTERM], 0.3),
        ("1", [signal.SIGTERM], 0.3),
        ("0", [signal.SIGINT, signal.SIGINT], 60.0),
    ],
)
def test_a_read_that_does_not_end(
    workers: str,
    numbers: list[int],
    patience: float,
    arguments: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In training, here or in a loader process: one signal and some seconds, or two; resumed bit for bit."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    monkeypatch.setattr(stopping, "PATIENCE", patience)
    with pytest.MonkeyPatch.context() as patch:
        stick(patch, Training, 35, marker)  # of 24 an epoch, 8 an update
        thread = signalling(marker, *numbers)
        begin = time.monotonic()
        capsys.readouterr()
        assert main(["train", *arguments, "--workers", workers, "--out", str(run)]) == 128 + numbers[0]
        assert time.monotonic() - begin < 30
        thread.join()
    error = capsys.readouterr().err.splitlines()[-1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    name = signal.Signals(numbers[0]).name
    assert error == (
        f"vimcore: stopped by {name} after update {step}, while it waited for images that did not come; "
        f"{RESUME}{run}"
    )
    assert 3 <= step <= 4  # a loader process reads ahead
    assert main(["train", "--resume", str(run), "--workers", "0"]) == 0
    assert log(run) == log(uninterrupted)
    for weights in ("last", "last_ema", "best"):
        assert (run / f"{weights}.safetensors").read_bytes() == (
            uninterrupted / f"{weights}.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("at", [5, 30, 52])
def test_a_read_that_does_not_end_in_validation(
    at: int, arguments: list[str], uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw weights, averaged ones, and after the last epoch: the epoch is in the checkpoint."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    with pytest.MonkeyPatch.context() as patch:
        stick(patch, Validation, at, marker)  # of 12 for each
        signalling(marker, signal.SIGTERM)
        assert main(["train", *arguments, "--out", str(run)]) == 128 + signal.SIGTERM
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"vimcore: stopped by SIGTERM while it waited for images that did not come; {RESUME}{run}"
    assert main(["train", "--resume", str(run)]) == 0
    assert log(run) == log(uninterrupted)
    assert (run / "best.safetensors").read_bytes() == (uninterrupted / "best.safetensors").read_bytes()
    assert (run / "eval.npz").exists()


def test_a_set_up_that_does_not_end(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"

    def stuck(*_: object) -> None:
        marker.touch()
        time.sleep(60)

    monkeypatch.setattr("vimcore.tasks.classification.task.training_and_validation", stuck)
    signalling(marker, signal.SIGTERM, apart=0)
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert (
        capsys.readouterr().err == "vimcore: stopped by SIGTERM before the first update; nothing was learnt\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_read_that_takes_a_while_is_waited_for(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while it waits, and again at once, as torchrun tells it; then the update is made."""
    marker, get = tmp_path / "marker", Training.__getitem__

    def slow(dataset: Training, key: Any) -> Any:
        if not marker.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            marker.touch()
            time.sleep(0.1)
        return get(dataset, key)

    monkeypatch.setattr(Training, "__getitem__", slow)
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert re.search(rf"stopped by SIGTERM after update 1; {RESUME}", capsys.readouterr().err)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_signals_while_it_computes() -> None:
    """Noted; a second Ctrl-C ends even that; handlers are put back."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with signals() as found:
        found.setting_up = False
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.15)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (found.number, signal.getitimer(signal.ITIMER_REAL)) == (signal.SIGTERM, (0.0, 0.0))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stuck):
            next(found.waited(forever()))
        assert not found.waiting
        found.end()
        os.kill(os.getpid(), signal.SIGTERM)  # while the checkpoint is written
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == before


def forever() -> Iterator[int]:
    time.sleep(60)
    yield 1


def test_the_values_come_through() -> None:
    assert list(Signals().waited(iter("abc"))) == ["a", "b", "c"]


def test_killed_at_any_moment(uninterrupted: Path, arguments: list[str], tmp_path: Path) -> None:
    """SIGKILL again and again, a checkpoint after each update: resumed to the end, not a bit differs."""

    def same(run: Path) -> None:
        assert log(run) == log(uninterrupted)
        for name in ("last.safetensors", "last_ema.safetensors", "best.safetensors"):
            assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name
        assert not list(run.glob(".*.tmp"))

    draw, killed, longest, runs = random.Random(1), 0, 0.4, 0
    for _ in range(100):
        run = tmp_path / f"run{runs}"
        begun = (run / "checkpoint.pt").exists()
        start = [*arguments, "--checkpoint-every", "1", "--out", str(run)]
        child = os.fork()
        if child == 0:
            try:
                os._exit(main(["train", *(["--resume", str(run)] if begun else start)]))
            finally:
                os._exit(1)  # whatever happens, here are no further tests
        time.sleep(draw.uniform(0.02, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == signal.SIGKILL:
            killed += begun
            longest *= 1 if begun else 1.3  # on a busy machine the first checkpoint takes a while
        else:  # it came to its end first: another one, in which there is less time
            assert status == 0
            same(run)
            runs, longest = runs + 1, max(longest / 1.3, 0.05)
        if killed == 6:
            break
    assert killed == 6
    assert main(["train", "--resume", str(run)]) == 0
    same(run)
