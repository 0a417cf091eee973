# SPDX-License-Identifier: Apache-2.0
"""The demo in short: two epochs, same seed same bits, every picture there; and the loop beneath it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from torch import nn
from vimcore import _core
from vimcore.cli import main
from vimcore.data.digits import encode_png, jiggle, load_digits, picture, split_digits
from vimcore.tools import demo
from vimcore.train import cosine_lr, evaluate, fit, parameter_groups

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("demo") / "first"
    assert main(["demo", "--epochs", "2", "--seed", "7", "--threads", "1", "--out", str(out), "--json"]) == 0
    return out


def test_it_learns_and_writes_everything(short: Path) -> None:
    metrics = json.loads((short / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.7  # guessing gives 0.1
    assert (metrics["seed"], metrics["epochs"], metrics["threads"]) == (7, 2, 1)
    assert metrics["seconds"] >= metrics["train_seconds"] > 0
    assert metrics["accuracy"] == pytest.approx(metrics["valid_accuracy"][-1])
    for name in ("curve.png", "predictions.png", "maps.png"):
        picture = _core.decode_image((short / name).read_bytes(), name)
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10
    digits = sorted((short / "digits").glob("*.png"))
    assert len(digits) == metrics["held_out"] == 359
    assert _core.decode_image(digits[0].read_bytes(), "digit").shape == (32, 32, 3)


def test_predict_reads_what_it_wrote(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = short / "vim_digits.safetensors"
    assert main(["predict", "--weights", str(weights), "--json", str(short / "digits")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 359
    right = [line["top"][0]["label"] == line["image"][-len("0.png")] for line in found]
    assert np.mean(right) == pytest.approx(json.loads((short / "metrics.json").read_text())["accuracy"])
    for line in found:
        assert len(line["top"]) == 5
        assert 0 < sum(entry["p"] for entry in line["top"]) <= 1 + 1e-5


def test_same_seed_same_bits_another_seed_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a fifth of the digits."""
    digits, labels = load_digits()
    monkeypatch.setattr(demo, "load_digits", lambda: (digits[:360], labels[:360]))
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for out, seed in ((first, "7"), (again, "7"), (other, "8")):
        if out == other:  # its weights will do
            for name in ("plot_curve", "plot_predictions", "plot_maps"):
                monkeypatch.setattr(demo, name, lambda *_: None)
        capsys.readouterr()
        assert main(["demo", "--epochs", "2", "--seed", seed, "--out", str(out), "--threads", "1"]) == 0
        text, error = capsys.readouterr()
        assert "Held-out digits" in text
        assert "epoch 2/2" in error
        assert "accuracy" in error
    for name in ("vim_digits.safetensors", "curve.png", "predictions.png", "maps.png"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    weights = [(out / "vim_digits.safetensors").read_bytes() for out in (first, other)]
    assert weights[0] != weights[1]


def test_threads_change_no_bit() -> None:
    weights = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = vimcore.VisionMamba(**demo.MODEL)
        digits, labels = load_digits()
        images = demo.network_input([encode_png(picture(digit)) for digit in digits[:96]])
        data = (images, torch.from_numpy(labels[:96]))
        fit(model, data, data, epochs=1, augment=jiggle, progress=False, **demo.RECIPE)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1]))
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[2]))


def test_saliency_points_at_what_matters(short: Path) -> None:
    """Painting over the patch that the map likes best costs the decision more than the one it likes least."""
    model = vimcore.VisionMamba.load(short / "vim_digits.safetensors")
    runtime = vimcore.Runtime(short / "vim_digits.safetensors")
    names = sorted((short / "digits").glob("*.png"))[:60]
    steps = _core.Preprocess(**runtime.preprocess)
    images = torch.from_numpy(
        np.stack([_core.preprocess_image(n.read_bytes(), n.name, steps) for n in names])
    )
    target = model(images).argmax(1)
    maps = vimcore.saliency(model, images, target)
    assert maps.shape == (60, 32, 32)
    assert maps.dtype == torch.float32
    assert float(maps.min()) >= 0
    assert torch.equal(maps, vimcore.saliency(model, images))  # the decision is the default target
    assert torch.equal(maps[3:5], vimcore.saliency(model, images[3:5]))
    other = vimcore.saliency(model, images, ((target + 1) % 10).tolist())
    assert not torch.allclose(maps, other)
    assert all(p.grad is None for p in model.parameters())

    patches = maps.reshape(60, 4, 8, 4, 8).sum(dim=(2, 4)).flatten(1)

    def score(which: torch.Tensor) -> torch.Tensor:
        cover = nn.functional.one_hot(which, 16).reshape(60, 1, 4, 4).float()
        cover = cover.repeat_interleave(8, 2).repeat_interleave(8, 3)
        mean = images.mean(dim=(2, 3), keepdim=True)
        logits = model(images * (1 - cover) + mean * cover).detach()
        return logits.gather(1, target[:, None])[:, 0] - logits.mean(1)

    best, least = score(patches.argmax(1)), score(patches.argmin(1))
    assert float((least - best).mean()) > 0.2
    assert float((best < least).float().mean()) > 0.7


def test_saliency_errors(short: Path) -> None:
    model = vimcore.VisionMamba.load(short / "vim_digits.safetensors")
    images = torch.zeros(2, 1, 32, 32)
    assert vimcore.saliency(model, images, 3).abs().max() == 0  # nothing to see in an even picture
    for target in (10, -1, [1, 2, 3], 0.5, [[1], [2]]):
        with pytest.raises(ValueError, match="target"):
            vimcore.saliency(model, images, target)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        vimcore.saliency(model, images[0])
    model.train()
    vimcore.saliency(model, images)
    assert model.training


# ---- data --------------------------------------------------------------------------------------------------


def test_digits() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert (int(images.min()), int(images.max())) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    train, held_out = split_digits(labels)
    assert sorted([*train, *held_out]) == list(range(1797))
    assert abs(len(held_out) - 1797 / 5) < 1
    assert np.bincount(labels[held_out]).min() >= 34


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (3, 5, 3), (64, 1, 3)])
def test_png(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found = _core.decode_image(encode_png(pixels), "x")
    assert np.array_equal(found, pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, 2))
    with pytest.raises(ValueError, match="encode_png"):
        encode_png(pixels.astype(np.float32))


# ---- training loop -----------------------------------------------------------------------------------------


def problem(seed: int = 0, **options: Any) -> tuple[vimcore.VisionMamba, tuple[torch.Tensor, torch.Tensor]]:
    """A small network and 40 images whose brighter half tells the class."""
    torch.manual_seed(seed)
    model = vimcore.VisionMamba(
        **{
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "num_classes": 2,
            "embed_dim": 16,
            "depth": 2,
            **options,
        }
    )
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    images[labels == 1, :, :, :4] += 1.5
    return model, (images, labels)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"decay": "mamba", "label_smoothing": 0.1}])
def test_fit_learns(options: dict[str, Any]) -> None:
    model, data = problem()
    history = fit(model, data, data, epochs=12, batch_size=8, lr=1e-2, warmup=1, progress=False, **options)
    assert history.valid_accuracy[-1] > 0.95
    assert history.loss[-1] < history.loss[0]
    assert not model.training
    result = evaluate(model, data)
    assert result.accuracy == history.valid_accuracy[-1]
    assert result.loss == pytest.approx(history.valid_loss[-1])
    assert result.logits.shape == (40, 2)
    assert {len(v) for v in (history.loss, history.accuracy, history.lr, history.valid_loss)} == {12}


def test_fit_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    weights = []
    for before in (1, 2):  # whatever was drawn before
        model, data = problem(drop_path_rate=0.2, drop_rate=0.1)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        fit(
            model,
            data,
            epochs=2,
            batch_size=16,
            seed=5,
            augment=lambda x, g: x + torch.randn(x.shape, generator=g),
            progress=False,
        )
        assert torch.equal(torch.get_rng_state(), state)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    model, data = problem(drop_path_rate=0.2, drop_rate=0.1)
    fit(model, data, epochs=2, batch_size=16, seed=6, progress=False)
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], model.parameters()))


def test_a_loss_that_is_not_finite_stops() -> None:
    model, data = problem()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, step 1 of 15"):
        fit(model, data, epochs=3, batch_size=8, progress=False)


def test_decay_groups() -> None:
    model, _ = problem()
    names = {id(p): name for name, p in model.named_parameters()}
    for decay in ("authors", "mamba"):
        groups = parameter_groups(model, 0.1, decay)
        assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
        decayed, free = ({names[id(p)] for p in g["params"]} for g in groups)
        assert decayed | free == set(names.values())
        assert not decayed & free
        assert {"pos_embed", "cls_token", "norm_f.weight", "head.bias", "layers.0.mixer.D"} <= free
        assert {"head.weight", "patch_embed.proj.weight", "layers.1.mixer.conv1d_b.weight"} <= decayed
        for log in ("layers.0.mixer.A_log", "layers.1.mixer.A_b_log"):
            assert (log in decayed) == (decay == "authors")
    with pytest.raises(ValueError, match="decay"):
        parameter_groups(model, 0.1, "none")


def test_schedule() -> None:
    rates = [cosine_lr(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.102


def test_fit_errors() -> None:
    model, data = problem()
    for options in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "ema": 1.0}):
        with pytest.raises(ValueError, match=r"\[fit\]"):
            fit(model, data, progress=False, **options)
    with pytest.raises(ValueError, match="as many labels as images"):
        fit(model, (data[0], data[1][:3]), epochs=1, progress=False)
    with pytest.raises(ValueError, match="as many labels as images"):
        evaluate(model, (data[0][:0], data[1][:0]))
