# SPDX-License-Identifier: Apache-2.0
"""The health report: its network is the network, its numbers are right, it finds what is planted."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import build, images_for, small
from vimcore.cli import main
from vimcore.data.digits import encode_png
from vimcore.nn.plain import Plain
from vimcore.utils.extras import needs

CONFIGS = {
    "middle": small(),
    "sum of directions": small(average_directions=False),
    "double": small(class_token="double"),
    "none": small(directions="none", class_token="none", pool="max"),
    "sequence": small(directions="sequence", class_token="head"),
    "block": small(directions="block", depth=4),
    "ssm": small(directions="ssm", class_token="random"),
    "layer norm, scaled": small(norm="layer", layer_scale=0.5, pos_embed=False),
    "rope": small(rope=True, rope_residual=True, class_token="head", depth=3),
    "all tokens": small(class_token="none", pool="all", num_classes=4),
    "no head": small(num_classes=0, stride=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_the_pass_is_the_network(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimcore.nn.plain.CHUNK", chunk)
    config = CONFIGS[name]
    model, images = build(config, dtype=torch.float64).eval(), images_for(config, 2)
    seen: dict[str, torch.Tensor] = {}
    tokens = Plain(model, seen.__setitem__).tokens(images)
    assert relative(tokens, model.forward_features(images)) < 1e-10
    shown = {key for key in seen if key in dict(model.named_parameters())}
    assert shown == {key for key, _ in model.named_parameters() if not key.startswith("head.")}


def test_ranges_are_those_of_the_tensors() -> None:
    config = small(depth=1, class_token="none")
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 3)
    found = vimcore.health(model, images)

    m = "layers.0.mixer."
    r = reference.embed(config, weights, images, reference.Draws())
    v = reference.normalise(config, weights, "layers.0.norm", r)
    x, _ = (v @ weights[m + "in_proj.weight"].T).chunk(2, -1)
    wanted = {"layers.0.residual": r, "layers.0.norm": v, "images": images}
    for s, flip in (("", False), ("_b", True)):
        u, raw, B, _ = reference.branch_inputs(config, weights, m, s, x.flip(1) if flip else x)
        delta = torch.nn.functional.softplus(raw + weights[m + f"dt_proj{s}.bias"])
        A = -weights[m + f"A{s}_log"].exp()
        state, states = torch.zeros(3, config.inner, config.d_state, dtype=torch.float64), []
        for t in range(u.shape[1]):
            inflow = (delta * u)[:, t, :, None] * B[:, t, None]
            state = torch.exp(delta[:, t, :, None] * A) * state + inflow
            states.append(state)
        wanted |= {m + f"delta{s}": delta, m + f"u{s}": u, m + f"state{s}": torch.stack(states)}
        wanted[m + f"A_delta{s}"] = delta[..., None] * A
    for name, tensor in wanted.items():
        assert found.ranges[name] == pytest.approx([float(v) for v in tensor.aminmax()], rel=1e-9), name
    (layer,) = found.layers
    assert layer.delta == (min(found.ranges[m + "delta"][0], found.ranges[m + "delta_b"][0]),) + (
        max(found.ranges[m + "delta"][1], found.ranges[m + "delta_b"][1]),
    )
    sizes = {k: max(map(abs, found.ranges[k])) for k in found.ranges if k.startswith("layers.0.")}
    assert max(map(abs, layer.activation)) == sizes[layer.largest]
    assert found.ranges["logits"] == pytest.approx(
        [float(v) for v in model.eval()(images).detach().aminmax()], rel=1e-9
    )


def test_the_model_stays_as_it_is() -> None:
    model = build(small(drop_path_rate=0.5, drop_rate=0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.set_num_threads(2)
    torch.manual_seed(3)
    images = images_for(small(), 2, torch.float32).requires_grad_()
    state = torch.get_rng_state()
    first = vimcore.health(model, images)
    assert str(first) == str(vimcore.health(model, images))
    assert model.training
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None
    model(images).sum().backward()  # and still trains


@pytest.mark.slow
def test_wrapped_models() -> None:
    model, images = build(small()), images_for(small(), 1, torch.float32)
    for wrapped in (torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        assert str(vimcore.health(wrapped, images)) == str(vimcore.health(model, images))


def test_the_name_stays_the_function() -> None:
    module = importlib.import_module("vimcore.analysis.health")
    assert vimcore.health is module.health
    assert vimcore.saliency is importlib.import_module("vimcore.analysis.saliency").saliency


# ---- what is not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("layers.1.mixer.dt_proj_b.bias", math.nan, "layers.1.mixer.dt_proj_b.bias"),
        ("patch_embed.proj.weight", math.inf, "patch_embed.proj.weight"),
        ("head.bias", -math.inf, "head.bias"),
        ("layers.0.mixer.A_log", 100.0, "layers.0.mixer.A_delta"),  # exp of it is not a float32
        ("layers.1.mixer.in_proj.weight", 3e38, "layers.1.mixer.xz"),
        ("head.weight", 3e38, "logits"),
    ],
)
def test_the_first_that_is_not_finite(key: str, value: float, name: str) -> None:
    model = build(small())
    with torch.no_grad():
        dict(model.named_parameters())[key].view(-1)[:7] = value
    found = vimcore.health(model, images_for(small(), 2, torch.float32))
    assert found.first_nonfinite == name
    assert found.precision == "float32"
    assert name in found.reason
    assert f"not finite: first {name}" in str(found)
    assert found.precisions == {}
    assert next(reversed(found.ranges)) == name
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_images_that_are_not_finite() -> None:
    images = images_for(small(), 2, torch.float32)
    images[1, 0, 3, 3] = math.nan
    found = vimcore.health(build(small()), images)
    assert (found.first_nonfinite, found.layers) == ("images", [])


# ---- precision ---------------------------------------------------------------------------------------------


def test_rounding_is_that_of_the_types() -> None:
    config = small(embed_dim=32, depth=4)
    found = vimcore.health(build(config), images_for(config, 4, torch.float32))
    bf16, fp16 = found.precisions["bfloat16"].error, found.precisions["float16"].error
    assert 1e-4 < fp16 < bf16 < 0.05  # 11 and 8 bits
    assert 4 < bf16 / fp16 < 16
    assert found.precisions["bfloat16"].same_top1[1] == 4
    assert found.precision == "bfloat16"


@torch.no_grad()
def inflate(model: vimcore.VisionMamba, layer: int, factor: float) -> None:
    """The same function with x larger by a power of two: the convolutions take it back."""
    mixer = model.layers[layer].mixer
    mixer.in_proj.weight[: len(mixer.D)] *= factor
    mixer.conv1d.weight /= factor
    mixer.conv1d_b.weight /= factor


def test_large_activations_rule_float16_out() -> None:
    model, images = build(small()), images_for(small(), 2, torch.float32)
    outputs = model.eval()(images)
    inflate(model, 1, 2.0**20)
    torch.testing.assert_close(model(images), outputs)
    found = vimcore.health(model, images)
    assert found.precisions["float16"].overflow == "layers.1.mixer.xz"
    assert found.layers[1].largest == "layers.1.mixer.xz"
    assert found.precision == "bfloat16"
    assert "float16: layers.1.mixer.xz overflows" in str(found)


def test_what_bfloat16_cannot_hold() -> None:
    """A class score that is the small difference of large activations: 8 bits are too few, 11 are enough."""
    model = build(small(depth=1))
    images = images_for(small(), 2, torch.float32)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn_like(model.head.weight))
        tokens = model.eval().forward_features(images)[:, 3]
        model.head.weight -= (
            (model.head.weight @ tokens[0])[:, None] * tokens[0] / tokens[0].square().sum() * 0.97
        )
        model.head.bias.zero_()
    found = vimcore.health(model, images[:1])
    assert found.precisions["bfloat16"].error > 0.05 > found.precisions["float16"].error
    assert found.precision == "float16"
    assert "GradScaler" in found.reason
    largest = max(map(abs, found.ranges["layers.0.mixer.xz"]))
    inflate(model, 0, 2.0 ** int(math.log2(65504 / largest) - 1))
    found = vimcore.health(model, images[:1])
    assert found.precision == "float32"
    assert "float16 leaves a factor of only" in found.reason
    inflate(model, 0, 2.0**9)
    found = vimcore.health(model, images[:1])
    assert found.precision == "float32"
    assert "with float16 layers.0.mixer.xz overflows" in found.reason


# ---- errors and the command line ---------------------------------------------------------------------------


def test_errors() -> None:
    model = build(small())
    with pytest.raises(TypeError, match=r"\[health\] model: expected a VisionMamba, got Linear"):
        vimcore.health(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(
        ValueError, match=r"images: expected \(B, 3, 8, 12\) f32 or bf16 cpu, got \(1, 3, 8, 8\)"
    ):
        vimcore.health(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least one"):
        vimcore.health(model, torch.zeros(0, 3, 8, 12))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    build(small(img_size=16, num_classes=4)).save(tmp_path / "vim.safetensors")
    return tmp_path / "vim.safetensors"


def test_lists_and_patterns_of_pictures(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.ppm").write_bytes(b"P6 2 2 255\n" + name.encode() * 12)
    (tmp_path / "names.txt").write_text(f"{tmp_path}/b.ppm\n{tmp_path}/a.ppm\n")
    ranges = []
    for given in (
        [f"@{tmp_path}/names.txt"],
        [f"{tmp_path}/*.ppm"],
        [f"{tmp_path}/a.ppm", f"{tmp_path}/b.ppm"],
    ):
        assert main(["health", "--weights", str(weights), "--json", *given]) == 0
        ranges.append(json.loads(capsys.readouterr().out)["ranges"])
    assert ranges[0] == ranges[1] == ranges[2]
    assert main(["health", "--weights", str(weights), "--json", f"{tmp_path}/a.ppm"]) == 0
    assert json.loads(capsys.readouterr().out)["ranges"] != ranges[0]


def test_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--weights", str(weights), "--count", "2"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split()[:3] == ["layer", "dt", "A"]
    assert "everything is finite" in text
    assert "advised: " in text
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encode_png(pixels))
    assert main(["health", "--weights", str(weights), "--json", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 3
    assert len(found["layers"]) == 2
    assert set(found["ranges"]) >= {"images", "layers.1.mixer.state_b", "logits"}


def test_command_without_torch(weights: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\nfrom vimcore.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "health", "--weights", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"vimcore: the health report needs torch; {needs('torch')}\n"


def test_command_on_damaged_weights(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vimcore.VisionMamba.load(weights)
    with torch.no_grad():
        model.layers[1].mixer.D[3] = math.nan
    model.save(weights)
    assert main(["health", "--weights", str(weights)]) == 1
    assert "not finite: first layers.1.mixer.D" in capsys.readouterr().out
    assert main(["health", "--weights", str(weights), str(weights.parent)]) == 1
    assert "no pictures found" in capsys.readouterr().err
