# SPDX-License-Identifier: Apache-2.0
"""Clips (VideoMamba): the network against the reference and the published layout of tensors, and at work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import assert_matches_reference, build, images_for, run, small
from numpy.typing import NDArray
from torch import Tensor
from vimcore.cli import main
from vimcore.config import model_options
from vimcore.data.clip_files import find_clips, frame_names, frames_of_clip, read_clip
from vimcore.data.digits import encode_png, load_digits, picture
from vimcore.nn.plain import Plain
from vimcore.pretraining import MaskedImages
from vimcore.weights.convert import convert

CLIPS = small(class_token="head", average_directions=False, frames=3)
CASES = {
    "published": {},
    "no token": {"class_token": "none"},
    "middle": {"class_token": "middle"},
    "double": {"class_token": "double", "norm": "layer"},
    "registers": {"class_token": "registers", "registers": 4, "neck_reduction": 2},
    "one frame": {"frames": 1},
    "without positions": {"pos_embed": False},
    "every token": {"class_token": "none", "pool": "all"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    config = reference.Config(**{**CLIPS.arguments(), **CASES[name]})
    assert_matches_reference(config, 2, dtype)


@pytest.mark.parametrize(
    "options", [{}, {"class_token": "middle"}, {"class_token": "registers", "registers": 2}]
)
def test_a_clip_of_one_frame_is_an_image(options: dict[str, Any]) -> None:
    config = small(class_token="head", average_directions=False)
    config = reference.Config(**{**config.arguments(), **options})
    of_images = build(config)
    of_clips = vimcore.VisionMamba(**{**of_images.config, "frames": 1})
    state = of_images.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, None]
    state["temporal_pos_embedding"] = torch.zeros(1, 1, 16)
    of_clips.load_state_dict(state)
    images = images_for(config, 2, torch.float32)
    logits, gradients = run(of_images, images)
    found, others = run(of_clips, images[:, :, None])
    assert torch.equal(found, logits)
    assert torch.equal(others["input"][:, :, 0], gradients["input"])
    for name, gradient in gradients.items():
        assert relative(others[name].view_as(gradient), gradient) < 1e-6, name


def test_other_sizes_maps_and_the_plain_twin() -> None:
    model = build(CLIPS, dtype=torch.float64).eval()
    model.dynamic_img_size = True
    larger = build(CLIPS, dtype=torch.float64).eval()
    larger.set_input_size((16, 16))
    images = torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert tokens.shape == (2, 1 + 3 * 16, 16)
        assert relative(larger.forward_features(images), tokens) < 1e-12
        assert relative(Plain(model, lambda name, x: None).tokens(images), tokens) < 1e-12
        (stream,) = model.forward_intermediates(images, [-1])
    assert stream.shape == (2, 16, 3, 4, 4)
    with pytest.raises(ValueError, match="of clips: expected multiples of patch_size, 4, got 18 x 16"):
        model(torch.randn(1, 3, 3, 18, 16, dtype=torch.float64))
    for frames in (2, 6):  # of another length; which one divides does not matter
        expected = rf"expected \(B, 3, 3, H, W\) f64 cpu, got \(1, 3, {frames}, 16, 16\)"
        with pytest.raises(ValueError, match=expected):
            model(torch.randn(1, 3, frames, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \(1, 3, 16, 16\)"):
        model(torch.randn(1, 3, 16, 16, dtype=torch.float64))


def test_for_classification_only() -> None:
    backbone = vimcore.VisionMamba(**{**CLIPS.arguments(), "img_size": 16, "num_classes": 0})
    images = torch.randn(1, 3, 3, 16, 16)
    for refused in (
        lambda: vimcore.segmentation.FCN(backbone, 5),
        lambda: MaskedImages(backbone),
        lambda: vimcore.attention_maps(backbone, images),
        lambda: vimcore.effective_receptive_field(backbone, images),
    ):
        with pytest.raises(ValueError, match="clips"):
            refused()
    with pytest.raises(ValueError, match=r"images: expected \(B, C, H, W\)"):
        vimcore.saliency(build(CLIPS), torch.randn(1, 3, 3, 8, 12))


# ---- the published networks --------------------------------------------------------------------------------

PUBLISHED = {"tiny": (192, 24, 7), "small": (384, 24, 26), "middle": (576, 32, 74)}  # width, depth, millions
COUNTS = {"tiny": 7_035_280, "small": 25_571_728, "middle": 73_880_464}  # 16 frames, 400 classes


def layout(width: int, depth: int, frames: int, classes: int) -> dict[str, list[int]]:
    """Keys and shapes in the order of the state dict that the authors' module for videos has."""
    inner, rank = 2 * width, -(-width // 16)
    found = {
        "cls_token": [1, 1, width],
        "pos_embed": [1, 197, width],
        "temporal_pos_embedding": [1, frames, width],
        "patch_embed.proj.weight": [width, 3, 1, 16, 16],
        "patch_embed.proj.bias": [width],
        "head.weight": [classes, width],
        "head.bias": [classes],
    }
    for layer in range(depth):
        mixer = {"A_log": [inner, 16], "D": [inner], "A_b_log": [inner, 16], "D_b": [inner]}
        mixer["in_proj.weight"] = [2 * inner, width]
        for side in ("", "_b"):
            mixer[f"conv1d{side}.weight"], mixer[f"conv1d{side}.bias"] = [inner, 1, 4], [inner]
            mixer[f"x_proj{side}.weight"] = [rank + 32, inner]
            mixer[f"dt_proj{side}.weight"], mixer[f"dt_proj{side}.bias"] = [inner, rank], [inner]
        mixer["out_proj.weight"] = [width, inner]
        found.update({f"layers.{layer}.mixer.{key}": shape for key, shape in mixer.items()})
        found[f"layers.{layer}.norm.weight"] = [width]
    found["norm_f.weight"] = [width]
    return found


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_layout(size: str) -> None:
    width, depth, millions = PUBLISHED[size]
    config = vimcore.Config(**model_options(f"videomamba_{size}_patch16_224"))
    shapes = {key: list(shape) for key, shape in config.param_shapes().items()}
    assert shapes == layout(width, depth, 16, 400)
    assert not config.average_directions
    count = sum(map(math.prod, shapes.values()))
    assert count == COUNTS[size]
    assert round(count / 1e6) == millions


def test_published_checkpoints_load_strictly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = layout(24, 2, 2, 10)
    state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    torch.save({"model": state}, tmp_path / "videomamba.pth")
    options = {"embed_dim": 24, "depth": 2, "frames": 2, "num_classes": 10}
    model = vimcore.create_model("videomamba_tiny_patch16_224", **options)
    assert list(model.state_dict()) == list(state)
    vimcore.load_checkpoint(model, tmp_path / "videomamba.pth")
    clip = torch.randn(1, 3, 2, 224, 224, generator=generator)
    truth = reference.forward(
        reference.Config(class_token="head", average_directions=False, **options),
        {key: value.double() for key, value in state.items()},
        clip.double(),
    )
    assert relative(model.eval()(clip), truth.logits) < 1e-5

    config, assumptions = convert(str(tmp_path / "videomamba.pth"), str(tmp_path / "F.safetensors"))
    assert config == model.config
    assert any("average_directions=False" in text for text in assumptions)
    runtime = vimcore.Runtime(tmp_path / "F.safetensors")
    np.testing.assert_array_equal(runtime(clip.numpy()), model(clip).detach().numpy())
    with pytest.raises(
        ValueError, match=r"expected \(B, 3, 2, 224, 224\) f32 cpu, got \(1, 3, 1, 224, 224\)"
    ):
        runtime(clip[:, :, :1].numpy())

    pixels = np.random.default_rng(0).integers(0, 256, (6, 250, 260, 3), np.uint8)
    shown = runtime.clip_input(pixels)
    assert shown.shape == (1, 3, 2, 224, 224)
    steps = vimcore._core.Preprocess(**runtime.preprocess)
    for place, frame in enumerate((1, 4)):  # the middle ones of the parts 0 1 2 and 3 4 5
        np.testing.assert_array_equal(
            shown[0, :, place], vimcore._core.preprocess_pixels(pixels[frame], steps)
        )
    with pytest.raises(ValueError, match="5 frames, which 2 do not divide"):
        runtime.clip_input(pixels[:5])
    assert main(["health", "--weights", str(tmp_path / "F.safetensors"), "--count", "1"]) == 0

    tubelets = {**state, "patch_embed.proj.weight": torch.zeros(24, 3, 2, 16, 16)}
    torch.save({"model": tubelets}, tmp_path / "tubelets.pth")
    with pytest.raises(ValueError, match=r"tubelets\) of 2 frames; expected patches of one frame"):
        convert(str(tmp_path / "tubelets.pth"), str(tmp_path / "G.safetensors"))
    with pytest.raises(ValueError, match=r"expected \(24, 3, 1, 16, 16\), got \(24, 3, 2, 16, 16\)"):
        vimcore.load_checkpoint(model, tmp_path / "tubelets.pth")
    del state["temporal_pos_embedding"]
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"missing: temporal_pos_embedding \(1, 2, 24\)"):
        vimcore.load_checkpoint(model, tmp_path / "cut.pth")


# ---- clips on the disk -------------------------------------------------------------------------------------


def write_frames(folder: Path, clip: NDArray[np.uint8], first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        (folder / f"frame{first + number}.png").write_bytes(encode_png(frame))
    return folder


def test_files_of_clips(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), np.uint8)
    folder = write_frames(tmp_path / "b", clip, 5)  # frame5 .. frame16: not in the order of bytes
    np.save(tmp_path / "a.npy", clip)
    (tmp_path / "notes.txt").write_text("no clip")
    assert list(find_clips(str(tmp_path))) == [str(tmp_path / "a.npy"), str(folder)]
    assert [Path(name).stem for name in frame_names(str(folder))] == [f"frame{n}" for n in range(5, 17)]
    for name in (str(folder), str(tmp_path / "a.npy")):
        np.testing.assert_array_equal(read_clip(name, 12), clip)
        np.testing.assert_array_equal(read_clip(name, 4), clip[[1, 4, 7, 10]])
        with pytest.raises(ValueError, match="12 frames, which 5 do not divide: expected 5 or a multiple"):
            frames_of_clip(name, 5)
    np.save(tmp_path / "a.npy", clip[..., :1])
    assert read_clip(str(tmp_path / "a.npy"), 12).shape == (12, 5, 6, 3)
    for bad, message in (
        (clip[0], "expected an array"),
        (clip.astype(np.float32), "expected uint8, got float32"),
    ):
        np.save(tmp_path / "a.npy", bad)
        with pytest.raises(ValueError, match=message):
            frames_of_clip(str(tmp_path / "a.npy"), 2)
    (tmp_path / "a.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"a\.npy"):
        frames_of_clip(str(tmp_path / "a.npy"), 2)
    write_frames(tmp_path / "c", clip[:1])
    (tmp_path / "c" / "frame9.png").write_bytes(encode_png(clip[0, :4]))
    with pytest.raises(ValueError, match="frames of different sizes: 4 x 6, 5 x 6"):
        read_clip(str(tmp_path / "c"), 2)


def moving_digits(folder: Path, count: int, seed: int) -> Path:
    """Clips of a digit that moves, in class folders of its direction; left is right seen backwards.

    So the frames of a clip alone do not tell left from right, nor up from down: their order does.
    """
    rng, pixels = np.random.default_rng(seed), load_digits()[0]
    for n in range(count):
        digit = picture(pixels[rng.integers(len(pixels))])[::4, ::4]  # 8 x 8
        for vertical, (there, back) in enumerate((("right", "left"), ("down", "up"))):
            clip = np.zeros((3, 16, 16, 1), np.uint8)
            across = rng.integers(9)
            for t, frame in enumerate(clip):
                y, x = (4 * t, across) if vertical else (across, 4 * t)
                frame[y : y + 8, x : x + 8, 0] = digit
            for name, values in ((there, clip), (back, clip[::-1])):
                if n % 4 == 0:
                    write_frames(folder / name / f"{n}", values[..., 0])
                else:
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    np.save(folder / name / f"{n}.npy", values)
    return folder


@pytest.mark.slow
def test_train_evaluate_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moving_digits(tmp_path / "data" / "train", 40, 0)
    val, out = moving_digits(tmp_path / "data" / "val", 15, 1), tmp_path / "run"
    command = f"train --data {tmp_path / 'data'} --out {out} --model videomamba_tiny_patch16_224 --frames 3"
    command += " --img-size 16 --patch-size 8 --embed-dim 32 --depth 2 --in-chans 1 --workers 0 --threads 1"
    command += " --epochs 16 --eval-every 16 --checkpoint-every 16 --batch-size 16 --lr 5e-3 --no-scale-lr"
    command += " --weight-decay 0.05 --ema 0 --repeats 1 --mixup 0 --cutmix 0 --augment none --crop-pct 1"
    assert main(command.split()) == 0
    assert "160 clips of 4 classes to learn from" in capsys.readouterr().err
    weights = str(out / "best.safetensors")

    assert main(["eval", weights, "--data", str(val), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] >= 0.9  # 0.5 without the order of frames

    assert main(["predict", "--weights", weights, "--json", str(val / "left"), str(val / "right" / "0")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 16
    right = [line["top"][0]["label"] == Path(line["image"]).parent.name for line in lines]
    assert sum(right) >= 13
    assert main(["predict", "--weights", weights, "--json", str(val / "left" / "0" / "frame0.png")]) == 1
    assert "a clip is a folder of pictures or a .npy file" in capsys.readouterr().out
    assert main(["info", weights]) == 0
    assert "13: 3 frames of 2 x 2 patches, class tokens: 1" in capsys.readouterr().out


def test_training_of_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Augmented alike in all frames, mixed, from weights of images; lengths that do not divide are told."""
    data, out = moving_digits(tmp_path / "data", 4, 0), tmp_path / "run"
    image = vimcore.create_model(
        "vim_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_classes=4,
        class_token="head", average_directions=False,
    )  # fmt: skip
    image.save(tmp_path / "image.safetensors")
    command = ["train", "--data", str(data), "--model", "videomamba_tiny_patch16_224", "--out", str(out)]
    command += ["--img-size", "16", "--patch-size", "8", "--embed-dim", "16", "--depth", "2", "--epochs", "1"]
    command += ["--batch-size", "4", "--workers", "0", "--threads", "1", "--val-fraction", "0.25"]
    assert main([*command, "--frames", "2"]) == 1
    assert "3 frames, which 2 do not divide" in capsys.readouterr().err
    assert main([*command, "--frames", "3", "--init", str(tmp_path / "image.safetensors")]) == 0
    assert "every frame begins as one" in capsys.readouterr().err
    assert vimcore.VisionMamba.load(out / "last.safetensors").config["frames"] == 3


def test_clips_of_another_length_start_a_network(tmp_path: Path) -> None:
    """Positions in time are those between, in the middles of the longer frames; all else is as it was."""
    from vimcore.tasks import backbone
    from vimcore.tasks.classification.settings import ClassificationSettings

    old = build(CLIPS)
    old.save(tmp_path / "three.safetensors", labels=[str(i) for i in range(old.num_classes)])
    settings = ClassificationSettings(init=str(tmp_path / "three.safetensors"))
    new = vimcore.VisionMamba(**{**old.config, "frames": 6})
    notes = backbone.start_from(new, settings, [str(i) for i in range(old.num_classes)])
    assert "positions in time resized from 3 to 6 frames (linear)" in notes
    state = old.state_dict()
    a, b, c = state.pop("temporal_pos_embedding")[0]
    between = torch.stack(
        [a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, 0.75 * b + 0.25 * c, 0.25 * b + 0.75 * c, c]
    )
    torch.testing.assert_close(new.temporal_pos_embedding[0], between)
    assert all(torch.equal(new.state_dict()[name], value) for name, value in state.items())


def test_random_frames(tmp_path: Path) -> None:
    """One of each part, by the sample's seed; validation sees the middle ones."""
    from vimcore.data.classes import Training
    from vimcore.tasks.classification.settings import ClassificationSettings
    from vimcore.tasks.classification.task import Classification

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        clip = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None], (12, 8, 8, 3))
        np.save(tmp_path / name / "clip.npy", clip)
    settings = ClassificationSettings(
        data=str(tmp_path), val=str(tmp_path), frames=3, frame_sampling="random", augment="none",
        model="videomamba_tiny_patch16_224", img_size=(8,), mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    data = Classification(settings).data()

    def shown(sample: Any) -> list[int]:
        return [round(255 * float(value)) for value in sample.images[0, :, 0, 0]]

    assert isinstance(data.train, Training)
    seen = [shown(data.train[0, seed]) for seed in range(40)]
    assert seen == [shown(data.train[0, seed]) for seed in range(40)]
    for t in range(3):
        assert {frames[t] for frames in seen} == set(range(4 * t, 4 * t + 4))
    assert shown(data.valid[0]) == [2, 6, 10]
    data = Classification(settings.merged({"frame_sampling": "middle"})).data()
    assert shown(data.train[0, 1]) == [2, 6, 10]


def test_frames_are_augmented_alike() -> None:
    from vimcore.data.transforms import Augment, Input, clip_train

    of = Input(3, (16, 16), (0.5,) * 3, (0.25,) * 3, 18)
    frame = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    torch.manual_seed(0)
    clip: Tensor = clip_train(of, Augment())(np.stack([frame] * 3))
    assert clip.shape == (3, 3, 16, 16)
    assert torch.equal(clip[:, 0], clip[:, 1])
    assert torch.equal(clip[:, 0], clip[:, 2])
