# SPDX-License-Identifier: Apache-2.0
"""Finite differences, and random configurations and lengths against the reference in float64."""

from __future__ import annotations

import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import assert_close, assert_matches_reference, build, images_for, rand
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from vimcore import _core

CHUNKS = sorted({_core.Saved.chunk("lean"), _core.Saved.chunk("fast")})
BORDERS = sorted(
    {1, 2, 3}
    | {k + d for k in (16, 32, 64, 128, 256, 512) for d in (-1, 0, 1)}
    | {m * k + d for k in CHUNKS if k <= 256 for m in (1, 2, 3) for d in (-1, 0, 1)}
)


# ---- the whole network -----------------------------------------------------------------------------------

TINY = reference.Config(
    img_size=(4, 6), patch_size=2, in_chans=2, num_classes=3, embed_dim=4, depth=2, d_state=3, d_conv=3
)


@pytest.mark.slow
@pytest.mark.parametrize("directions", ["none", "block", "ssm", "ssm_conv"])
def test_gradcheck_whole_model(directions: str) -> None:
    config = reference.Config(**{**TINY.arguments(), "directions": directions})
    model = build(config, dtype=torch.float64)
    names = [k for k, _ in model.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    images = images_for(config, 2).requires_grad_()
    assert gradcheck(call, (images, *(p.detach().clone().requires_grad_() for p in model.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", BORDERS)
def test_lengths_around_borders(length: int, dtype: torch.dtype, memory: str) -> None:
    config = reference.Config(
        img_size=(2, 2 * length),
        patch_size=2,
        in_chans=1,
        num_classes=2,
        embed_dim=8,
        depth=1,
        class_token="none",
    )
    assert_matches_reference(config, batch=1, dtype=dtype, memory=memory)


@st.composite
def configurations(draw: st.DrawFn) -> reference.Config:
    """Any architecture that is allowed, small enough for the reference."""
    class_token = draw(st.sampled_from(["none", "head", "double", "middle"]))
    rope = class_token in ("none", "head") and draw(st.booleans())
    directions = draw(st.sampled_from(["none", "sequence", "block", "ssm", "ssm_conv", "ssm_conv"]))
    patch = draw(st.integers(1, 3))
    stride = patch if rope else draw(st.integers(1, patch))
    norm = draw(st.sampled_from(["rms", "layer"]))
    narrowest = 3 if norm == "layer" else 1  # LayerNorm makes +-1 of two numbers, all else is rounding
    rows, cols = draw(
        st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 2), (2, 5), (3, 3), (1, 17), (8, 8), (5, 13)])
    )
    return reference.Config(
        img_size=(patch + stride * (rows - 1), patch + stride * (cols - 1)),
        patch_size=patch,
        stride=stride,
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 5)),
        embed_dim=4 * draw(st.integers(1, 6)) if rope else draw(st.integers(narrowest, 24)),
        depth=2 if directions == "block" else draw(st.integers(1, 3)),
        d_state=draw(st.sampled_from([1, 2, 3, 8, 16, 17])),
        d_conv=draw(st.integers(1, 5)),
        expand=draw(st.integers(1, 3)),
        dt_rank=draw(st.sampled_from(["auto", 1, 2, 5, 17])),
        directions=directions,
        average_directions=draw(st.booleans()),
        class_token=class_token,
        pool=draw(st.sampled_from(["mean", "max", "last", "all"])),
        norm=norm,
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        pos_embed=draw(st.booleans()),
        rope=rope,
        rope_residual=rope and draw(st.booleans()),
        rope_grid=draw(st.sampled_from([4, 14])),
        layer_scale=draw(st.sampled_from([None, 0.5])),
    )


@pytest.mark.slow
@given(config=configurations(), batch=st.integers(1, 3), memory=st.sampled_from(["least", "lean", "fast"]))
def test_random_configurations(config: reference.Config, batch: int, memory: str) -> None:
    if config.directions == "sequence":  # no draw in eval mode, where this strategy is "none"
        config.directions = "none"
    assert_matches_reference(config, batch, torch.float64, memory)


@pytest.mark.slow
@given(config=configurations(), batch=st.integers(1, 3), memory=st.sampled_from(["least", "lean", "fast"]))
def test_random_configurations_float32(config: reference.Config, batch: int, memory: str) -> None:
    if config.directions == "sequence":
        config.directions = "none"
    config.embed_dim = max(
        config.embed_dim, 8
    )  # norms of a few numbers cancel: no accuracy is left in float32
    assert_matches_reference(config, batch, torch.float32, memory)


@pytest.mark.parametrize("depth", [2, 4, 6])
@pytest.mark.parametrize("class_token", ["none", "head", "middle", "double"])
def test_block_pairs(depth: int, class_token: str) -> None:
    assert_matches_reference(
        reference.Config(
            img_size=(6, 4),
            patch_size=2,
            num_classes=3,
            embed_dim=8,
            depth=depth,
            d_state=4,
            directions="block",
            class_token=class_token,
        )
    )


@pytest.mark.slow
def test_realistic_width_in_float32() -> None:
    """The tuned path: Vim-Ti's width and state, two images, a length that no tile divides."""
    config = reference.Config(img_size=(48, 80), patch_size=8, num_classes=10, depth=2)
    assert_matches_reference(config, 2, torch.float32, "lean")
    assert_matches_reference(config, 2, torch.float32, "fast")


@pytest.mark.parametrize("directions", ["none", "block", "ssm", "ssm_conv"])
@pytest.mark.parametrize("class_token", ["none", "head", "middle", "double"])
def test_intermediates(directions: str, class_token: str) -> None:
    config = reference.Config(
        img_size=(6, 4), patch_size=2, num_classes=3, embed_dim=8, depth=4, d_state=4, directions=directions,
        class_token=class_token,
    )  # fmt: skip
    weights, images = reference.random_weights(config), images_for(config, 2)
    indices = [1, 3] if directions == "block" else [0, 2, 3]
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    wanted = [reference.forward(config, leaves, images).intermediates[i] for i in indices]
    model = build(config, weights, torch.float64)
    found = model.forward_intermediates(images, indices=indices)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == (2, config.embed_dim, *config.grid)
        assert relative(a, b) < 1e-12
    sum((i + 1) * (x.square()).sum() for i, x in enumerate(found)).backward()
    sum((i + 1) * (x.square()).sum() for i, x in enumerate(wanted)).backward()
    for key, parameter in model.named_parameters():
        truth = leaves[key].grad
        if truth is None:
            assert parameter.grad is None or not parameter.grad.any(), key
        else:
            assert relative(parameter.grad, truth) < 1e-10, key


def test_features_have_gradients() -> None:
    config = TINY
    weights, images = reference.random_weights(config), images_for(config, 2)
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    x = images.clone().requires_grad_()
    tokens = reference.forward(config, leaves, x).tokens
    probe = torch.randn_like(tokens)
    (tokens * probe).sum().backward()
    model = build(config, weights, torch.float64)
    y = images.clone().requires_grad_()
    (model.forward_features(y) * probe).sum().backward()
    assert relative(y.grad, x.grad) < 1e-10
    for key, parameter in model.named_parameters():
        if not key.startswith("head"):
            assert relative(parameter.grad, leaves[key].grad) < 1e-10, key


def block_of(config: reference.Config, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parameters of the first layer under their names in it, as leaves."""
    weights = reference.random_weights(config, dtype=dtype)
    prefix = "layers.0."
    return {k.removeprefix(prefix): v.requires_grad_() for k, v in weights.items() if k.startswith(prefix)}


BLOCKS = {
    "ssm_conv": {},
    "sum": {"average_directions": False},
    "ssm": {"directions": "ssm"},
    "none": {"directions": "none"},
    "reverse": {"directions": "none"},
    "layer norm": {"norm": "layer"},
    "layer scale": {"layer_scale": 0.5},
}


def block_case(name: str, width: int, state: int, conv: int) -> tuple[reference.Config, dict[str, object]]:
    config = reference.Config(
        img_size=4,
        patch_size=2,
        embed_dim=width,
        depth=1,
        d_state=state,
        d_conv=conv,
        num_classes=0,
        **BLOCKS[name],
    )
    return config, {
        "directions": config.directions,
        "average_directions": config.average_directions,
        "norm": config.norm,
        "reverse": name == "reverse",
    }


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_gradcheck_vim_block(name: str, residual: bool) -> None:
    config, options = block_case(name, 4, 3, 3)
    params = block_of(config)
    inputs = (rand(2, 4, 4), *((rand(2, 4, 4),) if residual else ()))

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        given_ = dict(zip(params, values[len(inputs) :], strict=True))
        return vimcore.ops.vim_block(values[0], given_, values[1] if residual else None, **options)

    assert gradcheck(call, (*inputs, *params.values()))


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_vim_block_against_reference(name: str, dtype: torch.dtype, tolerance: float, memory: str) -> None:
    config, options = block_case(name, 48, 16, 4)
    params = block_of(config, dtype)
    truth = {"layers.0." + k: v.detach().double().requires_grad_() for k, v in params.items()}
    x, r = torch.randn(2, 2, 70, 48, dtype=dtype).unbind(0)
    probes = torch.randn(2, 2, 70, 48, dtype=dtype)
    ours = [t.clone().requires_grad_() for t in (x, r)]
    theirs = [t.double().requires_grad_() for t in (x, r)]
    flip = (lambda t: t.flip(1)) if options["reverse"] else (lambda t: t)

    out, total = vimcore.ops.vim_block(ours[0], params, ours[1], memory=memory, **options)
    wanted = [flip(t) for t in reference.layer(config, truth, 0, *map(flip, theirs), None)]
    assert relative(out, wanted[0]) < tolerance
    assert relative(total, wanted[1]) < tolerance

    found = torch.autograd.grad(
        (out * probes[0]).sum() + (total * probes[1]).sum(), [*ours, *params.values()]
    )
    loss = (wanted[0] * probes[0].double()).sum() + (wanted[1] * probes[1].double()).sum()
    true = torch.autograd.grad(loss, [*theirs, *truth.values()])
    names = ["x", "residual", *params]
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, true, strict=True)), 10 * tolerance)


def test_vim_blocks_make_the_model() -> None:
    """Chained blocks, the embedding and the final norm around them, give the network's own features."""
    config = reference.Config(img_size=12, patch_size=2, num_classes=3, embed_dim=24, depth=3)
    weights, images = reference.random_weights(config), images_for(config, 2)
    model = build(config, weights, torch.float64)
    h, r = reference.embed(config, weights, images, reference.Draws()).contiguous(), None
    for layer in model.layers:
        h, r = vimcore.ops.vim_block(h, dict(layer.named_parameters()), r)
    tokens = vimcore.ops.rms_norm(h, model.norm_f.weight, residual=r)[0]
    assert relative(model.forward_features(images), tokens) < 1e-12


# ---- the draws of training -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({}, {"drop_path"}),
        ({}, {"mask"}),
        ({"directions": "block", "depth": 4}, {"drop_path"}),
        ({"directions": "sequence"}, {"flip"}),
        ({"directions": "sequence", "class_token": "head", "rope": True, "rope_residual": True}, {"flip"}),
        ({"directions": "sequence", "class_token": "none", "pool": "last"}, {"flip", "drop_path", "mask"}),
        ({"class_token": "random"}, {"class_position"}),
        ({"class_token": "random", "directions": "ssm"}, {"class_position", "drop_path", "mask"}),
    ],
)
def test_draws_of_training(
    options: dict[str, object], drawn: set[str], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reference.Config(
        **{
            "img_size": (6, 8),
            "patch_size": 2,
            "num_classes": 3,
            "embed_dim": 8,
            "depth": 3,
            "d_state": 4,
            **options,
        }
    )
    weights, images = reference.random_weights(config), images_for(config, 3)
    keep = torch.rand(config.depth, 3, dtype=torch.float64) < 0.6
    draws = reference.Draws(
        drop_path=keep.double() / 0.6 if "drop_path" in drawn else None,
        mask=(torch.rand(3, config.tokens, 8) < 0.5) * 2.0 if "mask" in drawn else None,
        flip="flip" in drawn,
        class_position=5 if "class_position" in drawn else 0,
    )
    if draws.mask is not None:
        draws.mask = draws.mask.double()
    if draws.drop_path is not None and config.directions == "block":
        draws.drop_path[0] = 1  # the first pair's second layer sees the embeddings, which are never dropped
    model = build(config, weights, torch.float64, memory)
    made = _core.Draws(
        draws.drop_path, draws.mask, draws.flip, draws.class_position if "class_position" in drawn else -1
    )
    monkeypatch.setattr(type(model), "_draws", lambda self, kind, images, position: made)
    wanted, grads = reference.gradients(config, weights, images, draws=draws)
    x = images.clone().requires_grad_()
    logits = model(x)
    assert relative(logits, wanted.logits) < 1e-12
    logits.sum().backward()
    found = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    assert_close(found | {"input": x.grad}, grads, 1e-9)
    if "class_position" not in drawn:
        assert relative(model.forward_features(images), wanted.tokens) < 1e-12
