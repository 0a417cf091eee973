# SPDX-License-Identifier: Apache-2.0
"""Networks at other sizes than that of their position table: `dynamic_img_size`, `set_input_size`.

The truth is the reference in float64 with the table resized by torch; the bits are those of a network that
was made for the size and got a resized table.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import vimcore
from golden import relative
from helpers import SMALL, assert_close, build, images_for, run, small
from torch import Tensor
from vimcore.io import load_model, resize_pos_embed
from vimcore.nn.plain import Plain

SIZES = [(20, 16), (4, 8), (24, 5), (11, 15)]  # larger, smaller, narrow, no multiples of the patch
DESIGNS: dict[str, dict[str, Any]] = {
    "middle": {},
    "head": {"class_token": "head"},
    "double": {"class_token": "double"},
    "random": {"class_token": "random"},
    "register": {"class_token": "registers", "registers": 1},
    "mean": {"class_token": "none"},
    "max": {"class_token": "none", "pool": "max"},
    "last": {"class_token": "none", "pool": "last"},
    "all": {"class_token": "none", "pool": "all"},
    "rope": {"class_token": "none", "rope": True, "rope_residual": True, "rope_grid": 5},
    "rope head": {"class_token": "head", "rope": True, "rope_grid": 5},
    "rope alone": {"class_token": "none", "rope": True, "pos_embed": False, "rope_grid": 5},
    "overlap": {"stride": 2},
    "pairs": {"directions": "block"},
}


def at(config: reference.Config, size: tuple[int, int]) -> reference.Config:
    return dataclasses.replace(config, img_size=size)


def by_torch(table: Tensor, old: reference.Config, new: reference.Config) -> Tensor:
    """The table of `old` on the grid of `new`: torch's bicubic interpolation of the patches' rows."""
    own = old.class_token == "registers"  # which have a table of their own
    rows = [] if own else reference.class_positions(old, reference.Draws(class_position=0))
    patches = [i for i in range(table.shape[1]) if i not in rows]
    grid = table[:, patches].unflatten(1, old.grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new.grid, mode="bicubic", align_corners=False)
    others = [table[:, i] for i in rows]
    result = list(grid.flatten(2)[0].T[:, None].unbind())
    for place, row in zip(reference.class_positions(new, reference.Draws(class_position=0)), others):
        result.insert(place, row)
    return torch.stack(result, 1)


def truth(
    config: reference.Config, weights: dict[str, Tensor], images: Tensor, probe: Tensor
) -> tuple[reference.Result, dict[str, Tensor]]:
    """The reference at the size of the images, and gradients of sum(logits * probe), also of the table."""
    w = {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
    x, here = images.detach().clone().requires_grad_(), at(config, tuple(images.shape[2:]))  # type: ignore
    resized = {"pos_embed": by_torch(w["pos_embed"], config, here)} if config.pos_embed else {}
    result = reference.forward(here, {**w, **resized}, x)
    found = torch.autograd.grad((result.logits * probe).sum(), [x, *w.values()])
    return result, dict(zip(["input", *w], found, strict=True))


def made_for(model: vimcore.VisionMamba, size: tuple[int, int]) -> vimcore.VisionMamba:
    """A network made for another size, with the weights of `model` and its table resized."""
    other = vimcore.VisionMamba(**{**model.config, "img_size": size}, memory=model.memory)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("rope.")}
    if "pos_embed" in state:
        old, new = vimcore.config.patch_grid(model.config), vimcore.config.patch_grid(other.config)
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old, new, model.config["class_token"])
    other.to(model.norm_f.weight.dtype).load_state_dict(state, strict=False)
    return other.train(model.training)


def dynamic(config: reference.Config, dtype: torch.dtype = torch.float32) -> vimcore.VisionMamba:
    model = build(config, dtype=dtype)
    model.dynamic_img_size = True
    return model


def pictures(size: tuple[int, int], batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return images_for(at(SMALL, size), batch, dtype)


# ---- what is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_the_reference(design: str) -> None:
    config = small(**DESIGNS[design])
    model = dynamic(config, torch.float64).eval()
    weights = {k: p.detach() for k, p in model.named_parameters()}
    for size in SIZES:
        images = pictures(size, 2, torch.float64)
        shape = model(images).shape
        assert shape == ((2, at(config, size).patches, 3) if design == "all" else (2, 3))
        probe = torch.randn(shape, dtype=torch.float64)
        result, gradients = truth(config, weights, images, probe)
        logits, found = run(model, images, probe)
        assert relative(logits, result.logits) < 1e-12
        assert_close(found, gradients, 1e-9)
        tokens = model.forward_features(images)
        assert relative(tokens, result.tokens) < 1e-12
        assert relative(model.forward_head(tokens), result.logits) < 1e-12
        last = model.forward_intermediates(images, [1])[0]
        assert last.shape[2:] == at(config, size).grid
        assert relative(last, result.intermediates[1]) < 1e-12


@pytest.mark.parametrize("design", ["middle", "double", "rope head"])
@pytest.mark.parametrize("size", [(12, 8), (4, 8)])
def test_gradcheck(design: str, size: tuple[int, int]) -> None:
    model = dynamic(small(**DESIGNS[design]), torch.float64).eval()
    table = model.pos_embed
    images = pictures(size, 1, torch.float64)

    def network(values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"pos_embed": values}, (images,))

    assert torch.autograd.gradcheck(network, (table,))


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
def test_bits_of_a_network_made_for_the_size(design: str, memory: str) -> None:
    """Also in training: the same draws, the same dropout, whatever is kept for backward."""
    drops = {"drop_rate": 0.2, "drop_path_rate": 0.5}
    model = dynamic(small(**DESIGNS[design], **drops)).train()
    model.memory = memory
    for size in SIZES[:2]:
        images = pictures(size)
        plain = made_for(model, size)
        torch.manual_seed(5)
        wanted, wanted_gradients = run(plain, images)
        torch.manual_seed(5)
        logits, gradients = run(model, images)
        assert torch.equal(logits, wanted)
        for name, gradient in wanted_gradients.items():
            if name != "pos_embed":
                assert torch.equal(gradients[name], gradient), name
        assert torch.equal(model.eval()(images), plain.eval()(images))
        model.train()


def test_sequences_run_backwards() -> None:
    model = dynamic(small(directions="sequence")).train()
    for seed in range(4):
        plain = made_for(model, (20, 16))
        torch.manual_seed(seed)
        wanted = plain(pictures((20, 16)))
        torch.manual_seed(seed)
        assert torch.equal(model(pictures((20, 16))), wanted)


def test_batches_and_order_do_not_matter() -> None:
    model = dynamic(SMALL)
    alone = {size: run(copy.deepcopy(model), pictures(size)) for size in [*SIZES, (8, 12)]}
    for size in [*SIZES, *SIZES[::-1], (8, 12), SIZES[0], SIZES[0]]:
        logits, gradients = run(model, pictures(size))
        assert torch.equal(logits, alone[size][0])
        assert all(torch.equal(gradients[k], g) for k, g in alone[size][1].items())
        assert torch.equal(model(pictures(size)[1:2])[0], logits[1])


def test_gradients_of_two_sizes_add_up() -> None:
    model = dynamic(SMALL, torch.float64)
    parts = [run(model, pictures(size, dtype=torch.float64))[1] for size in SIZES[:2]]
    model.zero_grad()
    (sum(model(pictures(size, dtype=torch.float64)).sum() for size in SIZES[:2])).backward()  # type: ignore
    for name, p in model.named_parameters():
        assert relative(p.grad, parts[0][name] + parts[1][name]) < 1e-12


def test_frozen_tables_and_empty_batches() -> None:
    model = dynamic(SMALL)
    model.pos_embed.requires_grad_(False)
    model(pictures((20, 16))).sum().backward()
    assert model.pos_embed.grad is None
    assert model.head.weight.grad is not None
    assert model(torch.zeros(0, 3, 20, 16)).shape == (0, 3)
    assert model.forward_features(torch.zeros(0, 3, 20, 16)).shape == (0, 21, 16)


def test_autocast_and_channels_last() -> None:
    model = dynamic(SMALL).eval()
    images = pictures((20, 16))
    wanted = model(images)
    assert torch.equal(model(images.to(memory_format=torch.channels_last)), wanted)
    with torch.autocast("cpu"):
        assert torch.equal(model(images), model(images.bfloat16()))


@pytest.mark.parametrize("design", ["middle", "double", "rope head"])
def test_looking_inside(design: str) -> None:
    """The network in plain torch, for `health`, and explanations go with the size of the images."""
    model = dynamic(small(**DESIGNS[design]), torch.float64).eval()
    images = pictures((20, 16), 2, torch.float64)
    tokens = Plain(model, lambda name, x: None).tokens(images)
    assert relative(tokens, model.forward_features(images)) < 1e-12
    assert vimcore.saliency(model, images, 1, steps=2).shape == (2, 20, 16)
    assert vimcore.health(dynamic(SMALL), images.float()).first_nonfinite is None


# ---- nothing is stale --------------------------------------------------------------------------------------


def write_data(model: vimcore.VisionMamba) -> None:
    model.pos_embed.data.add_(0.5)


def write_one_row(model: vimcore.VisionMamba) -> None:
    model.pos_embed.data[0, 3] += 1.0


def write_numpy(model: vimcore.VisionMamba) -> None:
    model.pos_embed.detach().numpy()[:] *= 1.5


def write_optimizer(model: vimcore.VisionMamba) -> None:
    optimizer = torch.optim.SGD([model.pos_embed], lr=0.1, fused=True)
    model(pictures((20, 16))).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def write_state(model: vimcore.VisionMamba) -> None:
    model.load_state_dict({**model.state_dict(), "pos_embed": model.pos_embed.detach() * 2})


def exchange_data(model: vimcore.VisionMamba) -> None:
    model.pos_embed.data = model.pos_embed.data + 1


def exchange_parameter(model: vimcore.VisionMamba) -> None:
    model.pos_embed = torch.nn.Parameter(model.pos_embed.detach() - 1)


@pytest.mark.parametrize(
    "write",
    [
        write_data,
        write_one_row,
        write_numpy,
        write_optimizer,
        write_state,
        exchange_data,
        exchange_parameter,
    ],
)
def test_writes_are_seen_at_every_size(write: Callable[[vimcore.VisionMamba], None]) -> None:
    model = dynamic(SMALL).eval()
    sizes = [(20, 16), (8, 12), (12, 8)]
    for _ in range(2):
        before = [model(pictures(size)).detach() for size in sizes]
        write(model)
        fresh = copy.deepcopy(model)
        for size, old in zip(sizes, before):
            now = model(pictures(size))
            assert not torch.equal(now, old)
            assert torch.equal(now, fresh(pictures(size)))
            assert torch.equal(now, made_for(model, size)(pictures(size)))


def test_weights_said_to_be_constant() -> None:
    model = dynamic(SMALL).eval()
    sizes = [(20, 16), (8, 12), (12, 8)]
    wanted = [model(pictures(size)) for size in sizes]
    with model.constant_weights():
        for _ in range(2):
            assert all(torch.equal(model(pictures(s)), w) for s, w in zip(sizes, wanted))
        model.pos_embed.data.add_(1)
        model.weights_changed()
        for size in sizes:
            assert torch.equal(model(pictures(size)), made_for(model, size)(pictures(size)))
    constant = model.constant_weights()
    constant.__enter__()
    model(pictures((20, 16)))
    model.pos_embed.data.add_(1)
    with pytest.raises(RuntimeError, match="weights changed"):
        constant.__exit__(None, None, None)
    for size in sizes:
        assert torch.equal(model(pictures(size)), made_for(model, size)(pictures(size)))


# ---- what is refused ---------------------------------------------------------------------------------------


def test_other_sizes_without_the_option() -> None:
    model = build(SMALL).eval()
    remedies = r"dynamic_img_size=True, set_input_size\(\(20, 16\)\), or load\(\.\.\., img_size=\(20, 16\)\)"
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 8, 12\) .*: other sizes by " + remedies):
        model(pictures((20, 16)))
    with pytest.raises(
        ValueError, match=r"images: expected \(B, 3, 8, 12\) f32 or bf16 cpu, got \(2, 1, 8, 12\) f32 cpu$"
    ):
        model(torch.zeros(2, 1, 8, 12))


def test_what_dynamic_sizes_refuse() -> None:
    model = dynamic(SMALL).eval()
    with pytest.raises(ValueError, match=r"img_size: image of 3 x 16 is smaller than a patch of 4"):
        model(pictures((3, 16)))
    with pytest.raises(
        ValueError, match=r"images: expected \(B, 3, H, W\) f32 or bf16 cpu, got \(2, 1, 20, 16\) f32 cpu"
    ):
        model(torch.zeros(2, 1, 20, 16))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\)"):
        model(torch.zeros(3, 20, 16))
    with pytest.raises(TypeError, match="dynamic_img_size: expected True or False, got 'yes'"):
        vimcore.VisionMamba(**SMALL.arguments(), dynamic_img_size="yes")


# ---- the option, files, copies -----------------------------------------------------------------------------


def test_the_option_is_not_of_the_architecture(tmp_path: Path) -> None:
    """Files are the same with and without; who loads says what the network is for."""
    torch.manual_seed(0)
    fixed = vimcore.VisionMamba(**SMALL.arguments())
    torch.manual_seed(0)
    free = vimcore.VisionMamba(**SMALL.arguments(), dynamic_img_size=True)
    assert (free.dynamic_img_size, fixed.dynamic_img_size) == (True, False)
    assert free.config == fixed.config
    assert "dynamic_img_size" not in free.config
    free(pictures((20, 16)))
    for name, model in (("fixed", fixed), ("free", free)):
        model.save(tmp_path / name)
    assert (tmp_path / "fixed").read_bytes() == (tmp_path / "free").read_bytes()
    for again in (
        vimcore.VisionMamba.load(tmp_path / "free", dynamic_img_size=True),
        load_model(tmp_path / "free", dynamic_img_size=True),
    ):
        assert torch.equal(again(pictures((20, 16))), free.eval()(pictures((20, 16))))
    runtime = vimcore.Runtime(tmp_path / "free", img_size=(20, 16))
    assert np.array_equal(runtime(pictures((20, 16)).numpy()), free(pictures((20, 16))).detach().numpy())
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        vimcore.VisionMamba.load(tmp_path / "free")(pictures((20, 16)))


def test_copies_keep_the_option() -> None:
    model = dynamic(SMALL).eval()
    wanted = model(pictures((20, 16)))
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(memory, weights_only=False),
    ):
        assert torch.equal(again(pictures((20, 16))), wanted)
    old = build(SMALL)
    del old.__dict__["dynamic_img_size"]  # of a file that an earlier version pickled
    assert pickle.loads(pickle.dumps(old))(pictures((8, 12))).shape == (3, 3)


def test_operations_of_a_size() -> None:
    model = dynamic(SMALL)
    assert model.flops() == vimcore.VisionMamba(**SMALL.arguments()).flops()
    assert model.flops((20, 16)) == made_for(model, (20, 16)).flops() > model.flops()


# ---- set_input_size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_set_input_size(design: str, tmp_path: Path) -> None:
    model = build(small(**DESIGNS[design])).eval()
    before = dict(model.named_parameters())
    model.save(tmp_path / "before")
    wanted = load_model(tmp_path / "before", img_size=(20, 16))
    model(pictures((8, 12)))
    model.set_input_size((20, 16))
    assert model.config == wanted.config
    assert model.config["img_size"] == [20, 16]
    for name, p in model.named_parameters():
        assert (p is before[name]) == (name != "pos_embed"), name
        assert torch.equal(p, wanted.get_parameter(name)), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), wanted.buffers(), strict=True))
    assert torch.equal(model(pictures((20, 16))), wanted(pictures((20, 16))))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 20, 16\)"):
        model(pictures((8, 12)))
    model.save(tmp_path / "after")
    assert torch.equal(load_model(tmp_path / "after")(pictures((20, 16))), wanted(pictures((20, 16))))
    model.dynamic_img_size = True
    assert torch.equal(model(pictures((12, 8))), made_for(model, (12, 8))(pictures((12, 8))))


def test_set_input_size_keeps_what_it_can() -> None:
    model = build(SMALL, dtype=torch.float64)
    model.pos_embed.requires_grad_(False)
    table = model.pos_embed
    model.set_input_size((11, 15))  # other pixels, the same grid
    assert model.pos_embed is table
    assert model.config["img_size"] == [11, 15]
    model.set_input_size(16)
    assert model.config["img_size"] == [16, 16]
    assert model.pos_embed.dtype == torch.float64
    assert not model.pos_embed.requires_grad
    assert list(dict(model.named_parameters())) == list(dict(build(SMALL).named_parameters()))
    assert torch.equal(model.pos_embed, resize_pos_embed(table, (2, 3), (4, 4)))


def test_set_input_size_refuses() -> None:
    model = build(SMALL)
    config, table = model.config, model.pos_embed
    for size in (3, (8, 0), (8, 12, 4)):
        with pytest.raises(ValueError, match="img_size"):
            model.set_input_size(size)
    assert model.config == config
    assert model.pos_embed is table
    torch.nn.utils.parametrize.register_parametrization(model, "pos_embed", torch.nn.Tanh(), unsafe=True)
    with pytest.raises(RuntimeError, match=r"pos_embed.*parametri"):
        model.set_input_size(16)
    with model.constant_weights(), pytest.raises(RuntimeError, match="constant_weights"):
        model.set_input_size(16)


# ---- the table itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["correct", "authors"])
@pytest.mark.parametrize("class_token", ["middle", "double", "none", "random"])
def test_resized_tables_are_differentiable(class_token: str, way: str) -> None:
    rows = {"none": 0, "double": 2}.get(class_token, 1)
    table = torch.randn(1, 6 + rows, 3, dtype=torch.float64, requires_grad=True)

    def resize(t: Tensor) -> Tensor:
        return resize_pos_embed(t, (2, 3), (5, 4), class_token, way)

    assert torch.autograd.gradcheck(resize, (table,))
    assert torch.autograd.gradgradcheck(lambda t: resize(t.sin()), (table,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_of_tables(dtype: torch.dtype) -> None:
    table = torch.randn(1, 14 * 14 + 1, 24).to(dtype).requires_grad_()
    found = resize_pos_embed(table, (14, 14), (27, 31))
    config = reference.Config(img_size=224)
    wanted = by_torch(table.detach().double(), config, dataclasses.replace(config, img_size=(432, 496)))
    assert found.dtype == dtype
    assert torch.equal(found.detach(), wanted.to(dtype))
    found.float().sum().backward()
    assert table.grad is not None
    assert table.grad.dtype == dtype


def test_close_to_float32_in_torch() -> None:
    """What this resize wrote before it was the core's: float32 throughout."""
    table = 0.02 * torch.randn(1, 14 * 14, 192)
    grid = table.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    before = (
        F.interpolate(grid, size=(27, 27), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    )
    assert (resize_pos_embed(table, (14, 14), (27, 27), "none") - before).abs().max() < 5e-7
