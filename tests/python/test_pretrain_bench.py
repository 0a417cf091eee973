# SPDX-License-Identifier: Apache-2.0
"""The scripts that measure pretraining and fine-tuning, in small."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_a_figure_is_found_once(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But again with other flags."""
    cells, made = script("cells"), []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"accuracy": 0.5, "cpu_seconds": len(made)}

    file = tmp_path / "cells" / "mim-0-probe.json"
    first = cells.kept(file, {"arm": "mim", "flags": ["--a"]}, make)
    assert first == {"arm": "mim", "flags": ["--a"], "accuracy": 0.5, "cpu_seconds": 1}
    assert cells.kept(file, {"arm": "mim", "flags": ["--a"]}, make) == first
    assert cells.kept(file, {"arm": "mim", "flags": ["--b"]}, make)["cpu_seconds"] == 2
    assert capsys.readouterr().err.count("mim-0-probe: 50.0 %") == 2


def test_digits_in_small(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pretraining to fine-tuning by the commands; what is known is not found again."""
    digits: ModuleType = script("pretrain_digits")
    monkeypatch.setattr(digits, "SUBSETS", range(1))
    monkeypatch.setattr(digits, "TUNINGS", {"jiggle-2": digits.TUNINGS["jiggle-2"]})
    digits.write_digits(tmp_path / "digits")
    found = {}
    for arm in ("none", "mim"):
        work = digits.Work(arm, 3, tmp_path, epochs=1, updates=2)
        found[arm] = list(work.found())
        with monkeypatch.context() as patch:
            patch.setattr(script("cells"), "train", None)
            assert list(work.found()) == found[arm]
    names = ["probe-10", "probe-2", "jiggle-2"]
    assert [cell["what"] for cell in found["none"]] == names
    assert [cell["what"] for cell in found["mim"]] == ["pretraining", *names]
    probes = [cells[-3]["accuracy"] for cells in found.values()]
    assert 0.3 < probes[0] < 0.65
    assert 0.3 < probes[1] < 0.8
    assert probes[0] != probes[1]
    assert "--init" not in found["mim"][-1]["flags"]  # the same recipe for both
    assert found["none"][-1]["flags"] == found["mim"][-1]["flags"]


def test_subsets_have_so_many_of_each_digit(script: Any) -> None:
    from vimcore.data.digits import load_digits, split_digits

    digits, labels = script("pretrain_digits"), load_digits()[1]
    train, held_out = split_digits(labels)
    chosen = [digits.subset(labels, train, 10, number) for number in range(5)]
    for part in chosen:
        assert np.bincount(labels[part]).tolist() == [10] * 10
        assert not set(part) & set(held_out)
    few = digits.subset(labels, train, 2, 1)
    assert set(few) < set(chosen[1])
    assert len({tuple(sorted(part)) for part in chosen}) == 5


def test_gains_are_over_no_pretraining(script: Any) -> None:
    """Means over seeds of every subset; a probe must gain on each of them, the rest in the mean."""
    digits = script("pretrain_digits")

    def report(worst: float, plain: float) -> list[str]:
        found = []
        for seed in (0, 1):
            for arm in digits.ARMS:
                for what in digits.TITLES:
                    for s in digits.SUBSETS:
                        gain = {"probe-10": worst if s == 3 else 0.3, "plain-10": plain}.get(what, 0.05)
                        value = 0.4 + 0.02 * s + 0.01 * seed + (gain if arm == "ar2" else 0.0)
                        value += 0.3 if arm == "mim" else 0.0
                        found.append({"arm": arm, "seed": seed, "what": what, "subset": s, "accuracy": value})
        gained = digits.gains(found)
        assert gained["mim"]["plain-10"] == {"mean": 30.0, "subsets": [30.0] * 5}
        lines: list[str] = digits.missed(gained)
        return lines

    assert report(0.21, 0.03) == []
    assert report(0.19, 0.01) == [
        "ar2, probe, 10 labels: +19.0 points, demanded +20.0 (every subset)",
        "ar2, plain fine-tuning, 10 labels: +1.0 points, demanded +2.0 (mean)",
    ]


def test_photographs_are_cut_apart(script: Any, tmp_path: Path) -> None:
    """Nothing to learn from is tested; every picture is in its package and large enough."""
    photos = script("finetune_photos")
    columns = np.tile(np.arange(250, dtype=np.uint8), (120, 1))
    found = photos.squares(columns, np.random.default_rng(0))
    assert (
        max(square.max() for square in found["learn"]) < 125 <= min(square.min() for square in found["test"])
    )
    photos.cut(tmp_path, 0)
    for part in ("learn", "test"):
        assert len(list((tmp_path / part).glob("*/*.png"))) == photos.CLASSES * 20
    assert photos.CLASSES >= 8
    assert 0.4 < photos.by_grey_levels(tmp_path) < 0.95


@pytest.mark.parametrize(
    ("name", "file"), [("pretrain_digits", "pretrain-digits"), ("finetune_photos", "finetune-photos")]
)
def test_the_table_is_that_of_the_runs(script: Any, name: str, file: str) -> None:
    """The committed Markdown comes from the committed figures, of three seeds at least."""
    module = script(name)
    report = json.loads((BENCH / "results" / f"{file}.json").read_text(encoding="utf-8"))
    text = (BENCH / "results" / f"{file}.md").read_text(encoding="utf-8")
    assert text == module.markdown(report)
    assert len(report["seeds"]) >= 3
    assert {cell["seed"] for cell in report["cells"]} == set(report["seeds"])
    measured = module.gains(report["cells"]) if name == "pretrain_digits" else report["cells"]
    assert report["missed"] == module.missed(measured)
    assert {"date", "machine", "isa", "versions"} <= set(report)


def test_arms_are_taken_from_earlier_figures(script: Any, tmp_path: Path) -> None:
    """With the same settings only; nothing is computed."""
    digits = script("pretrain_digits")
    report = json.loads((BENCH / "results" / "pretrain-digits.json").read_text(encoding="utf-8"))
    for arm in ("none", "ar2"):
        of_arm = [cell for cell in report["cells"] if (cell["arm"], cell["seed"]) == (arm, 1)]
        assert digits.worked(digits.Work(arm, 1, tmp_path, None, None, report["cells"])) == of_arm
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"--known: ar2-1, pretraining None: no figure of these settings"):
        digits.worked(digits.Work("ar2", 1, tmp_path, 7, None, report["cells"]))
    with pytest.raises(SystemExit):
        digits.main(["--runs", str(tmp_path), "--arms", "mim"])
    known = {"arms": ["none", "ar2"], "machine": "An Engine", "isa": "avx2", "date": "2026-01-02T03:04:05"}
    assert "taken from it: none, ar2. An Engine (avx2), 2026-01-02." in digits.markdown(
        {**report, "known": known}
    )
