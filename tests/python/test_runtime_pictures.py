# SPDX-License-Identifier: Apache-2.0
"""`Runtime.predict` and `embed` of pictures as people have them; what notebooks show; `vimcore.show`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from vimcore import _core
from vimcore.results import Predictions

SIZES: dict[str, Any] = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 3}
LABELS = ["a <b>", "cat", "dog"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    torch.manual_seed(2)
    vimcore.VisionMamba(**SIZES).save(tmp_path / "a.safetensors", LABELS)
    return str(tmp_path / "a.safetensors")


def pixels(number: int = 0) -> Any:
    return np.random.default_rng(number).integers(0, 256, (30, 41, 3), np.uint8)


def test_all_kinds_are_one_picture(path: str, tmp_path: Path) -> None:
    """Logits as from `vimcore predict` and by hand."""
    runtime, file = vimcore.Runtime(path), tmp_path / "x.png"
    Image.fromarray(pixels()).save(file)
    steps = _core.Preprocess(**runtime.preprocess)  # type: ignore[arg-type]
    wanted = runtime(_core.preprocess_pixels(pixels(), steps)[None])[0]
    kinds = [str(file), file, file.read_bytes(), Image.open(file), Image.fromarray(pixels()), pixels()]
    for one in kinds:
        found = runtime.predict(one, topk=2)
        assert isinstance(found, vimcore.results.Prediction)  # type: ignore[attr-defined]
        assert np.array_equal(found.logits, wanted)
        assert (found.index, found.label, len(found.top)) == (wanted.argmax(), LABELS[wanted.argmax()], 2)
        assert found.p == pytest.approx(float(np.exp(wanted).max() / np.exp(wanted).sum()))
    several = runtime.predict(kinds, batch=4)
    assert isinstance(several, Predictions)
    assert all(np.array_equal(one.logits, wanted) for one in several)
    assert [one.image for one in several] == [
        str(file),
        str(file),
        "image 2",
        str(file),
        "image 4",
        "image 5",
    ]
    stack = runtime.predict(np.stack([pixels(1), pixels()]))
    assert np.array_equal(stack[1].logits, wanted)
    grey = pixels()[:, :, 0]
    assert np.array_equal(
        runtime.embed(grey), runtime.embed(Image.fromarray(grey).convert("RGB"), progress=False)
    )
    turned = Image.fromarray(pixels())
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", quality=95)
    turned = Image.open(tmp_path / "turned.jpg")
    assert np.allclose(runtime.embed(turned), runtime.embed(tmp_path / "turned.jpg"), atol=0.05)


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_token": "head"}, {"class_token": "double"}]
    + [{"class_token": "none", "pool": pool} for pool in ("mean", "max", "last", "all")],
)
def test_embeddings_are_what_the_head_reads(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = vimcore.VisionMamba(**SIZES, **changes).eval()
    model.save(tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 16, 24)
    found = vimcore.Runtime(tmp_path / "a.safetensors").embeddings(images.numpy())
    tokens = model.forward_features(images)
    if changes.get("pool") in ("max", "all"):
        wanted = tokens.amax(1) if changes["pool"] == "max" else tokens.mean(1)
    else:
        seen: list[torch.Tensor] = []
        model.head.register_forward_hook(lambda m, given, out: seen.append(given[0]))
        model(images)
        wanted = seen[0]
    assert np.allclose(found, wanted.detach(), atol=2e-6)
    bare = vimcore.VisionMamba(**{**SIZES, "num_classes": 0}, **changes)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    bare.save(tmp_path / "bare.safetensors")
    again = vimcore.Runtime(tmp_path / "bare.safetensors").embeddings(images.numpy())
    assert np.allclose(again, found, atol=1e-6)


def test_refuses(path: str, tmp_path: Path) -> None:
    runtime = vimcore.Runtime(path)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    cases: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, r"predict: expected a path, bytes .* got int"),
        ([pixels(), None], TypeError, "got NoneType at place 1"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), TypeError, r"got ndarray \(2, 3, 4, 5, 3\)"),
        (
            np.zeros((16, 24, 3), np.float32),
            ValueError,
            r"image 0: expected uint8 pixels, got float32; .*runtime",
        ),
        (
            np.zeros((3, 16, 24), np.uint8),
            ValueError,
            r"expected pixels \(H, W, 3\), \(H, W, 4\) or \(H, W\), got \(3, 16, 24\)",
        ),
        ([pixels(), tmp_path / "bad.png"], ValueError, r"bad\.png: "),
        (str(tmp_path / "none.jpg"), ValueError, r"none\.jpg: No such file"),
        (Image.new("F", (4, 4)), ValueError, "8 or 16 bits, grey or colour, got mode F"),
    ]
    for x, kind, said in cases:
        with pytest.raises(kind, match=said):
            runtime.predict(x)
    for given, shown in (
        (pixels(), r"ndarray \(\d+, \d+, 3\) uint8"),
        ("cat.jpg", "str"),
        (Image.new("RGB", (4, 4)), r"Image \(4, 4, 3\) uint8"),
    ):
        with pytest.raises(
            ValueError, match=rf"float32, got {shown}; runtime\.predict and runtime\.embed take"
        ):
            runtime(given)
    for option in ({"topk": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            runtime.predict(pixels(), **option)
    assert runtime.predict([]) == []
    assert runtime.embed([]).shape == (0, 16)
    vimcore.VisionMamba(**{**SIZES, "in_chans": 4}).save(tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match="takes 4 channels"):
        vimcore.Runtime(tmp_path / "four.safetensors").embed(pixels())


def test_progress(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = vimcore.Runtime(path)
    runtime.embed([pixels()] * 6, batch=2)
    assert capsys.readouterr().err == ""
    runtime.embed([pixels()] * 6, batch=2, progress=True)
    assert "0/6 [" in capsys.readouterr().err


def test_reprs(path: str) -> None:
    runtime = vimcore.Runtime(path)
    assert repr(runtime) == f"Runtime({path!r}: 3 x 16 x 24 to 3 classes, float32 on cpu)"
    html = runtime._repr_html_()
    assert "<td style='text-align:left'>a &lt;b&gt;, cat, dog</td>" in html
    model = vimcore.VisionMamba.load(path)
    assert f">{sum(p.numel() for p in model.parameters()):,}</td>" in html
    assert f">{model.flops() / 1e9:.4g} G</td>" in html
    assert all(f"<td style='text-align:left'>{key}</td>" in html for key in runtime.config)
    found = runtime.predict([pixels(), pixels(1)])
    html = found._repr_html_()
    assert html.count("<img src='data:image/png;base64,") == 2
    assert "a &lt;b&gt;" in html
    assert "<b>" not in html
    assert f"{100 * found[0].p:.1f} %" in html
    assert str(found[0]).splitlines()[0] == "image 0"
    assert re.search(r"^  +\d+\.\d{3} %  +\d  (a <b>|cat|dog)$", str(found), re.MULTILINE)
    assert json.loads(found[0].to_json())["top"][0]["label"] == found[0].label


def test_without_torch(path: str, tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "x.png")
    code = (
        "import sys, vimcore; r = vimcore.Runtime(sys.argv[1]); p = r.predict(sys.argv[2]); p._repr_html_();"
        "r.embed(sys.argv[2]); assert not {'torch', 'PIL', 'matplotlib'} & set(sys.modules); print(p.label)"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "x.png")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() in LABELS


# ---- show and health ---------------------------------------------------------------------------------------


def test_show(path: str, tmp_path: Path) -> None:
    model, images = vimcore.VisionMamba.load(path), torch.randn(2, 3, 16, 24)
    found = vimcore.Runtime(path).predict([pixels(), pixels(1)])
    shown: list[tuple[Any, Any, int]] = [  # what, over what, panels with something in them
        (vimcore.saliency(model, images, steps=2), images, 2),
        (vimcore.relevance(model, images), [pixels(), pixels(1)], 2),
        (vimcore.attention_maps(model, images), None, 8),
        (vimcore.attention_maps(model, images), images, 8),
        (vimcore.feature_pca(model, images), None, 2),
        (np.zeros((4, 4)), None, 1),
        (found, None, 2),
        (found[0], None, 1),
        ([pixels(), pixels(1), pixels(2)], None, 3),
        (np.ones((200, 2, 2)), None, 64),
    ]
    for x, over, panels in shown:
        picture = vimcore.show(x, over)
        assert picture._repr_png_().startswith(b"\x89PNG")
        assert sum(bool(axes.images) for axes in picture.figure.axes) == panels
    titled = vimcore.show(found, labels=["one", "two"])
    assert [axes.get_title() for axes in titled.figure.axes][:2] == ["one", "two"]
    titled.save(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_show_refuses() -> None:
    for x, images, labels, said in (
        (np.full((2, 2), np.nan), None, None, "expected finite numbers"),
        (np.ones(3), None, None, r"expected maps .* got \(3,\)"),
        (np.ones((2, 4, 4)), np.ones((3, 3, 4, 4)), None, "images: expected 2"),
        (np.ones((2, 4, 4)), None, ["a"], "labels: expected 2"),
        (["none.png"], None, None, r"none\.png: cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            vimcore.show(x, images, labels)
    with pytest.raises(TypeError, match="expected a path"):
        vimcore.show(3)
    with pytest.raises(TypeError, match="belong to maps"):
        vimcore.show([pixels()], images=[pixels()])


@pytest.mark.parametrize("dtype", [">f4", "f8", "f2", "u1", "g", "O", "U3", "M8[s]", "c8"])
def test_arrays_of_other_types(path: str, dtype: str) -> None:
    """An error that says what is wanted; memory that is read-only, negative or transposed is no matter."""
    runtime, images = vimcore.Runtime(path), np.zeros((2, 3, 16, 24), np.float32)
    given = np.zeros(images.shape, dtype)
    text = re.escape(f"images: expected (B, 3, 16, 24) float32, got ndarray {images.shape} {given.dtype}")
    for ask in (runtime, runtime.features):
        with pytest.raises(ValueError, match=rf"\[Runtime\] {text}"):
            ask(given)
    images[:] = np.random.default_rng(0).random(images.shape)
    odd = np.asfortranarray(images[::-1, :, ::-1])[::-1, :, ::-1]
    odd.flags.writeable = False
    assert np.array_equal(runtime(odd), runtime(images))


def test_health_of_noise() -> None:
    model = vimcore.VisionMamba(**SIZES)
    found = vimcore.health(model)
    assert found.images == 4
    html = found._repr_html_()
    assert html.count("<tr>") == 1 + len(found.layers)
    assert "everything is finite" in html
    assert "advised: " in html
    assert str(found) == str(vimcore.health(model))
