# SPDX-License-Identifier: Apache-2.0
"""Detection from `vimcore train` to pictures: average precision, resuming, eval, predict, plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from report_checks import read_report
from train_helpers import log, stopped
from vimcore import detection, segmentation
from vimcore.cli import main
from vimcore.data.coco import run_lengths
from vimcore.data.scenes import Scenes
from vimcore.nn.vision_mamba import VisionMamba
from vimcore.tasks.detection.answers import read_answers
from vimcore.tasks.detection.settings import DetectionSettings
from vimcore.train.presets import recipe
from vimcore.train.schedule import Schedule, peak_lr

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
# A network that learns nothing, fast.
TINY = [
    *("--preset", "digits-objects", "--embed-dim", "16", "--depth", "2", "--epochs", "2", "--ema", "0.9"),
    *("--head-channels", "8", "--head-scales", "1", "0.5", "--head-anchors", "16", "24", "--batch-size", "4"),
    *("--head-box-width", "16", "--head-boxes-sampled", "8", "--head-proposals", "10", "--track", "none"),
]


# ---- recipes -----------------------------------------------------------------------------------------------


def test_released_recipe() -> None:
    settings, notes = recipe(DetectionSettings, "det-tiny-released", {})
    assert notes == []
    schedule = Schedule(settings, 1e-4, 1832, 184_375)
    assert schedule(0) == pytest.approx(1e-7)
    assert schedule(125) == pytest.approx(1e-4 * (0.5 + 0.5e-3))
    for update, rate in ((250, 1e-4), (163_888, 1e-4), (163_889, 1e-5), (177_545, 1e-5), (177_546, 1e-6)):
        assert schedule(update) == pytest.approx(rate), update
    assert peak_lr(settings, 8) == pytest.approx(1e-4)
    assert (8 * settings.batch_size, settings.updates, settings.weight_decay) == (64, 184_375, 0.1)
    assert (settings.layer_decay, settings.drop_path_rate, settings.img_size) == (0.837, 0.1, (1024,))
    assert (settings.augment, settings.scale, settings.hflip) == ("jitter", (0.1, 2.0), 0.5)


def test_released_recipe_is_made() -> None:
    """Rates by layer, and what is decayed, of a narrower network; nothing is computed."""
    from vimcore import tasks
    from vimcore.train.optimizer import create_optimizer

    small = {"img_size": (64,), "embed_dim": 16, "head_channels": 8, "head_box_width": 8}
    typed = {"data": "digits-scenes", "precision": "float32", **small}
    settings, _ = recipe(DetectionSettings, "det-tiny-released", typed)
    task = tasks.create(settings)
    task.data()
    model, _ = task.build()
    names = {id(p): name for name, p in model.named_parameters()}
    scales, decays = {}, {}
    for group in create_optimizer(model, settings, 1e-4, task.layers(), 0.837).param_groups:
        for p in group["params"]:
            scales[names[id(p)]], decays[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scales["backbone.pos_embed"] == pytest.approx(0.837**25)
    assert scales["backbone.layers.0.mixer.A_log"] == pytest.approx(0.837**24)
    assert scales["backbone.layers.23.mixer.A_log"] == pytest.approx(0.837)
    assert scales["pyramid.simfp_2.0.weight"] == scales["roi_heads.box_head.0.fc1.weight"] == 1
    assert decays["backbone.pos_embed"] == decays["pyramid.simfp_2.1.weight"] == 0
    assert decays["roi_heads.box_head.0.fc1.weight"] == 0.1


# ---- runs --------------------------------------------------------------------------------------------------


def scenes_as_coco(folder: Path, count: int, held_out: bool, masks: bool = True) -> Path:
    """A COCO file of scenes, whose categories have the ids 1, 4, 7, ..., with the pictures beside it."""
    folder.mkdir(parents=True)
    scenes = Scenes(held_out=held_out)
    categories = [{"id": 3 * k + 1, "name": f"digit {k}"} for k in range(10)]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for i in range(count):
        scene = scenes.draw(i)
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        content["images"].append({"id": 100 + i, "file_name": f"{i}.png", "height": 48, "width": 48})
        for (x1, y1, x2, y2), digit, mask in zip(scene.boxes.tolist(), scene.digits.tolist(), scene.masks):
            row = {"image_id": 100 + i, "category_id": 3 * digit + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            content["annotations"].append({**row, **({"segmentation": run_lengths(mask)} if masks else {})})
    file = folder / "coco.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name few pictures, not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    train = scenes_as_coco(folder / "train", 12, held_out=False)
    return ["--data", str(train), "--val", str(scenes_as_coco(folder / "val", 5, held_out=True))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("detect") / "run"
    assert main(["train", *TINY, *data, "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_run_and_one_that_was_stopped(run: Path, data: list[str], tmp_path: Path) -> None:
    """The same bits; all losses are in the log; results as COCO's server wants them."""
    again = stopped(tmp_path / "again", 3, *TINY, *data)
    assert main(["train", "--resume", str(again)]) == 0
    assert log(again) == log(run)
    for name in ("best", "last", "last_ema"):
        files = [(folder / f"{name}.safetensors").read_bytes() for folder in (run, again)]
        assert files[0] == files[1], name
    steps = [line for line in log(run) if line["kind"] == "step"]
    losses = [name for name in steps[0] if name.startswith("loss_")]
    assert len(losses) == 9
    assert steps[0]["loss"] == pytest.approx(sum(steps[0][name] for name in losses), rel=1e-5)
    scores = [line for line in log(run) if line["kind"] == "eval"]
    assert {"box_ap", "mask_ap", "box_ap50", "mask_ap75", "box_ap_small"} <= set(scores[0])
    rows = json.loads((run / "results.json").read_text())
    assert rows
    assert all(row["category_id"] % 3 == 1 and 100 <= row["image_id"] < 105 for row in rows)
    answers = read_answers(run / "eval.npz")
    assert len(answers.files) == len(answers.worst) == 5
    assert answers.quality[answers.worst[0].index] == answers.quality.min()
    model = detection.load(run / "best.safetensors")
    assert model.task is not None
    assert model.task.classes == tuple(f"digit {k}" for k in range(10))
    assert model.task.ids == tuple(range(1, 31, 3))


@pytest.mark.slow
def test_eval(run: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    out = tmp_path / "found.json"
    file = str(run / "best.safetensors")
    assert main(["eval", file, "--workers", "0", "--out", str(out), "--json"]) == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = next(f for f in facts if f["weights"].endswith("best.safetensors"))
    kept = json.loads((run / "results.json").read_text())
    again = json.loads(out.read_text())
    assert len(again) == len(kept) > 0
    for row, other in zip(again, kept):  # sums over other batches round differently
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)
        assert row["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
    answers = read_answers(run / "eval.npz")
    assert best["box_ap"] == pytest.approx(answers.figures["box_ap"])
    assert best["images"] == 5
    assert set(best["per_class"]) == {f"digit {k}" for k in range(10)}
    assert main(["eval", str(run / "last.safetensors"), "--data", data[1], "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "AP50" in text
    assert "mask AP" in text
    assert "objects missed" in text
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes((run / "best.safetensors").read_bytes())
    assert main(["eval", str(lonely), "--workers", "0"]) == 1
    assert "name pictures and truth with --data" in capsys.readouterr().err


@pytest.mark.slow
def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of pictures of several sizes; lines of JSON, overlays, results in COCO's form."""
    capsys.readouterr()
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(Scenes(held_out=True).draw(0).image).save(photos / "a.png")
    Image.fromarray(Scenes(held_out=True).draw(1).image).resize((90, 60)).save(photos / "b.jpg")
    (photos / "c.png").write_bytes(b"x")
    (photos / "d.txt").write_text("x")
    model, weights = detection.load(run / "best.safetensors"), tmp_path / "low.safetensors"
    model.options["score"] = 0.01  # so that there are some
    model.save(weights, ids=list(range(10, 110, 10)))
    out = tmp_path / "out"
    arguments = ["predict", "--weights", str(weights), str(photos), "--out", str(out)]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.jpg", "c.png"]
    assert (lines[1]["width"], lines[1]["height"]) == (90, 60)
    assert "error" in lines[2]
    assert lines[2]["passed_over"] == {".txt": 1}
    content = json.loads((out / "results.json").read_text())
    assert [image["width"] for image in content["images"]] == [48, 90]
    assert content["categories"][3] == {"id": 40, "name": "digit 3"}
    assert len(content["annotations"]) == sum(len(line["objects"]) for line in lines[:2]) > 0
    first = content["annotations"][0]
    assert first["category_id"] == 10 * (lines[0]["objects"][0]["index"] + 1)
    assert first["segmentation"]["size"] == [48, 48]
    assert Image.open(out / "b_overlay.jpg").size == (90, 60)
    assert main(arguments) == 1
    assert "a_overlay.jpg" in capsys.readouterr().out
    assert main(["predict", "--weights", str(weights), str(photos / "a.png"), "--logits"]) == 1
    assert "logits: of classifiers only" in capsys.readouterr().err


@pytest.mark.slow
def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--out", str(tmp_path), "--mistakes", "3", "--format", "html"]) == 0
    report = read_report(tmp_path / "report.html")
    assert report.headings[:3] == ["Training", "Classes", "Worst pictures"]
    assert len(report.pictures) == 4 + 3 * 3
    (tmp_path / "report.html").unlink()
    capsys.readouterr()
    assert main(["plot", str(run), "--out", str(tmp_path), "--mistakes", "3"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "worst.png"]
    assert Image.open(tmp_path / "worst.png").size[0] > 1500
    capsys.readouterr()
    answers = run / "eval.npz"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.toml").write_text((run / "config.toml").read_text())
    (damaged / "eval.npz").write_bytes(answers.read_bytes()[:-200])
    assert main(["plot", str(damaged)]) == 1
    assert "not the answers of a run of detection" in capsys.readouterr().err


@pytest.mark.slow
def test_starts_from_files_of_other_tasks(
    run: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone of a network for segmentation, and a whole detector."""
    options: dict[str, Any] = {
        "img_size": 48,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "d_state": 8,
        "class_token": "none",
    }
    fcn = tmp_path / "s.safetensors"
    segmentation.FCN(VisionMamba(**options, num_classes=0), 11).save(fcn)
    for place, file in enumerate((fcn, run / "best.safetensors")):
        folder = tmp_path / f"run{place}"
        short = ["--epochs", "1", "--lr", "1e-12", "--warmup-epochs", "0"]
        assert main(["train", *TINY, *data, *short, "--init", str(file), "--out", str(folder)]) == 0
        text = capsys.readouterr().err
        whole = file == run / "best.safetensors"
        assert ("weights of backbone, pyramid and heads" if whole else "new pyramid and heads for 10") in text
        ours = detection.load(folder / "last.safetensors").state_dict()
        theirs = (detection if whole else segmentation).load(file).state_dict()
        for name in (n for n in ours if n in theirs):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-8, rtol=1e-5)
        assert "backbone.layers.1.mixer.in_proj.weight" in theirs


@pytest.mark.slow
def test_boxes_alone_on_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A COCO file without masks, one of its pictures missing."""
    file = scenes_as_coco(tmp_path / "boxes", 12, held_out=False, masks=False)
    (tmp_path / "boxes" / "3.png").unlink()
    out = tmp_path / "run"
    options = [
        "--data",
        str(file),
        "--no-masks",
        "--val-fraction",
        "0.3",
        "--augment",
        "jitter",
        "--epochs",
        "1",
    ]
    assert main(["train", *TINY, *options, "--head-score", "0.0", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert f"1 image that is not in {tmp_path / 'boxes'} (3.png)" in captured.err
    assert "mask_ap" not in json.loads(captured.out)["best"]
    rows = json.loads((out / "results.json").read_text())
    assert rows
    assert all(row["category_id"] % 3 == 1 and "segmentation" not in row for row in rows)
    assert main(["eval", str(out), "--workers", "0"]) == 0
    assert main(["plot", str(out)]) == 0
    assert (out / "worst.png").exists()
    assert main(["train", *TINY, "--data", str(file), "--out", str(tmp_path / "masks")]) == 1
    assert "has no segmentation; --no-masks learns boxes alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "2", "1"], "scale: expected 2 numbers above 0, the smaller first"),
        (["--hflip", "2"], "hflip: expected a probability, got 2"),
        (["--head-anchors", "1"], "anchors: expected 2 or 3, one for each level, got 1"),
        (["--in-chans", "4"], "in_chans: expected 1 or 3 for pictures, got 4"),
        (["--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["--val", "nowhere"], "val: digits-scenes has validation scenes of its own"),
        (["--scenes", "0"], "scenes: expected at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, *options, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
