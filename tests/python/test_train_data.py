# SPDX-License-Identifier: Apache-2.0
"""Where training images come from, in which order, how they are changed, and what happens to bad ones."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from train_helpers import ONCE, SMALL, folder, log
from vimcore import _core
from vimcore.cli import main
from vimcore.data import transforms
from vimcore.data.classes import Images, Training, Validation, collate, open_images, training_and_validation
from vimcore.data.sampling import EpochSampler, derive_seed
from vimcore.data.transforms import Augment, Input

GREY = Input(1, (16, 16), (0.5,), (0.5,), 18)
COLOUR = Input(3, (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 18)


# ---- sources -----------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "all")
    (root / "digit 0" / "deeper").mkdir()
    (root / "digit 0" / "000.png").rename(root / "digit 0" / "deeper" / "000.png")
    (root / "digit 1" / "notes.txt").write_text("x")
    found = open_images(str(root))
    assert found.classes == ["digit 0", "digit 1", "digit 7"]
    assert (len(found), sum(found.passed_over.values())) == (36, 1)
    assert np.bincount(found.labels).tolist() == [12, 12, 12]
    assert all(found.classes[label] in name for name, label in zip(found.files, found.labels))
    train, valid, about = training_and_validation(str(root), None, 0.25)
    assert (len(train), np.bincount(valid.labels).tolist()) == (27, [3, 3, 3])
    assert not set(train.files) & set(valid.files)
    assert "every 4th image" in about
    assert train.fingerprint() != valid.fingerprint()
    assert train.fingerprint() == training_and_validation(str(root), None, 0.25)[0].fingerprint()


def test_every_class_gives_its_share_to_validation(tmp_path: Path) -> None:
    """Classes of other sizes: of each the fraction, from the middle of equal parts of its files."""
    for digit, each in ((0, 12), (1, 5), (7, 8)):
        folder(tmp_path, digits=(digit,), each=each)
    train, valid, _ = training_and_validation(str(tmp_path), None, 0.25)
    held = {name: [Path(f).stem for f in valid.files if name in f] for name in valid.classes}
    assert held == {"digit 0": ["002", "006", "010"], "digit 1": ["002"], "digit 7": ["002", "006"]}
    assert len({*train.files, *valid.files}) == len(train) + len(valid) == 25


def test_train_and_val_folders(tmp_path: Path) -> None:
    folder(tmp_path / "train", digits=(2, 3, 4))
    folder(tmp_path / "val", digits=(3,), each=2, first=20)
    train, valid, _ = training_and_validation(str(tmp_path), None, 0.1)
    assert (len(train), len(valid), valid.labels.tolist()) == (36, 2, [1, 1])
    folder(tmp_path / "other", digits=(3, 9), each=2)
    with pytest.raises(ValueError, match="does not have: digit 9; it has digit 2, digit 3, digit 4"):
        training_and_validation(str(tmp_path), str(tmp_path / "other"), 0.1)


def test_csv(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures", digits=(0, 1), each=3)
    names = sorted(str(p.relative_to(tmp_path)) for p in root.rglob("*.png"))
    lines = ["label,path"] + [f"{10 if 'digit 1' in name else 9},{name}" for name in names]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    found = open_images(str(tmp_path / "list.csv"))
    assert found.classes == ["9", "10"]  # numbers by value
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.read(5).shape[2] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,1\n", "expected the columns path and label"),
        ("path,label\na.png,\n", "line 2: expected a path and a label"),
        ("path,label\n", "no images"),
        ("path,label\na.png,1\nb.npy,2\n", "found both"),
    ],
)
def test_wrong_csv(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path / "list.csv"))


def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "some", digits=(0, 1), each=2)
    (root / "empty").mkdir()
    (tmp_path / "none").mkdir()
    for data, message in (
        (str(root), "class folders without images: empty"),
        (str(tmp_path / "none"), "no images in class folders"),
        (str(tmp_path / "absent"), "absent: No such file or directory"),
    ):
        assert main(["train", "--data", data, "--out", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert "data: name a folder" in capsys.readouterr().err
    (root / "empty").rmdir()
    for options, message in (
        (["--batch-size", "64"], "4 images to learn from do not fill one update of 64"),
        (["--val-fraction", "0"], "holds out 0 of 4"),
        (["--in-chans", "4"], "expected 1 or 3 for pictures, got 4"),
        (["--mean", "0.5"], "mean and std: expected 3 values each"),
        (["--precision", "float16", "--device", "cpu"], "precision: expected 'float32' or 'bfloat16' on cpu"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda"),
        (["--device", "cuda:99"], "device: cuda:99: "),
        (["--init", str(tmp_path / "absent.pth")], "absent.pth"),
    ):
        arguments = ["--data", str(root), "--val-fraction", "0.5", "--out", str(tmp_path / "run"), *SMALL]
        if "--val-fraction" not in options and "64" in options:
            arguments[arguments.index("0.5")] = "0"
            arguments += ["--val", str(root)]
        assert main(["train", *arguments, *options]) == 1, options
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# ---- order and seeds ---------------------------------------------------------------------------------------


def test_order() -> None:
    order = EpochSampler(103, 8, 0, 1, seed=1, repeats=1)
    order.set_epoch(0, 0)
    first = list(order)
    assert len(first) == len(order) == 12
    keys = [key for batch in first for key in batch]
    assert len({index for index, _ in keys}) == len({seed for _, seed in keys}) == 96
    order.set_epoch(0, 5)
    assert list(order) == first[5:]
    order.set_epoch(1, 0)
    assert list(order) != first
    other = EpochSampler(103, 8, 0, 1, seed=2, repeats=1)
    other.set_epoch(0, 0)
    assert list(other) != first


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_processes_see_what_one_with_double_batches_sees(repeats: int) -> None:
    one = EpochSampler(301, 8, 0, 1, 5, repeats)
    two = [EpochSampler(301, 4, rank, 2, 5, repeats) for rank in (0, 1)]
    for order in (one, *two):
        order.set_epoch(3, 1)
    batches = list(zip(*two))
    assert [sorted(a + b) for a, b in batches] == [sorted(batch) for batch in one]
    if repeats == 3:
        keys = [key for batch in one for key in batch]
        assert len(one) == 256 // 8
        assert len({index for index, _ in keys}) <= len(keys) // 3 + 2
        assert len({seed for _, seed in keys}) == len(keys)


def test_seeds_differ() -> None:
    assert len({derive_seed("sample", 0, epoch, place) for epoch in range(20) for place in range(50)}) == 1000
    assert derive_seed("sample", 1, 2) != derive_seed("sample", 12)
    assert derive_seed("a", 1) == derive_seed("a", 1) < 2**63


@pytest.mark.parametrize("of", [GREY, COLOUR])
def test_a_sample_depends_on_its_seed_alone(of: Input, tmp_path: Path) -> None:
    images = open_images(str(folder(tmp_path / "x", each=2)))
    training = Training(images, transforms.picture_train(of, Augment()))
    once = training[(3, 17)].images
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    training[(1, 4)]
    assert torch.equal(training[(3, 17)].images, once)
    assert once.shape == (of.channels, 16, 16)
    assert once.dtype == torch.float32
    assert not torch.equal(training[(3, 18)].images, once)
    sent = pickle.loads(pickle.dumps(training))  # as to a loading process that is not forked
    assert torch.equal(sent[(3, 17)].images, once)


# ---- transforms --------------------------------------------------------------------------------------------


def test_validation_sees_what_predict_sees(tmp_path: Path) -> None:
    images = open_images(str(folder(tmp_path / "x", each=3)))
    for of in (GREY, COLOUR):
        valid = Validation(images, transforms.picture_eval(of), (of.channels, 16, 16))
        for i, name in enumerate(images.files):
            wanted = _core.preprocess_image(Path(name).read_bytes(), name, _core.Preprocess(**of.preprocess))
            assert np.array_equal(valid[i].images.numpy(), wanted)
            assert int(valid[i].indices) == i


@pytest.mark.slow
def test_training_pictures_are_crops_flips_and_erasures() -> None:
    """Of a picture whose left half is black and right half is white, without colour changes."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    plain = Augment(rand_augment="", color_jitter=0.0, random_erase=0.0, crop_scale=(1.0, 1.0))
    black, white = -COLOUR.mean[0] / COLOUR.std[0], (1 - COLOUR.mean[0]) / COLOUR.std[0]

    def drawn(augment: Augment) -> torch.Tensor:
        images = Images(["x"], np.zeros(1, np.int64), ["a"], pixels[None])
        training = Training(images, transforms.picture_train(COLOUR, augment))
        return torch.stack([training[(0, seed)].images for seed in range(60)])

    left = drawn(plain)[:, 0, :, 2].mean(1)
    flipped = (left - white).abs() < 0.05
    assert 15 < int(flipped.sum()) < 45
    assert int(((left - black).abs() < 0.05).sum()) == 60 - int(flipped.sum())
    assert int((drawn(replace(plain, hflip=0.0))[:, 0, :, 2] > 0).sum()) == 0
    erased = drawn(replace(plain, random_erase=1.0, hflip=0.0)) != drawn(replace(plain, hflip=0.0))
    assert bool(erased.any(1).flatten(1).any(1).all())  # a box in each
    assert 0.02 < float(erased.any(1).float().mean()) < 0.33
    strong = drawn(replace(plain, rand_augment="rand-m9-mstd0.5-inc1"))
    assert len({tuple(image.flatten().tolist()) for image in strong}) > 30


def test_three_augment_is_one_of_three() -> None:
    """Of a picture in one colour that is not grey: a third of the draws takes the colour away."""
    pixels = np.broadcast_to(np.array([200, 40, 90], np.uint8), (1, 24, 24, 3))
    images = Images(["x"], np.zeros(1, np.int64), ["a"], pixels)
    three = Augment(rand_augment="3a", color_jitter=0.0, random_erase=0.0)
    training = Training(images, transforms.picture_train(COLOUR, three))
    mean, std = torch.tensor(COLOUR.mean), torch.tensor(COLOUR.std)
    colours = torch.stack([training[(0, seed)].images[:, 3, 3] * std + mean for seed in range(60)])
    grey = int((colours.amax(1) - colours.amin(1) < 1e-3).sum())
    same = int(((colours - torch.tensor([200, 40, 90]) / 255).abs().amax(1) < 1e-2).sum())
    assert 8 < grey < 35
    assert 8 < same < 35  # blurred; the others are solarised


@pytest.mark.slow
def test_every_strength_of_posterize() -> None:
    """Noise on the magnitude may leave no bits, which Pillow refuses: the picture is black then."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    for bits in range(9):
        levels = np.unique(np.asarray(transforms._posterize(ramp, bits)))
        assert len(levels) == 2**bits
    images = Images(["x"], np.zeros(1, np.int64), ["a"], np.asarray(ramp)[None])
    strongest = Augment(rand_augment="rand-m10-mstd0.5-inc1")
    training = Training(images, transforms.picture_train(COLOUR, strongest))
    assert all(not training[(0, seed)].errors for seed in range(300))
    with pytest.raises(ValueError, match="rand_augment: timm does not take 'strong'"):
        transforms.picture_train(COLOUR, Augment(rand_augment="strong"))


def test_integers_are_shares_of_their_range() -> None:
    for dtype in (np.uint8, np.uint16):
        most = np.iinfo(dtype).max
        values = transforms.scaled(np.array([[[0, most // 5, most]]], dtype))
        assert values.tolist() == [[[0.0, pytest.approx(0.2), 1.0]]]
    assert transforms.scaled(np.array([[[-3.0, 70000.0]]])).tolist() == [[[-3.0, 70000.0]]]
    with pytest.raises(transforms.UnreadableError, match="got int32"):
        transforms.scaled(np.zeros((1, 1, 1), np.int32))


@pytest.mark.slow
def test_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five channels in numpy files of two types: statistics measured, trained, evaluated."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            array = rng.normal(0.3 if label == "a" else 0.6, 0.1, (5, 18 + i % 3, 20)).clip(0, 1)
            typed = (array * 65535).astype(np.uint16) if i % 2 else array.astype(np.float64)
            np.save(tmp_path / "data" / label / f"{i}.npy", typed)
    np.save(tmp_path / "data" / "a" / "three.npy", np.zeros((3, 18, 20), np.float32))
    np.save(tmp_path / "data" / "a" / "flat.npy", np.zeros((18, 20), np.float32))
    np.save(tmp_path / "data" / "b" / "nan.npy", np.full((5, 18, 20), np.nan, np.float32))
    np.save(tmp_path / "data" / "b" / "whole.npy", np.zeros((5, 18, 20), np.int64))
    (tmp_path / "data" / "b" / "object.npy").write_bytes(b"\x93NUMPY\x01\x00")
    run = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "data"), "--out", str(run), *SMALL, *ONCE, "--epochs", "6"]
    flags = [
        "--lr",
        "5e-3",
        "--no-scale-lr",
        "--warmup-epochs",
        "1",
        "--schedule-steps",
        "update",
        "--ema",
        "0",
    ]
    assert main(["train", *arguments, *flags, "--val-fraction", "0.3", "--json"]) == 0
    out, error = capsys.readouterr()
    summary = json.loads(out)
    assert summary["skipped"] == 5
    assert summary["best"]["top1"] > 0.9
    for reason in (
        "5 channels (C, H, W), got (3, 18, 20)",
        "(C, H, W), got (18, 20)",
        "not finite",
        "uint8, uint16 or floating point, got int64",
    ):
        assert reason in error
    config = (run / "config.toml").read_text()
    assert "in_chans = 5" in config
    model = vimcore.VisionMamba.load(run / "best.safetensors")
    assert model.config["in_chans"] == 5
    assert main(["eval", str(run / "best.safetensors"), "--json", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == summary["best"]["top1"]


# ---- what cannot be read -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_corrupt_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "x")
    good = (root / "digit 1" / "003.png").read_bytes()
    bad = {
        "digit 0/003.png": good[: len(good) // 2],
        "digit 1/004.png": b"",
        "digit 7/005.png": b"GIF89a" + bytes(40),
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
    (root / "digit 7" / "006.png").unlink()
    (root / "digit 7" / "006.png").symlink_to("nowhere")
    run = tmp_path / "run"
    arguments = ["--data", str(root), "--val", str(root), "--out", str(run), *SMALL, *ONCE, "--epochs", "2"]
    assert main(["train", *arguments, "--workers", "2", "--json"]) == 0
    out, error = capsys.readouterr()
    summary = json.loads(out)
    assert summary["skipped"] == 4
    errors = {line["file"]: line["error"] for line in log(run) if line["kind"] == "fault"}
    assert set(errors) == {str(root / name) for name in (*bad, "digit 7/006.png")}
    assert error.count("vimcore: skipped ") == 4  # each once
    saved = np.load(run / "eval.npz")
    assert len(saved["files"]) == 32
    assert not set(saved["files"].tolist()) & set(errors)
    assert main(["eval", str(run), "--workers", "0"]) == 0
    out, error = capsys.readouterr()
    assert "4 images could not be read" in out
    assert error.count("vimcore: skipped ") == 4


def test_the_next_image_takes_the_place() -> None:
    pixels = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    images = Images([], np.arange(3), ["a", "b", "c"], pixels)

    def transform(array: np.ndarray) -> torch.Tensor:
        if array[0, 0, 0] == 1:
            raise transforms.UnreadableError("broken")
        return torch.from_numpy(array)

    batch = collate([Training(images, transform)[(i, 0)] for i in range(3)])
    assert batch.labels.tolist() == batch.indices.tolist() == [0, 2, 2]
    assert batch.errors == {"image 1": "broken"}
    with pytest.raises(RuntimeError, match=r"1 images in a row cannot be read, the last: image 0: broken"):
        Training(images.subset(np.array([1])), transform)[(0, 0)]
