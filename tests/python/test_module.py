# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` as a torch module: sizes, names, initial values, training options, copies."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, small
from torch import Tensor, nn
from vimcore import _core


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- sizes and names ----

COUNTS = {  # with class token, with stride 8, without token, with two
    "tiny": (7_148_008, 7_250_344, 7_147_624, 7_148_392),
    "small": (25_796_584, 26_001_256, 25_795_816, 25_797_352),
    "base": (97_598_440, 98_007_784, 97_596_904, 97_599_976),
}
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
VARIANTS: list[dict[str, Any]] = [{}, {"stride": 8}, {"class_token": "none"}, {"class_token": "double"}]


@pytest.mark.slow
@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("size", sorted(COUNTS))
def test_parameter_counts(size: str, variant: int) -> None:
    config = reference.Config(embed_dim=WIDTHS[size], **VARIANTS[variant])
    shapes = reference.parameter_shapes(config)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == COUNTS[size][variant]
    if size != "base":
        assert parameter_count(vimcore.VisionMamba(**config.arguments())) == COUNTS[size][variant]
    stated = list(_core.Config(**config.arguments()).param_shapes().items())
    assert {name: tuple(shape) for name, shape in stated} == shapes


def test_meta_device() -> None:
    """A network without memory, as torch users make one to look at it or to assign weights."""
    with torch.device("meta"):
        model = vimcore.create_model("vim_base_patch16_224")
    assert all(p.is_meta for p in model.parameters())
    assert parameter_count(model) == COUNTS["base"][0]
    with torch.device("meta"):
        model = vimcore.VisionMamba(**SMALL.arguments())
    weights = {k: v.float() for k, v in reference.random_weights(SMALL).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    images = images_for(SMALL, 2, torch.float32)
    assert torch.equal(model(images), build(SMALL, weights)(images))


@pytest.mark.parametrize("rope", [False, True])
def test_other_sizes_on_the_meta_device(rope: bool) -> None:
    """A table without memory is resized as its shape; weights of that size may be assigned afterwards."""
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 3}
    options = {**sizes, "rope": rope, "class_token": "none" if rope else "middle"}
    with torch.device("meta"):
        model = vimcore.VisionMamba(32, **options)
        model.set_input_size((48, 40))
    assert all(p.is_meta for p in model.parameters())
    other = vimcore.VisionMamba((48, 40), **options)
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in other.state_dict().items()
    }
    model.load_state_dict(other.state_dict(), assign=True)
    images = torch.randn(2, 3, 48, 40)
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize(("directions", "count"), [("none", 6_419_560), ("ssm", 6_567_016)])
def test_parameter_counts_of_other_strategies(directions: str, count: int) -> None:
    assert parameter_count(vimcore.VisionMamba(directions=directions, class_token="none")) == count


@pytest.mark.slow
def test_names_of_models() -> None:
    names = vimcore.list_models()
    assert sorted(name for name in names if name.startswith("vim_")) == sorted(
        f"vim_{size}_{patch}_224" for size in WIDTHS for patch in ("patch16", "patch16_stride8")
    )
    model = vimcore.create_model("vim_tiny_patch16_224")
    assert parameter_count(model) == COUNTS["tiny"][0]
    assert parameter_count(vimcore.create_model("vim_tiny_patch16_stride8_224")) == COUNTS["tiny"][1]
    assert vimcore.create_model("vim_tiny_patch16_224", num_classes=10, depth=2).head.weight.shape == (
        10,
        192,
    )
    with pytest.raises(ValueError, match="vim_tiny_patch16_224"):
        vimcore.create_model("vim_tiny_patch16")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": "double", "norm": "layer"},
        {"class_token": "none", "pos_embed": False},
        {"directions": "none", "num_classes": 0},
        {"directions": "block"},
        {"directions": "ssm", "class_token": "random", "layer_scale": 0.1},
        {"stride": 2, "expand": 3, "dt_rank": 7, "d_conv": 2, "in_chans": 1},
    ],
)
def test_state_dict_keys(options: dict[str, Any]) -> None:
    config = small(**options)
    found = {k: tuple(v.shape) for k, v in vimcore.VisionMamba(**config.arguments()).state_dict().items()}
    assert found == reference.parameter_shapes(config)
    assert list(found) == list(reference.parameter_shapes(config))  # in the order of the authors' files


def test_rope_tables_are_in_the_state_dict() -> None:
    config = small(img_size=(8, 12), class_token="head", rope=True, rope_residual=True, rope_grid=4)
    model = vimcore.VisionMamba(**config.arguments())
    state = model.state_dict()
    assert set(state) == {*reference.parameter_shapes(config), "rope.freqs_cos", "rope.freqs_sin"}
    for key, truth in zip(("cos", "sin"), reference.rope_tables(config, torch.float64), strict=True):
        assert relative(state[f"rope.freqs_{key}"], truth) < 1e-6
    assert "rope.freqs_cos" not in dict(model.named_parameters())


FLOPS = [  # spec values, billions of multiply-adds: tiny, small, base
    ({}, (1.525, 5.316, 19.70)),
    ({"stride": 8}, (5.65, 19.70, 72.98)),
    ({"img_size": 512}, (7.94, 27.66, 102.5)),
    ({"img_size": 1024}, (31.7, 110.6, 409.6)),
    ({"img_size": 1248}, (47.1, 164.2, 608.3)),
]


@pytest.mark.parametrize("row", range(len(FLOPS)))
def test_flops(row: int) -> None:
    options, wanted = FLOPS[row]
    for size, value in zip(("tiny", "small", "base"), wanted, strict=True):
        config = reference.Config(embed_dim=WIDTHS[size], **options)
        flops = _core.Config(**config.arguments()).flops()
        digits = len(str(value).split(".")[1])
        assert abs(flops / 1e9 - value) <= 0.6 * 10**-digits, (size, flops)


def test_flops_of_a_hand_counted_network() -> None:
    config = small(directions="none")
    length, d, e, n, r, k = config.tokens, 16, 32, 5, 1, 4
    per_token = 3 * e * d + k * e + (r + 2 * n) * e + r * e + 4 * e * n
    wanted = length * 2 * per_token + config.patches * 3 * 16 * d + 3 * d
    assert vimcore.VisionMamba(**config.arguments()).flops() == wanted


def test_initial_values() -> None:
    """The published initialisation, where it is a number or a range."""
    model = vimcore.VisionMamba(img_size=64, depth=2)
    state = model.state_dict()
    mixer = "layers.1.mixer."
    log = torch.arange(1, 17).log()
    for key in ("A_log", "A_b_log"):
        assert torch.allclose(state[mixer + key], log.expand(384, 16))
    for key in ("D", "D_b"):
        assert (state[mixer + key] == 1).all()
    assert not state[mixer + "dt_proj_b.bias"].any()
    assert not state["head.bias"].any()
    step = nn.functional.softplus(state[mixer + "dt_proj.bias"])
    assert 0.00099 < step.min() < 0.003
    assert 0.04 < step.max() < 0.101
    for key, bound in {
        "in_proj.weight": 192**-0.5,
        "x_proj.weight": 384**-0.5,
        "dt_proj_b.weight": 12**-0.5,
        "conv1d_b.weight": 0.5,
        "out_proj.weight": 384**-0.5 / 2**0.5,
    }.items():
        peak = state[mixer + key].abs().max()
        assert 0.95 * bound < peak <= bound * (1 + 1e-6), key
    assert abs(state["pos_embed"].std() - 0.02) < 0.002
    assert abs(state["patch_embed.proj.weight"].std() - 0.041) < 0.002
    assert (state["layers.0.norm.weight"] == 1).all()


# ---- training options ----


def drawn(model: vimcore.VisionMamba, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What a forward of the logits draws: drop_path and dropout."""
    made: list[Tensor | None] = []
    monkeypatch.setattr(vimcore.autograd.draws, "Draws", lambda *arrays: made.extend(arrays[:2]))
    model._draws("logits", images, -1)
    return made


def test_drop_path_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of mixer j is dropped with probability rate * j / (depth - 1), and divided by the rest."""
    config = small(depth=5, drop_path_rate=0.4, directions="none")
    model = build(config)
    images = torch.zeros(40_000, 1)
    factors, _ = drawn(model.train(), images, monkeypatch)
    assert factors is not None
    assert factors.shape == (5, 40_000)
    for j in range(5):
        rate = 0.4 * j / 4
        assert factors[j].unique().tolist() == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
        assert abs(float((factors[j] == 0).float().mean()) - rate) < 0.01
    assert drawn(model.eval(), images, monkeypatch) == []


def test_training_draws_follow_the_seed() -> None:
    model = build(small(drop_path_rate=0.5, drop_rate=0.2, depth=4)).train()
    images = images_for(SMALL, 8, torch.float32)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(images)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))
    model.eval()
    assert torch.equal(once(1), once(2))


def test_dropout_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout after the position table keeps the mean of every token."""
    model = build(small(drop_rate=0.3))
    _, mask = drawn(model.train(), torch.zeros(500, 3, 8, 12), monkeypatch)
    assert mask is not None
    assert mask.shape == (500, SMALL.tokens, 16)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(float(mask.mean()) - 1) < 0.02


def test_sequence_flips_in_training_only() -> None:
    config = small(directions="sequence")
    model, images = build(config), images_for(config, 1, torch.float32)
    forwards = build(small(directions="none"))(images)
    assert torch.equal(model.eval()(images), forwards)
    outputs = [model.train()(images) for _ in range(40)]
    same = sum(torch.equal(x, forwards) for x in outputs)
    assert 5 <= same <= 35


def test_random_class_token_in_training_only() -> None:
    config = small(class_token="random")
    model, images = build(config), images_for(config, 1, torch.float32)
    head = build(small(class_token="head"))(images)
    assert torch.equal(model.eval()(images), head)
    outputs = {tuple(model.train()(images)[0].tolist()) for _ in range(60)}
    assert len(outputs) == SMALL.patches + 1  # every place from first to last


def test_mean_of_both_directions() -> None:
    config = small(directions="ssm_conv", depth=1)
    layer = {k: v.float() for k, v in reference.random_weights(config).items() if k.startswith("layers.0.")}
    layer = {k.removeprefix("layers.0."): v for k, v in layer.items()}
    x = torch.randn(1, 6, 16)
    halved = vimcore.ops.vim_block(x, layer)[0]
    assert torch.equal(vimcore.ops.vim_block(x, layer, average_directions=False)[0], 2 * halved)


# ---- copies ----


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(how: Any, used: bool) -> None:
    config = small(drop_path_rate=0.1)
    model, images = build(config, memory="fast"), images_for(config, 2, torch.float32)
    if used:
        model(images).sum().backward()
    twin = how(model)
    assert twin.memory == "fast"
    assert twin.training == model.training
    with torch.no_grad():
        assert torch.equal(twin.eval()(images), model.eval()(images))
        next(twin.parameters()).add_(1)  # nothing is shared
        assert not torch.equal(twin(images), model(images))


def test_deepcopy_of_a_saved_state() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    before, state = model(images), copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(images).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model(images), before)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(images), before)


def test_strict_state_dict() -> None:
    model = build(SMALL)
    state = model.state_dict()
    state["extra"] = state.pop("cls_token")
    with pytest.raises(RuntimeError, match=r"cls_token[\s\S]*extra"):
        model.load_state_dict(state)


def test_assign_and_replaced_parameters() -> None:
    """The core sees parameters that were swapped for others, not only those written in place."""
    other = {k: v.float() for k, v in reference.random_weights(SMALL, seed=5).items()}
    images = images_for(SMALL, 2, torch.float32)
    wanted = build(SMALL, other)(images)
    model = build(SMALL)
    model(images)
    model.load_state_dict(other, assign=True)
    assert torch.equal(model(images), wanted)
    model = build(SMALL)
    model(images)
    for name, value in other.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value))
    assert torch.equal(model(images), wanted)


PACKED = ["layers.0.mixer.in_proj.weight", "layers.1.mixer.x_proj_b.weight", "head.weight"]


@pytest.mark.parametrize("key", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_changed_number_is_seen(dtype: torch.dtype, key: str) -> None:
    """Packed weights are renewed when any element changes."""
    model, images = build(SMALL, dtype=dtype), images_for(SMALL, 2, dtype)
    parameter = dict(model.named_parameters())[key]
    for row in range(parameter.shape[0]):
        before = model(images)
        with torch.no_grad():
            parameter[row, 2] += 0.5
        assert not torch.equal(model(images), before), row


@pytest.mark.parametrize("key", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_behind_autograd_are_seen(dtype: torch.dtype, key: str) -> None:
    """`.data` leaves no trace in the version counter."""
    model, images = build(SMALL, dtype=dtype), images_for(SMALL, 2, dtype)
    parameter = dict(model.named_parameters())[key]
    for row in range(parameter.shape[0]):
        before = model(images)
        parameter.data[row, 2] += 0.5
        assert not torch.equal(model(images), before), row


def test_reset_classifier() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert (
        torch.equal(model(images), model.forward_head(features))
        or relative(model(images), model.forward_head(features)) < 1e-6
    )
    model.reset_classifier(0)
    assert model(images).shape == (2, 16)
    assert torch.equal(model.forward_features(images), features)


def test_functional_call_and_swapped_head() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    doubled = {k: 2 * v for k, v in model.named_parameters() if k.startswith("head")}
    assert relative(torch.func.functional_call(model, doubled, (images,)), 2 * model(images)) < 1e-6
    model.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    logits = model(images)
    assert logits.shape == (2, 4)
    logits.sum().backward()
    assert model.head[0].weight.grad is not None
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.slow
def test_a_network_needs_no_compiler() -> None:
    """torch._dynamo, and sympy for it, would take as long to import as the rest of torch."""
    program = (
        "import sys, torch, vimcore\n"
        "model = vimcore.VisionMamba(img_size=8, patch_size=4, embed_dim=16, depth=1, num_classes=3)\n"
        "model(torch.zeros(1, 3, 8, 8)).sum().backward()\n"
        "assert all(p.grad is not None and p.grad.device.type == 'cpu' for p in model.parameters())\n"
        "print(*{'torch._dynamo', 'sympy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
