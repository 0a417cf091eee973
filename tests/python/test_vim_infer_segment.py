# SPDX-License-Identifier: Apache-2.0
"""Segmentation in C++ against the torch modules and `vimcore predict`: logits, lines, masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from numpy.typing import NDArray
from PIL import Image
from vim_infer import picture, run
from vimcore import _core, segmentation
from vimcore.cli import main
from vimcore.data.scenes import Scenes
from vimcore.segmentation import FCN, Segmenter, UperNet

NAMES = ["sky", 'a "tree"', "\u00fcber", "3", "road"]


def network(kind: Any, classes: int = 5, backbone: dict[str, Any] | None = None, **options: Any) -> Any:
    """A network whose weights all matter: norms are not at 1, 0 and statistics of nothing."""
    torch.manual_seed(1)
    arguments = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 24, "depth": 4, "num_classes": 0}
    model = kind(vimcore.VisionMamba(**{**arguments, **(backbone or {})}), classes, **options)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "backbone.layers" in name or not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.ndim == 1:
                value.normal_(0.3 if name.endswith(("weight", "bias")) else 0, 0.3)
            elif name.endswith("conv_seg.weight"):
                value.normal_(std=0.3)
    return model.eval()


def engine(model: Any, folder: Path, threads: int = 2) -> _core.SegmentEngine:
    path = folder / "m.safetensors"
    model.save(path)
    return _core.SegmentEngine(path, threads)


CASES: list[tuple[Any, dict[str, Any]]] = [
    (FCN, {}),
    (FCN, {"convs": 0}),
    (FCN, {"convs": 1, "channels": 13, "classes": 1}),
    (FCN, {"convs": 3, "head_norm": "group", "classes": 255, "backbone": {"class_token": "double"}}),
    (FCN, {"backbone": {"class_token": "registers", "registers": 2}}),
    (FCN, {"backbone": {"class_token": "none", "img_size": (12, 20), "patch_size": 4, "in_chans": 4}}),
    (UperNet, {}),
    (UperNet, {"head_norm": "group", "channels": 20, "indices": [2, 0, 3, 3], "aux": False}),
    (UperNet, {"backbone": {"patch_size": 8, "class_token": "head"}}),
    (UperNet, {"taps": "mixer", "indices": [1, 2, 3, 3], "backbone": {"patch_size": 4, "img_size": (20, 4)}}),
    (UperNet, {"backbone": {"directions": "block", "class_token": "head", "rope": True, "img_size": 16}}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_logits_of_the_torch_module(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = network(kind, **options)
    config = model.backbone._config
    images = torch.randn(3, config.in_chans, *config.img_size)
    with torch.no_grad():
        wanted = model.double()(images.double()).numpy()
    found = engine(model.float(), tmp_path)
    logits, classes = found.logits(images.numpy()), found.classes(images.numpy())
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(classes, logits.argmax(1))
    one = _core.SegmentEngine(tmp_path / "m.safetensors", 1)
    np.testing.assert_array_equal(one.logits(images[1:2].numpy()), logits[1:2])
    with pytest.raises(ValueError, match="expected windows"):
        found.logits(images.numpy()[..., :-1].copy())


def python_classes(model: Any, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from vimcore.tools.segment import Segmenting

    return Segmenting(model).classes(image)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (48, 32), "stride": (40, 7)},
        {"resize": (40, 120)},
        {"resize": (50, 60), "stride": 16},
        {"backbone": {"in_chans": 1}, "resize": (64, 64)},
    ],
)
def test_pictures_of_any_size(options: dict[str, Any], tmp_path: Path) -> None:
    own = {key: options[key] for key in ("window", "stride", "resize") if key in options}
    network(FCN, backbone=options.get("backbone")).save(tmp_path / "m.safetensors", **own)
    model = segmentation.load(tmp_path / "m.safetensors")
    found = [_core.SegmentEngine(tmp_path / "m.safetensors", threads) for threads in (1, 3)]
    different = pixels = 0
    for size in ((32, 48), (20, 30), (33, 48), (100, 41), (31, 150), (1, 1)):
        image = np.array(picture(*size, seed=size[0]))
        classes = found[0].segment(image)
        np.testing.assert_array_equal(found[1].segment(image), classes)
        different += int((classes != python_classes(model, image)).sum())
        pixels += classes.size
    assert different <= 1e-3 * pixels


def test_scenes(tmp_path: Path) -> None:
    """Of a network that learnt nothing: its logits lie closer together than those of a trained one."""
    model = network(UperNet, 11, {"img_size": 48, "patch_size": 4})
    model.save(tmp_path / "m.safetensors")
    model, found = segmentation.load(tmp_path / "m.safetensors"), engine(model, tmp_path)
    same = [
        python_classes(model, scene.image) == found.segment(np.ascontiguousarray(scene.image))
        for scene in map(Scenes(48).draw, range(20))
    ]
    assert np.mean(same) >= 0.999


def test_resize_is_that_of_training() -> None:
    from vimcore.data.joint import resize_bilinear

    image = np.asarray(picture(37, 53, 1))
    values = torch.from_numpy(image.transpose(2, 0, 1).copy()).float()
    for size in ((74, 106), (20, 100), (37, 53), (1, 1), (90, 17)):
        wanted = (resize_bilinear(values, size) + 0.5).floor().numpy().transpose(1, 2, 0)
        found = _core.resize_linear(image, *size).astype(float)
        assert np.abs(found - wanted).max() <= 1
        assert (found != wanted).mean() < 1e-3


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "m.safetensors"
    network(FCN).save(path, classes=NAMES, resize=(40, 90))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--json"], ["--topk", "2"]])
def test_the_very_same_lines(
    form: list[str], dense: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("segment", "--weights", dense, *form, pictures)
    assert main(["predict", "--weights", str(dense), *form, str(pictures)]) == done.returncode == 1
    out, error = capsys.readouterr()
    assert done.stdout == out
    assert done.stderr == error.replace("vimcore: ", "vim-infer: ")
    assert "4 of 19 images failed" in done.stderr


@pytest.mark.slow
def test_masks_and_overlays(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (70, 50)), ("b.jpg", (40, 130))):
        picture(*size, seed=size[0]).save(tmp_path / "photos" / name)
    done = run("segment", "--weights", dense, "--json", "--out", tmp_path / "c", tmp_path / "photos")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        main(
            [
                "predict",
                "--weights",
                str(dense),
                "--json",
                "--out",
                str(tmp_path / "python"),
                str(tmp_path / "photos"),
            ]
        )
        == 0
    )
    theirs = capsys.readouterr().out.replace(str(tmp_path / "python"), str(tmp_path / "c"))
    assert done.stdout == theirs
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg"
    ]  # fmt: skip
    palette = segmentation.load(dense).task.palette
    for line in map(json.loads, done.stdout.splitlines()):
        with Image.open(line["mask"]) as mask, Image.open(line["image"]) as image:
            classes, pixels = np.asarray(mask), np.asarray(image.convert("RGB"))
            assert mask.mode == "P"
            assert (Path(line["mask"]).read_bytes()[24], mask.size) == (8, (line["width"], line["height"]))
            np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), np.array(palette)[classes])
        counts = [(a["index"], a["pixels"]) for a in line["areas"]]
        assert counts == sorted(
            ((int(i), int(n)) for i, n in enumerate(np.bincount(classes.ravel())) if n),
            key=lambda c: (-c[1], c[0]),
        )
        assert [a["label"] for a in line["areas"]] == [NAMES[i] for i, _ in counts]
        with Image.open(line["overlay"]) as overlay:
            mixed = (pixels.astype(int) + np.array(palette)[classes]) // 2
            assert np.abs(np.asarray(overlay).astype(int) - mixed).mean() < 8  # JPEG
        other = Image.open(tmp_path / "python" / Path(line["mask"]).name)
        np.testing.assert_array_equal(np.asarray(other), classes)


def test_results_replace_nothing(dense: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.ppm", "b.ppm"):
        picture(20, 20, 1).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    done = run("segment", "--weights", dense, "--json", "--out", tmp_path, tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert ["error" in line for line in lines] == [True, True, False]
    assert "is another picture" in done.stderr
    assert (tmp_path / "a.png").read_bytes() == before
    (tmp_path / "file").write_text("")
    done = run("segment", "--weights", dense, "--out", tmp_path / "file", tmp_path / "b.ppm")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot make the folder" in done.stderr


def test_files_of_other_tasks(dense: Path, weights: Path, tmp_path: Path) -> None:
    photo = tmp_path / "a.ppm"
    picture(20, 20, 1).save(photo)

    def said(*arguments: object) -> str:
        done = run(*arguments, photo)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "`vim-infer predict` runs it" in said("segment", "--weights", weights)
    assert "`vim-infer segment`" in said("predict", "--weights", dense)
    assert "run on the cpu, got cuda:0" in said("segment", "--weights", dense, "--device", "cuda")
    network(Segmenter).save(tmp_path / "s.safetensors")
    assert "`vimcore predict`" in said("segment", "--weights", tmp_path / "s.safetensors")
    network(FCN, backbone={"in_chans": 4}).save(tmp_path / "four.safetensors")
    assert "4 channels" in said("segment", "--weights", tmp_path / "four.safetensors")
    with pytest.raises(vimcore.Error, match="a network for segmentation"):
        vimcore.Runtime(dense)


def test_info(tmp_path: Path) -> None:
    for kind in (FCN, UperNet):
        model = network(kind, backbone={"img_size": 64})
        model.save(tmp_path / "m.safetensors", classes=NAMES, resize=(40, 90))
        done = run("info", "--json", tmp_path / "m.safetensors")
        assert (done.returncode, done.stderr) == (0, "")
        found, wanted = json.loads(done.stdout), _python_info(tmp_path / "m.safetensors")
        same = ["types", "tokens", "grid", "labels", "flops", "task", "head"]
        same += ["classes", "palette", "window", "stride", "resize"]
        assert {key: found[key] for key in same} == {key: wanted[key] for key in same}
        auxiliary = sum(p.numel() for n, p in model.named_parameters() if n.startswith("auxiliary_head"))
        assert found["parameters"] == wanted["parameters"] - auxiliary
        assert found["head_parameters"] == wanted["head_parameters"] - auxiliary
        text = run("info", tmp_path / "m.safetensors").stdout
        assert "windows     64 x 64 px every 42 x 42 px" in text
        assert "labels      sky, " in text


def _python_info(path: Path) -> dict[str, Any]:
    from vimcore.weights.info import describe_file

    return describe_file(str(path))


@pytest.mark.parametrize(
    "arguments",
    [["x.png"], ["--weights", "w"], ["--weights", "w", "--topk", "0", "x"], ["--batch", "1", "x"]],
)
def test_usage(arguments: list[str]) -> None:
    done = run("segment", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "vim-infer segment --help" in done.stderr


def test_help_says_what_it_writes() -> None:
    assert "NAME_overlay.jpg" in run("segment", "--help").stdout
    assert "segment" in run("--help").stdout


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = network(FCN)
    with torch.no_grad():
        model.decode_head.conv_seg.bias[1] = float("nan")
    model.save(tmp_path / "m.safetensors")
    picture(20, 20, 1).save(tmp_path / "a.ppm")
    done = run("segment", "--weights", tmp_path / "m.safetensors", "--json", tmp_path / "a.ppm")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"].startswith("the network gives values that are not finite")
