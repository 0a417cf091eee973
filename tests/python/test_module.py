# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` as a torch module: sizes, names, copies, types, threads, processes, errors."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import build, images_for, run
from torch import Tensor, nn
from vimcore import _core

SMALL = reference.Config(img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=16, depth=2, d_state=5)


def small(**options: Any) -> reference.Config:
    return reference.Config(**{**SMALL.arguments(), **options})


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


@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("size", sorted(COUNTS))
def test_parameter_counts(size: str, variant: int) -> None:
    config = reference.Config(embed_dim=WIDTHS[size], **VARIANTS[variant])
    shapes = reference.parameter_shapes(config)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == COUNTS[size][variant]
    if size != "base":
        assert parameter_count(vimcore.VisionMamba(**config.arguments())) == COUNTS[size][variant]
    stated = _core.param_shapes(json.dumps(config.arguments()))
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


@pytest.mark.parametrize(("directions", "count"), [("none", 6_419_560), ("ssm", 6_567_016)])
def test_parameter_counts_of_other_strategies(directions: str, count: int) -> None:
    assert parameter_count(vimcore.VisionMamba(directions=directions, class_token="none")) == count


def test_names_of_models() -> None:
    names = vimcore.list_models()
    assert sorted(names) == sorted(
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
        flops = _core.flops(json.dumps(config.arguments()))
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


def test_drop_path_rates() -> None:
    """The output of mixer j is dropped with probability rate * j / (depth - 1), and divided by the rest."""
    config = small(depth=5, drop_path_rate=0.4, directions="none")
    model = build(config)
    images = torch.zeros(40_000, 1)
    factors = model.train()._draws("logits", images).drop_path
    assert factors is not None
    assert factors.shape == (5, 40_000)
    for j in range(5):
        rate = 0.4 * j / 4
        assert factors[j].unique().tolist() == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
        assert abs(float((factors[j] == 0).float().mean()) - rate) < 0.01
    assert model.eval()._draws("logits", images).drop_path is None


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


def test_dropout_mean() -> None:
    """Dropout after the position table keeps the mean of every token."""
    model = build(small(drop_rate=0.3))
    mask = model.train()._draws("logits", torch.zeros(500, 3, 8, 12)).mask
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
def test_writes_behind_autograd_are_seen(key: str) -> None:
    """`.data` leaves no trace in the version counter: any element in float64, whole weights in float32."""
    model, images = build(SMALL, dtype=torch.float64), images_for(SMALL, 2)
    parameter = dict(model.named_parameters())[key]
    for row in range(parameter.shape[0]):
        before = model(images)
        parameter.data[row, 2] += 0.5
        assert not torch.equal(model(images), before), row
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    before = model(images)
    dict(model.named_parameters())[key].data.mul_(1.01)
    assert not torch.equal(model(images), before)


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


# ---- autograd ----


def test_frozen_parameters() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    _, all_grads = run(model, images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("head.weight", "layers.1.mixer.conv1d.weight", "cls_token"))
    model.zero_grad(set_to_none=True)
    model(images).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, all_grads[name]), name
        else:
            assert parameter.grad is None, name
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(images).requires_grad
    x = images.clone().requires_grad_()
    model(x).sum().backward()
    assert torch.equal(x.grad, all_grads["input"])


def test_gradient_accumulation() -> None:
    model = build(SMALL, dtype=torch.float64)
    a, b = images_for(SMALL, 2), images_for(SMALL, 3, seed=9)
    first, second = ({k: v.clone() for k, v in run(model, x)[1].items()} for x in (a, b))
    model.zero_grad(set_to_none=True)
    model(a).sum().backward()
    model(b).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, first[name] + second[name]) < 1e-13, name


def test_two_graphs_at_once() -> None:
    """Two forwards before the first backward, in either order, with other work in between."""
    model = build(SMALL)
    a, b = images_for(SMALL, 2, torch.float32), images_for(SMALL, 4, torch.float32, seed=9)
    wanted = [run(model, x)[1]["input"].clone() for x in (a, b)]
    for order in ((0, 1), (1, 0)):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        losses = [model(x).sum() for x in leaves]
        model.eval()(a)
        model.train()
        for i in order:
            losses[i].backward()
        assert all(torch.equal(x.grad, w) for x, w in zip(leaves, wanted, strict=True))


def test_retained_graph_and_second_backward() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_weights_changed_between_forward_and_backward() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    loss = model(images).sum()
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    _, wanted = run(model, images)
    model.zero_grad(set_to_none=True)
    x = images.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, wanted["input"])
    assert all(torch.equal(p.grad, wanted[k]) for k, p in model.named_parameters())


def test_input_that_wants_a_gradient_is_not_written() -> None:
    model, x = build(SMALL), images_for(SMALL, 2, torch.float32).requires_grad_()
    before = x.detach().clone()
    model(x).sum().backward()
    assert torch.equal(x, before)
    y = (x * 1).mul_(2)  # not a leaf, made in place
    model(y).sum().backward()
    assert torch.equal(y, 2 * before)


def test_outputs_are_the_callers_own() -> None:
    """Nothing that is returned is scratch memory of the next call."""
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    with torch.no_grad():
        first, tokens = model(images), model.forward_features(images)
        copies = first.clone(), tokens.clone()
        model(-images), model.forward_features(-images)
    assert torch.equal(first, copies[0])
    assert torch.equal(tokens, copies[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.flip(3).flip(3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 0)[::2].clone().repeat_interleave(2, 0)[::2],
        lambda x: torch.stack([x, -x], -1)[..., 0],
    ],
)
def test_non_contiguous_images(make: Any) -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    images[1] = images[0]
    wanted, _grads = run(model, images)
    x = images.clone().requires_grad_()
    logits = model(make(x))
    assert torch.equal(logits, wanted)


def test_expanded_batch_and_broadcast_gradient() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    x = images.clone().requires_grad_()
    logits = model(x.expand(3, -1, -1, -1))
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[:1], model(images))
    logits.sum().backward()  # an expanded gradient of ones
    assert relative(x.grad, 3 * run(model, images)[1]["input"]) < 1e-6


# ---- types and errors ----


def test_to_float64() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    single = model(images)
    double = model.to(torch.float64)(images.double())
    assert double.dtype == torch.float64
    assert relative(single, double) < 1e-6
    assert torch.equal(model.float()(images), single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype: torch.dtype) -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    wanted, grads = run(model, images)
    with torch.autocast("cpu", dtype):
        logits = model(images)
        features = model.forward_features(images.to(dtype))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wanted)
    assert torch.equal(features, model.forward_features(images.to(dtype).float()))
    model.zero_grad(set_to_none=True)
    logits.sum().backward()
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters())


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_parameters_are_an_error(dtype: torch.dtype, name: str) -> None:
    model = build(SMALL).to(dtype)
    with pytest.raises(ValueError, match=f"f32 or f64.*{name}"):
        model(images_for(SMALL, 2, dtype))


GOOD = (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 12, 8), "images: expected (B, 3, 8, 12) f32 cpu, got (2, 3, 12, 8) f32 cpu"),
        (torch.zeros(2, 1, 8, 12), "images: expected (B, 3, 8, 12) f32 cpu, got (2, 1, 8, 12) f32 cpu"),
        (torch.zeros(3, 8, 12), "images: expected (B, 3, 8, 12) f32 cpu, got (3, 8, 12) f32 cpu"),
        (torch.zeros(GOOD, dtype=torch.float64), "got (2, 3, 8, 12) f64 cpu"),
        (torch.zeros(GOOD, dtype=torch.float16), "got (2, 3, 8, 12) f16 cpu"),
        (torch.zeros(GOOD, dtype=torch.uint8), "got (2, 3, 8, 12) uint8 cpu"),
        (torch.zeros(GOOD, dtype=torch.complex64), "complex64"),
        (torch.zeros(GOOD, device="meta"), "got (2, 3, 8, 12) f32 meta"),
        (torch.zeros(GOOD).numpy(), "ndarray"),
    ],
)
def test_wrong_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(SMALL)(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "both"}, "ssm_conv"),
        ({"class_token": "tail"}, "middle"),
        ({"pool": "min"}, "mean"),
        ({"norm": "batch"}, "rms"),
        ({"memory": "big"}, "lean"),
        ({"directions": "block", "depth": 3}, "depth"),
        ({"img_size": 3}, "img_size"),
        ({"img_size": (8, 3)}, "img_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"stride": 0}, "stride"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"d_state": 0}, "d_state"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_rank": "full"}, "dt_rank"),
        ({"rope": True}, "rope"),
        ({"rope_residual": True}, "rope_residual"),
        ({"rope": True, "class_token": "none", "stride": 2}, "stride"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vimcore.VisionMamba(**{**SMALL.arguments(), **options})


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="img_sise"):
        vimcore.VisionMamba(img_sise=224)


def test_wrong_indices_of_intermediates() -> None:
    model = build(SMALL)
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(torch.zeros(GOOD), indices=[0, 2])
    assert len(model.forward_intermediates(torch.zeros(GOOD), indices=[1, 0])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 4, 3)}, "B: expected (2, 5, 3) f32 cpu, got (2, 4, 3) f32 cpu"),
        ({"delta": torch.zeros(2, 5, 3)}, "delta"),
        ({"A": torch.zeros(3, 3)}, "A"),
        ({"D": torch.zeros(5)}, "D"),
        ({"z": torch.zeros(2, 5, 4, dtype=torch.float64)}, "z"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int64)}, "u"),
        ({"u": torch.zeros(5, 4)}, "u"),
        ({"C": torch.zeros(2, 5, 3, device="meta")}, "C"),
    ],
)
def test_wrong_arguments_of_the_scan(change: dict[str, Tensor], message: str) -> None:
    good = {
        "u": torch.zeros(2, 5, 4),
        "delta": torch.zeros(2, 5, 4),
        "A": torch.zeros(4, 3),
        "B": torch.zeros(2, 5, 3),
        "C": torch.zeros(2, 5, 3),
    }
    assert vimcore.ops.selective_scan(**good).shape == (2, 5, 4)
    with pytest.raises(ValueError, match=re.escape(f"[selective_scan] {message}")):
        vimcore.ops.selective_scan(**{**good, **change})


# ---- compile, threads, processes ----


@pytest.mark.filterwarnings("ignore")
def test_compile() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    wanted, grads = run(model, images)
    compiled = torch.compile(model, backend="eager")
    x = images.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    logits = compiled(x)
    assert torch.equal(logits, wanted)
    logits.sum().backward()
    assert torch.equal(x.grad, grads["input"])
    assert all(torch.equal(p.grad, grads[k]) for k, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(
            torch.compile(lambda t: model(t).softmax(1), backend="eager")(images), wanted.softmax(1)
        )


def test_many_threads_give_the_same_bits() -> None:
    """One module, twelve callers: inference and whole training steps of their own inputs."""
    torch.set_num_threads(2)
    model = build(SMALL)
    inputs = [images_for(SMALL, 1 + i % 3, torch.float32, seed=i) for i in range(12)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    gradients = [run(model, x)[1]["input"].clone() for x in inputs]

    def infer(i: int) -> Tensor:
        with torch.no_grad():
            return model(inputs[i])

    def train(i: int) -> Tensor:
        x = inputs[i].clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]

    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            found = list(pool.map(infer, range(12)))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            found = list(pool.map(train, range(12)))
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


class Predictions(torch.utils.data.Dataset[Tensor]):
    """Runs the model, forward and backward, where the data is loaded: in forked workers."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], threads: int) -> None:
        self.model, self.inputs, self.threads = model, inputs, threads

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(self.threads)
        x = self.inputs[index].clone().requires_grad_()
        logits = self.model(x)
        (grad,) = torch.autograd.grad(logits.sum(), x)
        return torch.cat([logits.detach().flatten(), grad.flatten()])


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers(threads: int) -> None:
    torch.set_num_threads(2)
    model = build(SMALL)
    data = Predictions(model, [images_for(SMALL, 1, torch.float32, seed=i) for i in range(6)], threads)
    wanted = [data[i] for i in range(6)]  # the parent's worker threads are running before the fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for _ in range(2):
        found = list(loader)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(data[0], wanted[0])  # and the parent goes on


def ddp_worker(rank: int, folder: str) -> None:
    """One process of two: a step on its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    try:
        model = nn.parallel.DistributedDataParallel(build(SMALL, dtype=torch.float64))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        images = images_for(SMALL, 4).chunk(2)[rank]
        for _ in range(2):
            optimiser.zero_grad()
            model(images).square().mean().backward()
            optimiser.step()
        torch.save(model.module.state_dict(), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_step_is_the_step_of_one_process(tmp_path: Path) -> None:
    model, images = build(SMALL, dtype=torch.float64), images_for(SMALL, 4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimiser.zero_grad()
        model(images).square().mean().backward()
        optimiser.step()
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert relative(first[key] - start[key], value - start[key]) < 1e-9, key


def test_training_learns() -> None:
    """A few steps of AdamW fit eight images."""
    config = small(embed_dim=24, num_classes=4)
    model = vimcore.VisionMamba(**config.arguments())
    images, targets = images_for(config, 8, torch.float32), torch.arange(8) % 4
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    assert (model.eval()(images).argmax(1) == targets).all()


def test_chunk_lengths_are_those_documented() -> None:
    assert (_core.Saved.chunk("lean"), _core.Saved.chunk("fast")) == (64, 16)
