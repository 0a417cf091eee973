# SPDX-License-Identifier: Apache-2.0
"""Network, block, scans, convolution and norm as operators: compiled, exported, transformed, counted."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchinfo
import vimcore
from fvcore.nn import FlopCountAnalysis
from golden import relative
from helpers import SMALL, build, images_for, small
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

Model = vimcore.VisionMamba
OPS = torch.ops.vimcore

# L and widths are multiples of 16: no bytes lie unwritten between what is saved, and all can be compared.
B, L, E, N, R, K, D = 2, 16, 32, 4, 2, 3, 16


def rand(*shape: int, grad: bool = True) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_(grad)


def scan(*optional: Tensor | None) -> tuple[Any, ...]:
    A = (-rand(E, N).detach()).requires_grad_()
    return rand(B, L, E), rand(B, L, E), A, rand(B, L, N), rand(B, L, N), *optional, True, False


def both() -> list[Tensor]:
    return [rand(B, L, E), rand(B, L, R + 2 * N), rand(E, N), rand(E), rand(E, R), rand(E)] * 2


WHOLE = small(img_size=(16, 16), class_token="none", d_state=4, depth=1)


def network(outputs: str, save: bool, memory: str = "lean") -> tuple[Any, ...]:
    model = build(WHOLE)
    core, params = model._weights()
    images = images_for(WHOLE, B, torch.float32).requires_grad_(save)
    params = [p if save else p.detach() for p in params]
    return images, params, core.config.to_json(), outputs, memory, None, None, None, save, False


def block(memory: str, residual: bool) -> tuple[Any, ...]:
    layer = build(WHOLE).layers[0]
    config = layer._config
    named = dict(layer.named_parameters())
    params = [named[name] for name in config.block_shapes()]
    rest = rand(B, L, D) if residual else None
    return rand(B, L, D), rest, params, config.to_json(), False, memory, True


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "norm": lambda: (OPS.norm, (rand(B, L, D), rand(D), None, None, "rms", 1e-5)),
    "norm, all": lambda: (OPS.norm, (rand(B, L, D), rand(D), rand(D), rand(B, L, D), "layer", 1e-5)),
    "conv": lambda: (OPS.causal_conv1d, (rand(B, L, E), rand(E, K), rand(E), True, False)),
    "conv, reverse": lambda: (OPS.causal_conv1d, (rand(B, L, E), rand(E, K), None, False, True)),
    "scan": lambda: (OPS.selective_scan, scan(None, None, None)),
    "scan, all": lambda: (OPS.selective_scan, scan(rand(E), rand(B, L, E), rand(E))),
    "both scans": lambda: (OPS.bidirectional_scan, (rand(B, L, E), both(), 0.5, 64, True)),
    "block, least": lambda: (OPS.block, block("least", True)),
    "block, fast": lambda: (OPS.block, block("fast", False)),
    "logits": lambda: (OPS.network, network("logits", True)),
    "tokens": lambda: (OPS.network, network("tokens", True, "least")),
    "layers": lambda: (OPS.network, network("layers 0", True, "fast")),
    "inference": lambda: (OPS.network, network("logits", False)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, args = CALLS[name]()
    found = torch.library.opcheck(op.default, args)
    assert set(found.values()) == {"SUCCESS"}


def gradient_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator that computes gradients, with arguments as its forward leaves them."""
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    with torch.no_grad():
        x, weight, bias = rand(B, L, D), rand(D), rand(D)
        total = OPS.norm(x, weight, bias, x, "layer", 1e-5)[1]
        calls["norm"] = OPS.norm_backward, (x, x, total, weight, bias, "layer", 1e-5)
        conv = (rand(B, L, E), rand(E, K), rand(E), True, False)
        calls["conv"] = OPS.causal_conv1d_backward, (rand(B, L, E), *conv)
        calls["scan"] = OPS.selective_scan_backward, (rand(B, L, E), *scan(rand(E), None, rand(E)))
        args = (rand(B, L, E), both(), 0.5, 64)
        _, first, second = OPS.bidirectional_scan(*args, True)
        back = (args[0], args[0], args[1], first, second, 0.5, 64)
        calls["both scans"] = OPS.bidirectional_scan_backward, back
        one = block("lean", True)
        out, total, saved = OPS.block(*one)
        calls["block"] = OPS.block_backward, (out, None, total, saved, one[2], *one[3:6])
        images, params, *options, _, _ = network("logits", True)
        logits, saved = OPS.network(images, params, *options, True, False)
        wanted = [i % 3 > 0 for i in range(len(params))]
        calls["network"] = OPS.network_backward, (logits, images, params, saved, *options, wanted, True)
    return {name: (op, detached(args)) for name, (op, args) in calls.items()}


def detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(detached, value))
    return value.detach() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ["norm", "conv", "scan", "both scans", "block", "network"])
def test_opcheck_of_gradients(name: str) -> None:
    op, args = gradient_calls()[name]
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    ours = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name[:9] == "vimcore::"}
    checked = {op.default.name().split("::")[1] for op, _ in [c() for c in CALLS.values()]}
    assert ours == checked | {op.default.name().split("::")[1] for op, _ in gradient_calls().values()}


# ---- torch.compile -----------------------------------------------------------------------------------------

DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.3}
DESIGNS: dict[str, dict[str, Any]] = {
    "middle": DROPS,
    "random": {"class_token": "random", **DROPS},
    "sequence": {"directions": "sequence", "rope": True, "class_token": "none", "pool": "last", **DROPS},
    "registers": {"class_token": "registers", "registers": 4, "neck_reduction": 2, **DROPS},
    "clips": {"frames": 2, "class_token": "head", **DROPS},
}


def hook_on_head(model: Model) -> None:
    model.head.register_forward_hook(lambda *_: None)


def hook_inside(model: Model) -> None:
    model.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)


def compiled_step(design: str, backend: str, hang: Callable[[Model], None] | None = None) -> None:
    """One step of training, compiled and not, from the same draws."""
    torch._dynamo.reset()
    config = small(img_size=(12, 12), **DESIGNS[design])
    model, images = build(config, dtype=torch.float64).train(), images_for(config, 2)
    if hang:
        hang(model)
    parameters = list(model.parameters())
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        torch.manual_seed(1)
        logits = call(images)
        found.append([logits, *torch.autograd.grad(logits.sum(), parameters)])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*found))


@pytest.mark.parametrize("design", DESIGNS)
def test_compiled_training(design: str) -> None:
    compiled_step(design, "eager")


@pytest.mark.parametrize("hang", [None, hook_on_head, hook_inside])
def test_compiled_training_by_aot_autograd(hang: Callable[[Model], None] | None) -> None:
    compiled_step("middle", "aot_eager", hang)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["random", "sequence", "registers"])
def test_compiled_training_of_hooked_networks(design: str) -> None:
    compiled_step(design, "eager", hook_inside)


def test_compiled_inference() -> None:
    """Features and maps, batches and sizes that change, autocast."""
    torch._dynamo.reset()
    model = build(SMALL).eval()
    model.dynamic_img_size = True
    call = torch.compile(model, fullgraph=True, backend="eager")
    for shape in ((2, 3, 8, 12), (3, 3, 8, 12), (1, 3, 16, 12), (2, 3, 20, 8)):
        images = torch.randn(shape)
        assert torch.equal(call(images), model(images))
    images = torch.randn(2, 3, 8, 12)
    for method in (model.forward_features, model.forward_intermediates):
        found, wanted = torch.compile(method, fullgraph=True, backend="eager")(images), method(images)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    with torch.autocast("cpu"):
        assert call(images).dtype == torch.bfloat16
        assert torch.equal(call(images), model(images))
    model.dynamic_img_size = False
    with pytest.raises(Exception, match="other sizes by dynamic_img_size"):
        call(torch.randn(2, 3, 4, 4))


def test_compiled_operators() -> None:
    torch._dynamo.reset()
    named = dict(build(SMALL).layers[0].named_parameters())
    x = torch.randn(2, 7, 16, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        out, total = vimcore.ops.vim_block(x, named)
        y = vimcore.ops.causal_conv1d(vimcore.ops.rms_norm(out, torch.ones(16), total)[0], torch.ones(16, 2))
        return vimcore.ops.selective_scan(y, y, -torch.ones(16, 3), y[..., :3], y[..., 3:6]).sum()

    wanted = torch.autograd.grad(function(x), x)[0]
    found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x)[0]
    assert relative(found, wanted) < 1e-6


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """What users get without naming a backend: needs a C++ compiler."""
    torch._dynamo.reset()
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    wanted = [model(images), *torch.autograd.grad(model(images).square().sum(), list(model.parameters()))]
    logits = torch.compile(model, fullgraph=True)(images)
    found = [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, wanted))


# ---- torch.export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, tmp_path: Path) -> None:
    """A graph of one operator, for any batch, which a file keeps; the model is as before."""
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=sizes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "getitem" not in name] == ["vimcore.network.default"]
    assert torch.equal(model(images), wanted)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    call = torch.export.load(buffer).module()
    assert torch.equal(call(images), wanted)
    five = images_for(SMALL, 5, torch.float32)
    assert torch.equal(call(five), model(five))


def test_exported_with_hooks_and_heads() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    model.layers[0].register_forward_hook(lambda m, a, out: (2 * out[0], out[1]))
    model.head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    wanted = model(images)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
    assert relative(program.module()(images), wanted) < 1e-6


def test_traced_by_make_fx() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    for options in ({}, {"pre_dispatch": True}):
        graph = make_fx(model, **options)(images)
        assert any(node.target is OPS.network.default for node in graph.graph.nodes)
        assert torch.equal(graph(2 * images), model(2 * images))


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path: Path) -> None:
    """AOTInductor's package, loaded by a process that imports torch and vimcore and builds no model."""
    model, images = build(SMALL).eval(), images_for(SMALL, 3, torch.float32)
    wanted = model(images)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    torch.save({"images": images, "wanted": wanted}, tmp_path / "truth.pt")
    code = (
        "import torch, vimcore.ops\n"
        "truth = torch.load('truth.pt')\n"
        "model = torch._inductor.aoti_load_package('model.pt2')\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(truth['images']), truth['wanted'])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_weights_of_a_model_that_is_gone_are_let_go() -> None:
    from vimcore.autograd.network_operator import CORES

    gc.collect()
    before = len(CORES)
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    for _ in range(2):
        torch.vmap(model)(images[None])
    assert len(CORES) == before + 1
    del model
    gc.collect()
    assert len(CORES) == before


def test_changed_weights_are_seen() -> None:
    """By operators as by plain calls, however they were written to."""
    torch._dynamo.reset()
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(images)
    model.layers[1].mixer.A_log.data.mul_(1.5)
    assert torch.equal(call(images), model(images))
    model.head.weight.detach().numpy()[0] += 1
    assert torch.equal(call(images), model(images))


# ---- torch.func --------------------------------------------------------------------------------------------


def test_functional_gradients() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    x = images.clone().requires_grad_()
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert torch.equal(torch.func.grad(lambda t: model(t).square().sum())(images), wanted)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    found = torch.func.grad(loss)(weights)
    truth = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), truth))
    jacobian = torch.autograd.functional.jacobian(model, images)
    assert relative(torch.func.jacrev(model)(images), jacobian) < 1e-6
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.func.grad(lambda t: torch.func.grad(lambda s: model(s).sum())(t).sum())(images)


def test_functionalized() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    assert torch.equal(torch.func.functionalize(model)(images), model(images))


def test_vmap_over_images() -> None:
    """One batch of all, with gradients, of every output."""
    model, images = build(SMALL).eval(), images_for(SMALL, 4, torch.float32)
    sets = images.unflatten(0, (2, 2))
    wanted = model(images)
    assert torch.equal(torch.vmap(model)(sets).flatten(0, 1), wanted)
    assert torch.equal(torch.vmap(model, in_dims=1)(sets.movedim(0, 1)).flatten(0, 1), wanted)
    found = torch.autograd.grad(torch.vmap(model)(sets).sum(), list(model.parameters()))
    truth = torch.autograd.grad(wanted.sum(), list(model.parameters()))
    assert all(relative(a, b) < 1e-6 for a, b in zip(found, truth))
    for ours, whole in zip(
        torch.vmap(model.forward_intermediates)(sets), model.forward_intermediates(images)
    ):
        assert torch.equal(ours.flatten(0, 1), whole)
    dropping = build(small(**DROPS)).train()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropping)(sets)
    assert torch.vmap(dropping, randomness="different")(sets).shape == (2, 2, 3)
    torch.manual_seed(0)
    found_sets = torch.vmap(dropping, randomness="same")(sets)
    for images_of_set, found_of_set in zip(sets, found_sets):
        torch.manual_seed(0)
        assert relative(found_of_set, dropping(images_of_set)) < 1e-6
    flipping = build(small(directions="sequence")).train()
    assert torch.vmap(flipping, randomness="same")(sets).shape == (2, 2, 3)
    with pytest.raises(TypeError, match="randomness='same'"):
        torch.vmap(flipping, randomness="different")(sets)


def test_gradients_of_every_image() -> None:
    """vmap of grad, as for differential privacy."""
    model, images = build(SMALL).eval(), images_for(SMALL, 3, torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    for k, image in enumerate(images):
        one = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        assert all(relative(a[k], b) < 1e-6 for a, b in zip(found.values(), one))


def test_vmap_of_operators() -> None:
    x, weight = torch.randn(3, 2, 7, 4), torch.ones(4)
    assert torch.equal(
        torch.vmap(lambda t: vimcore.ops.rms_norm(t, weight))(x), vimcore.ops.rms_norm(x, weight)
    )
    taps = torch.randn(4, 2)
    found = torch.vmap(lambda t: vimcore.ops.causal_conv1d(t, taps))(x)
    assert torch.equal(found, torch.stack([vimcore.ops.causal_conv1d(t, taps) for t in x]))
    named = dict(build(SMALL).layers[0].named_parameters())
    tokens = torch.randn(3, 2, 7, 16)
    found = torch.vmap(lambda t: vimcore.ops.vim_block(t, named)[0])(tokens)
    truth = torch.stack([vimcore.ops.vim_block(t, named)[0] for t in tokens])
    assert relative(found, truth) < 1e-6


# ---- counters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [*DESIGNS, "none", "block"])
def test_flop_counter(design: str) -> None:
    """Two for each multiply-add of `flops()`, split by module; twice as many again in backward."""
    more = {
        "none": {"directions": "none"},
        "block": {"directions": "block", "pool": "max", "class_token": "none"},
    }
    config = small(img_size=(12, 12), **(DESIGNS | more)[design])
    model, images = build(config).eval(), images_for(config, 2, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * 2 * model.flops()
    assert "VisionMamba.layers.1.mixer.in_proj" in counter.get_flop_counts()
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert 2 * 6 * model.flops() - counter.get_total_flops() < 0.1 * 2 * 6 * model.flops()


def test_flops_of_the_network_operator() -> None:
    """As compiled graphs call it; another size has its own number."""
    model = build(SMALL).eval()
    core, params = model._weights()
    for kind, macs in (("logits", model.flops()), ("tokens", model.flops() - model.head.weight.numel())):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            options = (core.config.to_json(), kind, "lean", None, None, None, False, False)
            OPS.network(torch.zeros(2, 3, 8, 12), params, *options)
        assert counter.get_total_flops() == 2 * 2 * macs


def test_fvcore() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    counts = FlopCountAnalysis(model, images).set_op_handle(**vimcore.ops.fvcore_handles())
    counts.unsupported_ops_warnings(False)
    assert counts.total() == 2 * model.flops()
    assert counts.by_module()["layers.0"] == counts.by_module()["layers.1"] > 0


def test_torchinfo() -> None:
    """Every module with its shape. It counts a linear map once an image, whatever the tokens."""
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    found = torchinfo.summary(model, input_data=images, verbose=0, depth=5)
    assert found.total_params == sum(p.numel() for p in model.parameters())
    shapes = {info.var_name: info.output_size for info in found.summary_list}
    assert shapes["in_proj"] == [2, 7, 64]
    assert shapes["head"] == [2, 3]
    assert found.total_mult_adds > 0
