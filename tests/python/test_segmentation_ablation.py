# SPDX-License-Identifier: Apache-2.0
"""The script of the mIoU ablation in small, and the table that it left."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vimcore.cli import main
from vimcore.weights.info import describe_file

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its runs are made in this process, which has imported everything; `launches` has their arguments."""
    spec = importlib.util.spec_from_file_location("segmentation_ablation", BENCH / "segmentation_ablation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.launches = []

    def launched(arguments: Sequence[str]) -> tuple[str, float]:
        module.launches.append(list(arguments))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(list(arguments)) == 0
        return said.getvalue(), 1.0

    monkeypatch.setattr(module, "launched", launched)
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr("vimcore.data.pairs.VALIDATION", 4)  # scenes
    return module


class AtOnce:
    """An executor that does the work when it is submitted, in this thread, as training wants it."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options: bool) -> None:
        pass


def test_in_small(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    options = ["--runs", str(runs), "--scenes", "8", "--seeds", "1", "--directions", "none"]
    assert script.main([*options, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    report = json.loads((out / "segmentation-ablation.json").read_text())
    assert text == (out / "segmentation-ablation.md").read_text() == script.markdown(report)
    assert [(r["head"], r["directions"]) for r in report["runs"]] == [
        (head, "none") for head in ("fcn", "fcn1", "segmenter")
    ]
    assert len(script.launches) == 3
    for launch, before in zip(script.launches[1:], ("fcn", "fcn1")):  # each begins with the one before
        assert launch[-4:-1] == ["--init", str(runs / f"{before}-none-seed1" / "best.safetensors"), "--out"]
    for run, (head, convs) in zip(report["runs"], (("fcn", 4), ("fcn", 1), ("segmenter", None))):
        facts = describe_file(str(runs / f"{run['head']}-{run['directions']}-seed1" / "best.safetensors"))
        assert (facts["head"], facts["config"]["directions"]) == (head, run["directions"])
        assert facts["options"].get("convs") == convs
        assert facts["parameters"] == run["parameters"]
        assert 0 <= run["miou"] <= run["aacc"] <= 1
        assert run["updates"] == 2
    assert "| none | " in text
    assert "What it cannot show" in text
    assert {"machine", "versions", "date", "isa", "seeds"} <= set(report)

    # A stopped script goes on: what has a result is read, what has a checkpoint is continued.
    (runs / "fcn-none-seed1" / "cell.json").unlink()
    assert script.main(options) == 0
    assert script.launches[3:] == [["train", "--resume", str(runs / "fcn-none-seed1"), "--json"]]
    again = json.loads((runs / "fcn-none-seed1" / "cell.json").read_text())
    assert {**again, "cpu_seconds": 1.0} == report["runs"][0]
    with pytest.raises(ValueError, match=r"was run as train .* --scenes 8 .*; name another --runs"):
        script.main([*options, "--scenes", "16"])


def test_options(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--scenes", "1500"], "expected a multiple of 1000, or fewer"),
        (["--heads", "uper"], "expected some of fcn,fcn1,segmenter"),
        (["--seeds", "1,1"], "each once"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--runs", "x", *wrong])
        assert said in capsys.readouterr().err
