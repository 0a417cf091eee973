# SPDX-License-Identifier: Apache-2.0
"""`vimcore train` as a run: killed and resumed, on two processes, its files, its curve, its end at nan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from train_helpers import ONCE, SMALL, environment, folder, log
from vimcore import _core
from vimcore.cli import main
from vimcore.train.checkpoint import read_checkpoint
from vimcore.train.loop import Loop

pytestmark = pytest.mark.slow

# Everything that draws at random, and everything that has a state.
WILD = [
    *("--data", "digits", "--img-size", "16", "--patch-size", "8", "--embed-dim", "16", "--depth", "2"),
    *("--epochs", "2", "--batch-size", "16", "--accumulate", "2", "--threads", "1", "--workers", "0"),
    *("--drop-path-rate", "0.2", "--drop-rate", "0.1", "--directions", "sequence", "--class-token", "random"),
    *("--ema", "0.9", "--ema-ramp", "--clip-grad", "1", "--lr", "1e-2", "--no-scale-lr"),
    *("--schedule-steps", "update", "--warmup-epochs", "1", "--log-every", "1", "--checkpoint-every", "7"),
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vimcore", "train", *arguments]


def state(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoint.pt")


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(["train", *WILD, "--out", str(run)]) == 0
    return run


def test_killed_and_resumed(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL between two checkpoints, then SIGTERM, then to the end by other loaders: not a bit differs."""
    run = tmp_path / "run"

    def steps() -> int:
        return (run / "log.jsonl").read_text().count('"step",') if (run / "log.jsonl").exists() else 0

    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen(command(*WILD, "--out", str(run)), **options) as process:
        wait_for(lambda: (run / "checkpoint.pt").exists() and steps() >= 9, process)
        process.kill()
    killed = state(run)["step"]
    assert killed >= 7
    assert not list(run.glob("*.tmp"))
    with subprocess.Popen(command("--resume", str(run)), **options) as process:
        wait_for(lambda: steps() > killed + 2, process)
        process.send_signal(signal.SIGTERM)
        error = process.stderr.read() if process.stderr else ""
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    stopped = state(run)["step"]
    assert killed < stopped < state(uninterrupted)["step"]
    assert f"stopped by SIGTERM after update {stopped}; go on with: vimcore train --resume" in error
    assert main(["train", "--resume", str(run), "--workers", "1"]) == 0
    assert f"continued after update {stopped} of 80" in capsys.readouterr().err
    assert same(state(run), state(uninterrupted))
    assert log(run) == log(uninterrupted)
    for name in ("best.safetensors", "last.safetensors", "last_ema.safetensors"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    first, second = np.load(run / "eval.npz"), np.load(uninterrupted / "eval.npz")
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_files_of_a_run(uninterrupted: Path) -> None:
    lines = log(uninterrupted)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 81))
    assert steps[39]["epoch"] == 1.0
    assert all(np.isfinite([line["loss"], line["lr"], line["grad_norm"]]).all() for line in steps)
    scores = [line for line in lines if line["kind"] == "eval"]
    assert [(line["epoch"], line["weights"]) for line in scores] == [
        (1, "raw"),
        (1, "ema"),
        (2, "raw"),
        (2, "ema"),
    ]
    saved = np.load(uninterrupted / "eval.npz")
    assert saved["probabilities"].dtype == np.float32
    assert saved["probabilities"].shape == (359, 10)
    assert np.allclose(saved["probabilities"].sum(1), 1, atol=1e-5)
    assert np.array_equal(saved["probabilities"].argmax(1), saved["predictions"])
    assert saved["names"].tolist() == [str(digit) for digit in range(10)]
    best = max(line["top1"] for line in scores)
    assert (saved["labels"] == saved["predictions"]).mean() == best
    model = vimcore.VisionMamba.load(uninterrupted / "best.safetensors")
    assert (model.config["directions"], model.config["class_token"]) == ("sequence", "random")


def test_resume_refuses_what_would_be_another_run(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (
            ["--resume", str(uninterrupted), "--lr", "1"],
            "lr (is 0.01, got 1.0): cannot change when a run goes on",
        ),
        (["--resume", str(uninterrupted), "--out", "x"], "--resume: the run has its settings"),
        (["--resume", str(tmp_path / "absent")], "config.toml: No such file"),
        ([*WILD, "--out", str(uninterrupted)], "holds a run; go on with --resume"),
    ):
        assert main(["train", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["train", "--resume", str(uninterrupted)]) == 0  # finished: nothing to do, same files
    run = tmp_path / "damaged"
    run.mkdir()
    (run / "config.toml").write_bytes((uninterrupted / "config.toml").read_bytes())
    content = (uninterrupted / "checkpoint.pt").read_bytes()
    for data in (content[: len(content) // 2], b"", b"hello"):
        (run / "checkpoint.pt").write_bytes(data)
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 1
        assert "not a checkpoint, or damaged" in capsys.readouterr().err


def test_resume_refuses_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = folder(tmp_path / "data"), tmp_path / "run"
    arguments = ["--data", str(data), *SMALL, *ONCE, "--epochs", "1", "--val-fraction", "0.3"]
    assert main(["train", *arguments, "--out", str(run)]) == 0
    (data / "digit 0" / "000.png").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 1
    assert "cannot go on with other images to learn from than the checkpoint's" in capsys.readouterr().err


def test_short_curve(tmp_path: Path) -> None:
    """Losses of the first updates on the digits stay what they were."""
    run = tmp_path / "run"
    flags = [
        "--epochs",
        "1",
        "--batch-size",
        "128",
        "--log-every",
        "1",
        "--lr",
        "4e-3",
        "--warmup-epochs",
        "0",
    ]
    assert main(["train", "--preset", "digits", "--out", str(run), *flags]) == 0
    losses = [line["loss"] for line in log(run) if line["kind"] == "step"]
    assert losses == pytest.approx(CURVE, rel=2e-3)


CURVE = [2.3015, 2.1536, 2.0311, 1.8235, 1.8218, 1.6336, 1.5499, 1.4868, 1.4447, 1.4197, 1.3840]


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """On gloo: same weights, same log, one writer; scores and skipped files are those of both."""
    data = folder(tmp_path / "data", each=30)
    for name in ("digit 0/001.png", "digit 0/002.png", "digit 7/009.png"):
        (data / name).write_bytes(b"")
    common = ["--data", str(data), "--val", str(data), *SMALL, *ONCE, "--augment", "none", "--log-every", "1"]
    common += ["--epochs", "3", "--lr", "2e-3", "--no-scale-lr", "--warmup-epochs", "0", "--ema", "0.9"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *common, "--batch-size", "16", "--out", str(one)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["vimcore", "train", *common, "--batch-size", "8", "--out", str(two), "--json"]
    done = subprocess.run(
        launch + arguments, capture_output=True, text=True, check=False, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, 16 images an update" in done.stderr
    (summary,) = done.stdout.splitlines()  # one process writes
    assert json.loads(summary)["skipped"] == 3
    for name in ("last.safetensors", "last_ema.safetensors"):
        a, b = (_core.read_safetensors(str(run / name))[0] for run in (one, two))
        for key, value in a.items():
            assert np.allclose(b[key], value, rtol=1e-4, atol=2e-6), key
    errors = [{line["file"] for line in log(run) if line["kind"] == "fault"} for run in (one, two)]
    assert errors[0] == errors[1]
    lines = [[line for line in log(run) if line["kind"] in ("step", "eval")] for run in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 3 * 5 + 3 * 2
    for a, b in zip(*lines):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize(("lr", "what"), [("1e6", "the loss is nan in update"), ("1e30", "is")])
def test_a_loss_that_is_not_finite_stops(
    lr: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--lr", lr, "--warmup-epochs", "0", "--schedule", "constant", "--checkpoint-every", "1"]
    assert main(["train", "--preset", "digits", *flags, "--epochs", "1", "--out", str(run)]) == 1
    error = capsys.readouterr().err
    assert what in error
    assert f"the last good checkpoint is {run / 'checkpoint.pt'}" in error
    saved = state(run)
    assert saved["step"] >= 1
    assert all(bool(value.isfinite().all()) for value in saved["model"].values())
    report = (run / "health.txt").read_text()
    assert "not finite: first" in report
    assert report.strip() in error


def test_weights_that_are_not_finite_are_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The very first update breaks a weight, though loss and gradient were finite: nothing is written."""
    update = Loop.update

    def breaking(self: Loop, batches: Any) -> Any:
        result = update(self, batches)
        with torch.no_grad():
            self.parameters[3][0] = torch.inf
        return result

    monkeypatch.setattr(Loop, "update", breaking)
    run = tmp_path / "run"
    assert main(["train", "--preset", "digits", "--checkpoint-every", "1", "--out", str(run)]) == 1
    assert "weight is inf in update 1" in capsys.readouterr().err
    assert not list(run.glob("*.safetensors")) + list(run.glob("*.pt"))


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", each=20)
    flags = [*SMALL, *ONCE, "--val-fraction", "0.2", "--epochs", "2", "--lr", "1e-3", "--warmup-epochs", "0"]
    weights = []
    for batch, accumulate in (("8", "2"), ("16", "1")):
        run = tmp_path / batch
        more = ["--batch-size", batch, "--accumulate", accumulate, "--data", str(data), "--out", str(run)]
        assert main(["train", *flags, *more]) == 0
        weights.append(_core.read_safetensors(str(run / "last.safetensors"))[0])
        assert state(run)["step"] == 6
    for key, value in weights[0].items():
        assert np.allclose(weights[1][key], value, rtol=1e-4, atol=2e-6), key


def test_ctrl_c_stops_after_a_checkpoint(tmp_path: Path) -> None:
    """In this process, whose handlers are put back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run = tmp_path / "run"

    def interrupt() -> None:
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Thread(target=interrupt, daemon=True)
    timer.start()
    assert main(["train", "--preset", "digits", "--epochs", "1000", "--out", str(run)]) == 128 + signal.SIGINT
    timer.join()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert state(run)["step"] >= 1


def test_weights_serve_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was validated is what predict and vim-infer say of the same files; the names come along."""
    from vim_infer import BINARY

    data, run = folder(tmp_path / "data", each=20), tmp_path / "run"
    arguments = ["--data", str(data), "--val", str(data), "--out", str(run), *SMALL, *ONCE]
    flags = ["--epochs", "4", "--lr", "5e-3", "--no-scale-lr", "--warmup-epochs", "0", "--augment", "none"]
    assert main(["train", *arguments, *flags]) == 0
    capsys.readouterr()
    saved = np.load(run / "eval.npz")
    assert len({int(k) for k in saved["predictions"]}) > 1
    assert main(["predict", "--weights", str(run / "best.safetensors"), "--json", str(data)]) == 0
    out = capsys.readouterr().out
    lines = {line["image"]: line for line in map(json.loads, out.splitlines())}
    for file, predicted, p in zip(saved["files"], saved["predictions"], saved["probabilities"]):
        top = lines[str(file)]["top"][0]
        assert top["label"] == saved["names"][predicted]
        assert top["p"] == pytest.approx(p.max(), rel=1e-4)
    done = subprocess.run(
        [BINARY, "predict", "--weights", str(run / "best.safetensors"), "--json", str(data)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == out


def test_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (Path(folder), purge_step) == (tmp_path / "run" / "tensorboard", 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    board = types.ModuleType("tensorboard")
    board.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", board)
    arguments = [
        "--data",
        str(folder(tmp_path / "data")),
        *SMALL,
        *ONCE,
        "--epochs",
        "1",
        "--val-fraction",
        "0.3",
    ]
    assert main(["train", *arguments, "--log-every", "1", "--out", str(tmp_path / "run")]) == 0
    steps = [line for line in log(tmp_path / "run") if line["kind"] == "step"]
    assert [w for w in written if w[0] == "step/loss"] == [("step/loss", x["loss"], x["step"]) for x in steps]
    assert {"step/lr", "eval/raw/top1", "eval/ema/loss"} <= {name for name, _, _ in written}
    assert written[-1][0] == "closed"
