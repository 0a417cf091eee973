# SPDX-License-Identifier: Apache-2.0
"""`vimcore.ops` on CUDA without a GPU (shim.py), and the extension beneath."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, small
from shim import GRADIENTS, TOLERANCE, array, autocast, ops, tensors, vimcore_shim
from torch import Tensor


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


@pytest.mark.slow
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
    autocast(monkeypatch, torch.bfloat16)
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


class Producer:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, tensor: Tensor, device: int = 0) -> None:
        self.tensor, self.device = tensor, device

    def __dlpack__(self, stream: int | None = None) -> Any:
        return array(self.tensor, self.device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device


def norm(x: Any, weight: Any, out: Any) -> None:
    vimcore_shim._core.norm_forward("rms", 1e-5, x, None, weight, None, None, out, vimcore_shim._core.Place())


def test_other_producers_of_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, out = torch.randn(2, 3, 8), torch.randn(8), torch.empty(2, 3, 8)
    norm(Producer(x), Producer(weight), Producer(out))
    assert relative(out, vimcore.ops.rms_norm(x, weight)) < 1e-6
    producer, taken = Producer(x), []
    monkeypatch.setattr(torch, "from_dlpack", taken.append)
    tensors.from_device(producer)
    assert taken == [producer]
    assert tensors.from_device(x) is x
    host = x.numpy()
    assert tensors.from_device(host) is host  # the type of images is still checked
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
    core = vimcore_shim._core
    config = core.Config(**SMALL.arguments())
    network, names = core.BoundNetwork(config), list(config.param_shapes())
    weights = dict(build(SMALL).named_parameters())
    with pytest.raises(ValueError, match=r"norm_f.weight: expected \(16,\) f32 cuda:0, got \(16,\) f32 cpu"):
        network.bind([weights[n].detach() if n == "norm_f.weight" else array(weights[n]) for n in names])
    bound = network.bind([array(weights[n]) for n in names])
    images, logits = images_for(SMALL, 2, torch.float32), torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"images: expected a tensor on cuda:0, got \(2, 3, 8, 12\) f32 cpu"):
        network.forward(bound, images, core.Outputs(logits), core.Draws(), core.Place())
    with pytest.raises(ValueError, match=r"logits: expected \(2, 3\) f32 cuda:0, got \(2, 3\) f32 cpu"):
        network.forward(bound, array(images), core.Outputs(logits), core.Draws(), core.Place())
