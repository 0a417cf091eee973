# SPDX-License-Identifier: Apache-2.0
"""Runs that go on longer than they were meant to, and what training prints without a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from train_helpers import ONCE, SMALL, log
from vimcore.cli import main
from vimcore.tasks import read_settings
from vimcore.train.checkpoint import read_checkpoint
from vimcore.train.log import read_log
from vimcore.train.schedule import Schedule
from vimcore.utils.times import duration

pytestmark = pytest.mark.slow

RUN = ["--data", "digits", *SMALL, *ONCE, "--batch-size", "128", "--schedule-steps", "update", "--ema", "0.9"]
FLAT = ["--schedule", "constant", "--warmup-epochs", "0"]
WEIGHTS = ("best.safetensors", "last.safetensors", "last_ema.safetensors")


def trained(run: Path, *arguments: str) -> Path:
    assert main(["train", *RUN, *arguments, "--out", str(run)]) == 0
    return run


def prolonged(run: Path, *arguments: str) -> None:
    assert main(["train", "--resume", str(run), *arguments]) == 0


def test_a_prolonged_run_is_the_long_run(tmp_path: Path) -> None:
    """With a schedule that does not depend on the length not a bit differs; the log says one thing more."""
    short, long = (
        trained(tmp_path / "short", *FLAT, "--epochs", "1"),
        trained(tmp_path / "long", *FLAT, "--epochs", "3"),
    )
    prolonged(short, "--epochs", "2", "--lr", "5e-4", "--data", "digits")  # equal values are no change
    prolonged(short, "--epochs", "3")
    for name in WEIGHTS:
        assert (short / name).read_bytes() == (long / name).read_bytes(), name
    lines = [line for line in log(short) if line["kind"] not in ("start", "longer")]
    assert lines == [line for line in log(long) if line["kind"] != "start"]
    added = [line for line in log(short) if line["kind"] == "longer"]
    assert [(line["step"], line["epochs"], line["updates"]) for line in added] == [(11, 2, 22), (22, 3, 33)]
    assert read_settings(str(short / "config.toml")).epochs == 3


def test_in_updates_and_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The last epoch of the short run is completed; killed before its next checkpoint, it still goes on."""
    short = trained(tmp_path / "short", *FLAT, "--updates", "15")
    long = trained(tmp_path / "long", *FLAT, "--updates", "29")
    assert read_checkpoint(short / "checkpoint.pt")["epoch"] == 2
    config = short / "config.toml"
    config.write_text(config.read_text().replace("updates = 15", "updates = 29"))  # as that would leave it
    prolonged(short)
    for name in WEIGHTS[1:]:
        assert (short / name).read_bytes() == (long / name).read_bytes(), name
    steps = [line["step"] for line in log(short) if line["kind"] == "eval" and line["weights"] == "raw"]
    assert steps == [11, 15, 22, 29]
    prolonged(short, "--updates", "29")


def test_the_schedule_of_a_prolonged_run(tmp_path: Path) -> None:
    """It is that of the long run, from where the short one ended."""
    run = trained(tmp_path / "run", "--epochs", "2", "--log-every", "1")
    short = read_log(run / "log.jsonl").steps["lr"]
    prolonged(run, "--epochs", "4")
    found = read_log(run / "log.jsonl").steps["lr"]
    assert found[:22].tolist() == short.tolist()
    rule = Schedule(read_settings(str(run / "config.toml")), 5e-4 * 128 / 512, 11)
    assert found[22:].tolist() == [rule(update) for update in range(22, 44)]
    assert found[22] > found[21]


def test_what_cannot_change_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "--epochs", "2")
    counted = trained(tmp_path / "counted", "--updates", "12")
    before = (run / "config.toml").read_bytes()
    for arguments, message in (
        (["--epochs", "1"], "epochs: the run has 2, and when it goes on it can have more, got 1"),
        (["--updates", "44"], "updates (is None, got 44): cannot change"),
        (
            ["--epochs", "3", "--lr", "1", "--seed", "2"],
            "lr (is 0.0005, got 1.0), seed (is 0, got 2): cannot change",
        ),
    ):
        assert main(["train", "--resume", str(run), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert (
        "continued after update 22 of 22: the run had ended; --epochs with more than 2"
        in capsys.readouterr().err
    )
    assert main(["train", "--resume", str(counted), "--epochs", "9"]) == 1
    assert "epochs (is 2, got 9): cannot change" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before


def test_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One every log_every updates and at the end of an epoch; all settings with --verbose only."""
    trained(tmp_path / "run", "--epochs", "2", "--log-every", "5")
    text = capsys.readouterr().err
    number = r"[\d.e+-]+"
    found = re.findall(
        rf"^epoch (\d)/2, update (\d+)/22: loss {number}, lr {number}, {number} images/s, {number} GiB, "
        r"(\d+:\d\d) left$",
        text,
        re.MULTILINE,
    )
    assert [(epoch, update) for epoch, update, _ in found] == [
        *(("1", update) for update in ("5", "10", "11")),
        *(("2", update) for update in ("15", "20", "22")),
    ]
    assert found[-1][2] == "0:00"
    assert "[optimizer]" not in text
    assert f"settings: {tmp_path / 'run' / 'config.toml'}; img_size 16, " in text
    prolonged(tmp_path / "run", "--verbose")
    assert "[optimizer]" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 245, 3600, 97445)] == [
        "0:00",
        "1:00",
        "4:05",
        "1:00:00",
        "27:04:05",
    ]


def test_what_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "checkpoint.pt"):
        (run / name).touch()
    (tmp_path / "empty").mkdir()
    for given, told in (
        (run / "checkpoint.pt", f"a file; name the folder of the run: {run}"),
        (tmp_path, f"no run of `vimcore train`, as there is no config.toml; runs in it: {run}"),
        (tmp_path / "empty", "no run of `vimcore train`, as there is no config.toml\n"),
    ):
        assert main(["train", "--resume", str(given)]) == 1
        assert told in capsys.readouterr().err
