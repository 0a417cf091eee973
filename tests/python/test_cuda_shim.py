# SPDX-License-Identifier: Apache-2.0
"""The Python package on CUDA without a GPU: `vimcore_shim`, whose devices are the runtime of tests/shim.

The package is made by CMake (tests/python/CMakeLists.txt). There are no CUDA tensors in a torch without CUDA:
CPU tensors pass for tensors on the first device, their memory is handed over under its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import numpy as np
import pytest
import torch
import vimcore
import vimcore.doctor_gradients
from golden import relative
from helpers import SMALL, build, images_for, small
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

BUILD = Path(__file__).resolve().parents[2] / "build" / "release" / "python"
os.environ.setdefault("VIMCORE_SHIM_FOREIGN", "1")  # torch's memory is device memory, too
sys.path.insert(0, os.environ.get("VIMCORE_SHIM_PACKAGE", str(BUILD)))
import vimcore_shim  # noqa: E402
from vimcore_shim import bench, bench_cuda, cli, doctor, doctor_gradients, functions, nn, ops, place  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def on_device(capsule: Any, device: int = 0, kind: int = 2) -> Any:
    """The DLPack capsule of host memory, for a CUDA device: there, the shim's memory is the host's.

    Args:
        kind: DLPack's number of the device type, 1 for the CPU.
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    where = ctypes.cast(get(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32))  # behind the address
    where[0], where[1] = kind, device
    return capsule


def on_host(capsule: Any) -> Tensor:
    """The way back."""
    return from_dlpack(on_device(capsule, kind=1))


def array(tensor: Tensor, device: int = 0) -> Any:
    return on_device(to_dlpack(tensor.detach()), device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Tensors pass for tensors on cuda:0; what the next calls find as stream and capturing."""
    state = {"stream": 0, "capturing": False}
    changes: dict[str, Callable[..., Any]] = {
        "on_cuda": lambda t: True,
        "place": lambda t: (0, state["stream"], state["capturing"]),
        "to_dlpack": lambda t: on_device(to_dlpack(t)),
        "from_dlpack": on_host,  # what the extension saved
    }
    for module in (place, functions, nn, ops):
        for name, change in changes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, change)
    with torch.no_grad():
        yield state


@pytest.fixture
def training(gpu: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same with gradients."""
    with torch.enable_grad():
        yield gpu


def twin(model: vimcore.VisionMamba) -> Any:
    """The same network in the shim's package."""
    other = vimcore_shim.VisionMamba(**model.config)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@pytest.fixture
def file(tmp_path: Path) -> str:
    build(SMALL).save(tmp_path / "small.safetensors", labels=["a", "b", "c"])
    return str(tmp_path / "small.safetensors")


# ---- Runtime -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.NAMES)
def test_runtime_golden(name: str, tmp_path: Path) -> None:
    g = golden.load(name)
    build(g.config, g.weights).save(tmp_path / "model.safetensors")
    runtime = vimcore_shim.Runtime(tmp_path / "model.safetensors", device="cuda")
    for _ in range(3):  # directly, recorded, replayed
        assert relative(torch.from_numpy(runtime(g.input.numpy())), g.logits) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_runtime_types_and_devices(dtype: torch.dtype, file: str) -> None:
    images = images_for(SMALL, 3, torch.float32).numpy()
    wanted = vimcore.Runtime(file)
    runtime = vimcore_shim.Runtime(file, device="cuda:1", dtype=str(dtype).removeprefix("torch."))
    for batch in (3, 1, 3, 0):
        logits, tokens = runtime(images[:batch]), runtime.features(images[:batch])
        assert logits.dtype == tokens.dtype == np.float32
        pairs = ((logits, wanted(images[:batch])), (tokens, wanted.features(images[:batch])))
        for found, truth in pairs:
            assert found.shape == truth.shape
            assert relative(torch.from_numpy(found), torch.from_numpy(truth)) < TOLERANCE[dtype]
    assert np.array_equal(runtime(images)[:1], runtime(images[:1]))
    exact = np.array_equal(runtime(images), vimcore_shim.Runtime(file, device="cuda:1")(images))
    assert exact == (dtype == torch.float32)  # the type asked for is the one that is used


def test_runtime_from_several_threads(file: str) -> None:
    images = images_for(SMALL, 2, torch.float32).numpy()
    runtime = vimcore_shim.Runtime(file, device="cuda")
    wanted, found = runtime(images), []

    def call() -> None:
        found.extend(runtime(images) for _ in range(4))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(np.array_equal(wanted, logits) for logits in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:7"}, vimcore_shim.Error, "cuda:7|7"),
        ({"device": "gpu"}, ValueError, "'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ({"device": "cuda", "dtype": "float64"}, ValueError, 'dtype: expected "float32", "bfloat16"'),
        ({"device": "cpu", "dtype": "bfloat16"}, ValueError, "expected 'float32' on the cpu"),
    ],
)
def test_runtime_errors(file: str, options: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vimcore_shim.Runtime(file, **options)


def test_a_device_that_is_not_there(file: str) -> None:
    """The installed package: no CUDA in the build, or no GPU in the machine; the remedy is named."""
    assert vimcore_shim.cuda_is_available()
    assert "CPU shim" in vimcore_shim.build_info()["cuda"][0]
    if vimcore.cuda_is_available():
        assert vimcore.Runtime(file, device="cuda").config["num_classes"] == 3
        return
    remedy = "VIMCORE_CUDA=ON" if vimcore.build_info()["cuda"] is False else "GPU|driver"
    with pytest.raises(vimcore.Error, match=remedy):
        vimcore.Runtime(file, device="cuda")


# ---- VisionMamba -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v2_middle", "v2_double", "none_pairs_middle", "v2_rope_residual_head", "v2_max"]
)
def test_module_golden(name: str, gpu: dict[str, Any]) -> None:
    g = golden.load(name)
    cpu = build(g.config, g.weights).eval()
    model, images = twin(cpu), g.input
    assert relative(model(images), g.logits) < 1e-5
    tokens = model.forward_features(images)
    assert relative(tokens, cpu.forward_features(images)) < 1e-5
    assert relative(model.forward_head(tokens), g.logits) < 1e-5
    for found, wanted in zip(model.forward_intermediates(images), cpu.forward_intermediates(images)):
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_types_of_activations(
    dtype: torch.dtype, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a 16-bit type, and autocast, compute in that type beside float32 parameters."""
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    direct = model(images.to(dtype))
    assert direct.dtype == dtype
    assert relative(direct, cpu(images)) < TOLERANCE[dtype]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: {"cuda": dtype}[device])
    assert torch.equal(model(images), direct)
    tokens, layer = model.forward_features(images), model.forward_intermediates(images, [1])[0]
    assert tokens.dtype == layer.dtype == dtype
    assert relative(tokens, cpu.forward_features(images)) < TOLERANCE[dtype]


def test_training_draws_without_gradients(gpu: dict[str, Any]) -> None:
    cpu = build(small(drop_rate=0.2, drop_path_rate=0.5, directions="sequence", class_token="random")).train()
    model, images = twin(cpu), images_for(SMALL, 4, torch.float32)
    torch.manual_seed(3)
    wanted = cpu(images)
    torch.manual_seed(3)
    assert relative(model(images), wanted) < 1e-5
    assert relative(model(images.bfloat16()), wanted) < 2  # other draws; the factors stay float32


def test_weights_that_change(gpu: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    before = model(images.bfloat16())  # weights are cast, and the casts kept
    for net in (cpu, model):
        net.layers[0].mixer.in_proj.weight.mul_(1.5)
        net.head.weight.add_(0.25)
    after = model(images.bfloat16())
    assert relative(after, before) > 0.05
    assert relative(after, cpu(images)) < TOLERANCE[torch.bfloat16]


def test_wrong_types_and_devices(gpu: dict[str, Any]) -> None:
    model, images = twin(build(SMALL)), images_for(SMALL, 2, torch.float32)
    with pytest.raises(
        ValueError, match=re.escape("images: expected (B, 3, 8, 12) f32, bf16 or f16 cpu, got (2,")
    ):
        model(images.double())
    with pytest.raises(ValueError, match=r"images: expected .* got .* f32 meta"):
        model(images.to("meta"))
    model.head.bias = torch.nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match=re.escape("head.bias: expected a tensor on cpu, got (3,) f32 meta")):
        model(images)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float64, "f64")):
        with pytest.raises(ValueError, match=f"parameters: expected .*f32 on cuda, got .* {name}.*autocast"):
            twin(build(SMALL)).to(dtype)(images.to(dtype))


def test_streams_and_captures(gpu: dict[str, Any]) -> None:
    """A captured call keeps its scratch memory; the first use of a weight cannot be captured."""
    model, images = twin(build(SMALL).eval()), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    for gpu["capturing"] in (True, True, False):
        assert torch.equal(model(images), wanted)
    vimcore_shim._core.release_memory()
    assert torch.equal(model(images), wanted)


def test_batch_of_nothing(gpu: dict[str, Any]) -> None:
    assert twin(build(SMALL)).eval()(torch.zeros(0, 3, 8, 12)).shape == (0, 3)


# ---- training ----------------------------------------------------------------------------------------------

# Gradients: every activation and its gradient are rounded.
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 0.12, torch.float16: 2e-2}


def autocast(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    """As under torch.autocast("cuda", dtype), which a torch without CUDA refuses; None: as outside of it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda" and dtype is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: {"cuda": dtype}[device])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(found: Any, wanted: Any, tolerance: float) -> None:
    """Gradients of two networks; those that are nearly nothing are measured against the largest."""
    assert found.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, g in wanted.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - g).norm()) < tolerance * max(float(g.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("memory", ["least", "fast"])
def test_activations_that_left_and_came_back(memory: str, training: dict[str, Any]) -> None:
    model = twin(build(small(depth=2), dtype=torch.float32, memory=memory))
    images, found = images_for(SMALL, 3, torch.float32), []
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach().clone())
        return kept[-1]

    for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)):
        with hooks:
            loss = model(images).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert any(t.dtype == torch.uint8 and t.numel() > 1000 for t in kept)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize(
    "name", ["v2_middle", "v2_double", "none_pairs_middle", "v2_rope_residual_head", "v2_layer_scale"]
)
def test_gradients_golden(name: str, memory: str, training: dict[str, Any]) -> None:
    g = golden.load(name)
    model = twin(build(g.config, g.weights))
    model.memory = memory
    images = g.input.clone().requires_grad_()
    model(images).backward(g.probe)
    assert relative(images.grad, g.grads["input"]) < 1e-4
    for key, p in model.named_parameters():
        assert relative(p.grad, g.grads[key]) < 1e-4, key


@pytest.mark.parametrize("dtype", list(GRADIENTS))
def test_autocast_and_accumulation(
    dtype: torch.dtype, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches under autocast, float16 with a scaler, against the CPU in float64."""
    cpu, model = build(SMALL).eval().double(), twin(build(SMALL).eval())
    images, labels = images_for(SMALL, 4, torch.float32).requires_grad_(), torch.tensor([0, 1, 2, 1])
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wanted = images.detach().double().requires_grad_()
    for part in (slice(0, 2), slice(2, 4)):
        torch.nn.functional.cross_entropy(cpu(wanted[part]), labels[part]).backward()
        autocast(monkeypatch, dtype if dtype != torch.float32 else None)
        logits = model(images[part])
        autocast(monkeypatch, None)
        assert logits.dtype == dtype
        scaler.scale(torch.nn.functional.cross_entropy(logits.float(), labels[part])).backward()
    scaler.unscale_(optimizer)
    assert images.grad is not None
    assert images.grad.dtype == torch.float32
    agree(gradients(model), gradients(cpu), GRADIENTS[dtype])
    assert relative(images.grad / scaler.get_scale(), wanted.grad) < GRADIENTS[dtype]


def test_overflow_reaches_the_scaler(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(build(SMALL))
    autocast(monkeypatch, torch.float16)
    logits = model(images_for(SMALL, 2, torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(logits.float().square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_runs_and_two_passes_before_backward(training: dict[str, Any]) -> None:
    """The same bits; what one forward saved is not written by the next."""
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 4, torch.float32)
    runs = []
    for _ in range(2):
        model.zero_grad()
        first, second = model(images[:2]), model(images[2:].bfloat16())
        (first.square().sum() + second.float().sum()).backward()
        runs.append(gradients(model))
    assert all(torch.equal(g, runs[1][name]) for name, g in runs[0].items())
    model.zero_grad()
    model(images[:2]).square().sum().backward()
    model(images[2:].bfloat16()).float().sum().backward()
    agree(gradients(model), runs[0], 1e-6)


def test_frozen_parameters_and_other_outputs(training: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    for net in (cpu, model):
        net.layers[0].requires_grad_(False)
        net.pos_embed.requires_grad_(False)
        tokens, maps = net.forward_features(images), net.forward_intermediates(images, [0, 1])
        (tokens.square().sum() + maps[0].sum() + maps[1].square().sum()).backward()
    agree(gradients(model), gradients(cpu), 1e-4)
    assert model.pos_embed.grad is None


def test_training_follows_the_cpu(training: dict[str, Any]) -> None:
    """Steps of AdamW with dropout and drop path: the loss falls as it does on the CPU, also in 16 bits."""
    configuration = small(drop_rate=0.1, drop_path_rate=0.2)
    images, labels = images_for(SMALL, 6, torch.float32), torch.tensor([0, 1, 2, 0, 1, 2])

    def curve(model: Any, dtype: torch.dtype) -> Tensor:
        model.train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    wanted = curve(build(configuration), torch.float32)
    assert wanted[-1] < 0.7 * wanted[0]
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        assert float((curve(twin(build(configuration)), dtype) - wanted).abs().max()) < most


def test_a_captured_step_keeps_its_memory(training: dict[str, Any]) -> None:
    model, images = twin(build(SMALL)).eval(), images_for(SMALL, 2, torch.float32)
    wanted = []
    for training["capturing"] in (False, True, False, True, False):
        model.zero_grad()
        model(images).square().sum().backward()
        wanted.append(gradients(model))
    assert all(torch.equal(g[name], wanted[0][name]) for g in wanted for name in g)
    vimcore_shim._core.release_memory()


def test_saliency_and_second_derivatives(training: dict[str, Any]) -> None:
    cpu = build(SMALL).eval()
    model, images = twin(cpu), images_for(SMALL, 2, torch.float32)
    wanted = vimcore.saliency(cpu, images, steps=2)
    assert relative(vimcore_shim.saliency(model, images, steps=2), wanted) < 1e-4
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


# ---- operators ---------------------------------------------------------------------------------------------


def scan_arguments() -> dict[str, Tensor]:
    B, L, E, N = 2, 37, 24, 16
    return {
        "u": torch.randn(B, L, E),
        "delta": torch.randn(B, L, E),
        "A": -torch.rand(E, N) - 0.1,
        "B": torch.randn(B, L, N),
        "C": torch.randn(B, L, N),
        "D": torch.randn(E),
        "z": torch.randn(B, L, E),
        "delta_bias": torch.randn(E),
    }


def pair_arguments() -> dict[str, Any]:
    B, L, E, N, R = 2, 21, 32, 16, 3
    shapes = {
        "u": (B, L, E),
        "q": (B, L, R + 2 * N),
        "A_log": (E, N),
        "D": (E,),
        "dt_weight": (E, R),
        "dt_bias": (E,),
    }
    return {
        "z": torch.randn(B, L, E),
        **{k: [torch.randn(s) * 0.5 for _ in range(2)] for k, s in shapes.items()},
    }


def block_arguments() -> dict[str, Any]:
    parameters = dict(build(small(embed_dim=32, d_state=16)).layers[0].named_parameters())
    return {
        "x": torch.randn(2, 19, 32),
        "parameters": {k: v.detach() for k, v in parameters.items()},
        "residual": torch.randn(2, 19, 32),
    }


OPERATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "selective_scan": lambda: {**scan_arguments(), "delta_softplus": True, "reverse": True},
    "causal_conv1d": lambda: {
        "x": torch.randn(2, 9, 24),
        "weight": torch.randn(24, 4),
        "bias": torch.randn(24),
    },
    "rms_norm": lambda: {
        "x": torch.randn(3, 5, 40),
        "weight": torch.randn(40),
        "residual": torch.randn(3, 5, 40),
    },
    "layer_norm": lambda: {"x": torch.randn(7, 40), "weight": torch.randn(40), "bias": torch.randn(40)},
    "bidirectional_scan": pair_arguments,
    "vim_block": block_arguments,
}


def narrowed(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The activations in `dtype`."""
    out = dict(arguments)
    for name in ("x", "u", "delta", "B", "C", "q", "z"):
        if name in out:
            value = out[name]
            out[name] = [t.to(dtype) for t in value] if isinstance(value, list) else value.to(dtype)
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators(name: str, dtype: torch.dtype, gpu: dict[str, Any]) -> None:
    arguments = OPERATORS[name]()
    wanted = getattr(vimcore.ops, name)(**arguments)
    found = getattr(ops, name)(**narrowed(arguments, dtype))
    if isinstance(wanted, Tensor):
        wanted, found = (wanted,), (found,)
    assert found[0].dtype == dtype
    assert all(t.dtype == torch.float32 for t in found[1:])  # the residual stream
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < TOLERANCE[dtype]


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments, by name, made to want gradients."""
    found: dict[str, Tensor] = {}
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            found[key] = value.requires_grad_()
        elif isinstance(value, list):
            found.update({f"{key}{i}": t.requires_grad_() for i, t in enumerate(value)})
        elif isinstance(value, dict):
            found.update({k: t.requires_grad_() for k, t in value.items()})
    return found


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, list):
            return [copy(v) for v in value]
        return {k: copy(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {key: copy(value) for key, value in arguments.items()}


@pytest.mark.parametrize("dtype", list(GRADIENTS))
@pytest.mark.parametrize("name", list(OPERATORS))
def test_gradients_of_operators(name: str, dtype: torch.dtype, training: dict[str, Any]) -> None:
    arguments = copied(OPERATORS[name]())
    wanted_of = leaves(copied(arguments))
    results = []
    for package, call, own in (
        (vimcore.ops, arguments, torch.float32),
        (ops, narrowed(arguments, dtype), dtype),
    ):
        call = copied(call)
        inputs = leaves(call)
        out = getattr(package, name)(**call)
        out = (out,) if isinstance(out, Tensor) else out
        torch.manual_seed(1)
        probes = [torch.randn(t.shape) for t in out]
        results.append(
            torch.autograd.grad(out, list(inputs.values()), [p.to(t.dtype) for p, t in zip(probes, out)])
        )
        assert all(g.dtype == t.dtype for g, t in zip(results[-1], inputs.values()))
        assert own == out[0].dtype
    assert wanted_of.keys() == inputs.keys()
    for key, found, wanted in zip(wanted_of, results[1], results[0], strict=True):
        assert relative(found, wanted) < GRADIENTS[dtype], key


def test_operators_under_autocast(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = scan_arguments()
    wanted = ops.selective_scan(**narrowed(arguments, torch.bfloat16))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: {"cuda": torch.bfloat16}[device])
    assert torch.equal(ops.selective_scan(**arguments), wanted)


def test_operator_errors(gpu: dict[str, Any]) -> None:
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=re.escape("[rms_norm] x: expected a f32 or bf16 or f16 tensor")):
        ops.rms_norm(x.double(), weight.double())
    with pytest.raises(
        ValueError, match=re.escape("[rms_norm] weight: expected a f32 tensor on cpu, got (8,) bf16")
    ):
        ops.rms_norm(x.bfloat16(), weight.bfloat16())
    with pytest.raises(
        ValueError, match=re.escape("[rms_norm] weight: expected a f32 tensor on the cpu or cuda, got")
    ):
        ops.rms_norm(x, weight.to("meta"))


# ---- the extension -----------------------------------------------------------------------------------------


class Producer:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, tensor: Tensor, device: int = 0) -> None:
        self.tensor, self.device = tensor, device

    def __dlpack__(self, stream: int | None = None) -> Any:
        return array(self.tensor, self.device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device


def norm(x: Any, weight: Any, out: Any) -> None:
    vimcore_shim._core.norm_forward("rms", 1e-5, x, None, weight, None, None, out)


def test_other_producers_of_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, out = torch.randn(2, 3, 8), torch.randn(8), torch.empty(2, 3, 8)
    norm(Producer(x), Producer(weight), Producer(out))
    assert relative(out, vimcore.ops.rms_norm(x, weight)) < 1e-6
    producer, taken = Producer(x), []
    monkeypatch.setattr(torch, "from_dlpack", taken.append)
    place.from_device(producer)
    assert taken == [producer]
    assert place.from_device(x) is x
    host = x.numpy()
    assert place.from_device(host) is host  # the type of images is still checked
    assert taken == [producer]


def test_mixed_devices_in_one_call() -> None:
    x, weight, out = torch.randn(2, 3, 8), torch.randn(8), torch.empty(2, 3, 8)
    with pytest.raises(ValueError, match=re.escape("weight: expected (8,) f32 cuda:0, got (8,) f32 cpu")):
        norm(array(x), weight, array(out))
    with pytest.raises(ValueError, match=re.escape("weight: expected (8,) f32 cuda:0, got (8,) f32 cuda:1")):
        norm(array(x), array(weight, 1), array(out))
    with pytest.raises(
        ValueError, match=re.escape("h: expected (2, 3, 8) f32 cpu, got (2, 3, 8) f32 cuda:0")
    ):
        norm(array(x), weight, out)
    with pytest.raises(ValueError, match="expected a contiguous array"):
        norm(array(x.transpose(1, 2)), array(weight), array(out))
    with pytest.raises(ValueError, match=r"expected a cpu array, got .* cuda:0"):
        vimcore_shim._core.write_safetensors("unused", {"x": Producer(x)})


def test_parameters_on_two_devices() -> None:
    config_json = json.dumps(SMALL.arguments())
    network = vimcore_shim._core.Network(config_json)
    names = [name for name, _ in vimcore_shim._core.param_shapes(config_json)]
    weights = dict(build(SMALL).named_parameters())
    with pytest.raises(ValueError, match=r"norm_f.weight: expected \(16,\) f32 cuda:0, got \(16,\) f32 cpu"):
        network.bind([weights[n].detach() if n == "norm_f.weight" else array(weights[n]) for n in names])
    bound = network.bind([array(weights[n]) for n in names])
    images, logits = images_for(SMALL, 2, torch.float32), torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"images: expected a tensor on cuda:0, got \(2, 3, 8, 12\) f32 cpu"):
        network.forward(bound, images, logits=logits)
    with pytest.raises(ValueError, match=r"logits: expected \(2, 3\) f32 cuda:0, got \(2, 3\) f32 cpu"):
        network.forward(bound, array(images), logits=logits)


# ---- commands ----------------------------------------------------------------------------------------------


def test_doctor_compares_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = {**SMALL.arguments(), "depth": 12}
    monkeypatch.setattr(doctor, "GPU_TESTS", [doctor.SELF_TEST, deep])
    rows = doctor._check_gpu(np.random.default_rng(0))
    assert [(row["check"], row["status"]) for row in rows] == [
        ("cuda:0 float32", "ok"),
        ("cuda:0 bfloat16", "ok"),
        ("cuda:0 float16", "ok"),
    ]
    assert all("CPU shim" in row["detail"] for row in rows)
    monkeypatch.setattr(doctor, "GPU_TOLERANCE", {"bfloat16": 1e-5})
    assert [row["status"] for row in doctor._check_gpu(np.random.default_rng(0))] == ["failed"]


def test_doctor_compares_the_gradients(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> dict[str, dict[str, Any]]:
        rng = np.random.default_rng(0)
        found = doctor_gradients.check_cuda(
            [doctor.SELF_TEST, {**SMALL.arguments(), "depth": 3}],
            doctor._random_weights,
            rng,
            "cpu",  # where tensors pass for tensors on the device
            vimcore.doctor_gradients.Loss,
        )
        return {row["check"]: row for row in found}

    found = rows()
    assert [(name, row["status"]) for name, row in found.items()] == [
        ("gradients cpu float32", "ok"),
        ("gradients cpu bfloat16", "ok"),
        ("gradients cpu float16", "ok"),
    ]
    assert found["gradients cpu float32"]["error"] > 1e-8
    assert found["gradients cpu bfloat16"]["error"] > 1e-4  # 16-bit kernels ran
    monkeypatch.setattr(doctor_gradients, "GPU_TOLERANCE", {"bfloat16": 1e-5})
    (row,) = rows().values()
    assert row["status"] == "failed"
    assert re.search(r"^\S+ of network [01]: error .* against the CPU is above", row["detail"])


def test_predict_on_the_device(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vimcore.data import encode_png

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    lines = []
    for options in ([], ["--device", "cuda"], ["--device", "cuda:1", "--dtype", "bfloat16"]):
        command = ["predict", "--weights", file, "--json", "--logits", *options, str(tmp_path / "a.png")]
        assert cli.main(command) == 0
        lines.append(np.array(json.loads(capsys.readouterr().out)["logits"]))
    assert np.linalg.norm(lines[1] - lines[0]) < 1e-5 * np.linalg.norm(lines[0])
    assert 1e-5 < np.linalg.norm(lines[2] - lines[0]) / np.linalg.norm(lines[0]) < 3e-2


@pytest.mark.parametrize("train", [False, True])
def test_bench_rows(train: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The arithmetic of the report, with a clock that ticks 2 ms for ours and 8 ms for the peer."""
    ticks = iter([0.002, 0.008] * 100)
    monkeypatch.setattr(bench_cuda, "event_seconds", lambda call, count: next(ticks))
    monkeypatch.setattr(bench_cuda, "calls_for", lambda call, seconds: 1)
    monkeypatch.setattr(bench_cuda, "latency", lambda call: 0.003)
    monkeypatch.setattr(bench_cuda, "graphed", lambda call: call)
    args = SimpleNamespace(
        model="vim_tiny", device="cpu", dtype="bfloat16", json=None, pairs=3, seconds=60.0, sample=0.1,
        peers=["torch", "openvino"], train=train, memory="lean",
    )  # fmt: skip
    skipped: dict[str, str] = {}
    peers = Path(__file__).resolve().parents[1] / "bench"
    rows = bench_cuda.case(args, 32, 4, peers, skipped)
    assert skipped == {"openvino": "runs on the CPU"}
    assert [row["graph"] for row in rows] == [False, True]
    for row in rows:
        assert (row["peer"], row["pairs"], row["size"], row["batch"]) == ("torch", 3, 32, 4)
        assert row["mode"] == ("train" if train else "forward")
        assert row["images_per_s"] == pytest.approx(2000)
        assert row["peer_images_per_s"] == pytest.approx(500)
        assert row["ratio"] == pytest.approx(0.25)
        assert row["latency_ms"] == pytest.approx(3)
    assert capsys.readouterr().out.count("torch") == 2


def test_bench_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    parse = bench_arguments()
    assert bench.main(parse("--dtype", "bfloat16")) == 1
    assert "the CPU computes in float32" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main(parse("--device", "cuda")) == 1
        assert "sees no CUDA device" in capsys.readouterr().err


def bench_arguments() -> Callable[..., Any]:
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return lambda *options: parser.parse_args(options)
