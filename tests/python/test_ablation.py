# SPDX-License-Identifier: Apache-2.0
"""The ablation script in small, and the table that it left."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", BENCH / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module  # the processes that it starts find their work there
    spec.loader.exec_module(module)
    return module


def test_in_small(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))  # the processes inherit it
    options = ["--seeds", "3,1", "--epochs", "2", "--digits", "32", "--jobs", "2", "--out", str(tmp_path)]
    assert ablation.main(options) == 0
    out, error = capsys.readouterr()
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert out == (tmp_path / "ablation.md").read_text() == ablation.markdown(report)
    assert error.count("\n") == len(report["runs"]) == 18
    assert [(r["name"], r["seed"]) for r in report["runs"][::9]] == [("none", 3), ("none", 1)]
    assert report["seeds"] == [3, 1]
    assert {"machine", "versions", "date", "isa", "recipe"} <= set(report)
    first, second = report["tables"].values()
    assert [row["name"] for row in first] == list(ablation.DIRECTIONS)
    assert [row["name"] for row in second] == list(ablation.READ_OUTS)
    assert {row["options"]["directions"] for row in first} == {"none", "sequence", "block", "ssm", "ssm_conv"}
    assert first[-1]["accuracy"] == second[0]["accuracy"]  # one network in both tables
    for row in [*first, *second]:
        name = ablation.SHARED.get(row["name"], row["name"])
        mine = [r["accuracy"] for r in report["runs"] if r["name"] == name]
        assert row["accuracy"]["mean"] == pytest.approx(statistics.fmean(mine))
        assert row["accuracy"]["deviation"] == pytest.approx(statistics.stdev(mine))
        assert f"| {row['name']} | {row['parameters']:,} | {100 * row['accuracy']['mean']:.2f} \u00b1 " in out
    losses = {r["loss"] for r in report["runs"]}
    assert len(losses) == 18  # every option and every seed makes another network

    again = ablation.run(("head token", ablation.READ_OUTS["head token"], 1, 2, 32))
    (before,) = (r for r in report["runs"] if (r["name"], r["seed"]) == ("head token", 1))
    assert {**again, "seconds": 0} == {**before, "seconds": 0}  # the same seed, the same numbers


def test_one_seed_has_no_deviation(ablation: ModuleType) -> None:
    assert ablation.shown(ablation.spread([0.5]), 100, 1) == "50.0"
    assert ablation.shown(ablation.spread([0.5, 0.7]), 100, 1) == "60.0 \u00b1 14.1"


@pytest.mark.parametrize(
    "options", [["--seeds", "1,1"], ["--epochs", "0"], ["--seeds", "a"], ["--jobs", "0"]]
)
def test_bad_usage(ablation: ModuleType, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ablation.main(options)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_table_is_that_of_the_runs(ablation: ModuleType) -> None:
    """The committed Markdown comes from the committed figures, and these from its runs."""
    report = json.loads((BENCH / "results" / "ablation.json").read_text())
    assert (BENCH / "results" / "ablation.md").read_text() == ablation.markdown(report)
    for title, table in ablation.TABLES.items():
        assert report["tables"][title] == list(ablation.summary(table, report["runs"]))
    assert len(report["seeds"]) >= 3
    assert {r["seed"] for r in report["runs"]} == set(report["seeds"])
