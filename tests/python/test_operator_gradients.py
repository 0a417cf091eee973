# SPDX-License-Identifier: Apache-2.0
"""Gradients of the operators: finite differences, and the reference in float64."""

from __future__ import annotations

import pytest
import reference
import torch
import vimcore
from golden import relative
from helpers import assert_close, rand
from torch import Tensor
from torch.autograd import gradcheck


def scan_inputs(batch: int, length: int, inner: int, state: int, kind: str) -> dict[str, Tensor]:
    """Arguments of selective_scan; `kind` tells which of the optional ones are there."""
    found = {
        "u": rand(batch, length, inner),
        "delta": (torch.rand(batch, length, inner, dtype=torch.float64) + 0.1).requires_grad_(),
        "A": (-torch.rand(inner, state, dtype=torch.float64) - 0.1).requires_grad_(),
        "B": rand(batch, length, state),
        "C": rand(batch, length, state),
    }
    if "D" in kind:
        found["D"] = rand(inner)
    if "z" in kind:
        found["z"] = rand(batch, length, inner)
    if "b" in kind:
        found["delta_bias"] = rand(inner)
    return found


def as_reference(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {{"B": "Bm", "C": "Cm"}.get(k, k): v for k, v in inputs.items()}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["", "D", "z", "b", "Dzb"])
def test_gradcheck_selective_scan(kind: str, reverse: bool) -> None:
    inputs = scan_inputs(2, 5, 3, 4, kind)
    softplus = "b" in kind

    def call(*values: Tensor) -> Tensor:
        given_ = dict(zip(inputs, values, strict=True))
        return vimcore.ops.selective_scan(**given_, delta_softplus=softplus, reverse=reverse)

    assert gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_gradcheck_causal_conv1d(width: int, activation: str | None, reverse: bool) -> None:
    for bias in (rand(3), None):
        inputs = (rand(2, 6, 3), rand(3, width)) + (() if bias is None else (bias,))

        def call(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return vimcore.ops.causal_conv1d(x, w, b, activation=activation, reverse=reverse)

        assert gradcheck(call, inputs)


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck_norms(residual: bool) -> None:
    x, r, w, b = rand(2, 3, 5), rand(2, 3, 5), rand(5), rand(5)
    if residual:
        assert gradcheck(lambda x, r, w: vimcore.ops.rms_norm(x, w, residual=r), (x, r, w))
        assert gradcheck(lambda x, r, w, b: vimcore.ops.layer_norm(x, w, b, residual=r), (x, r, w, b))
    else:
        assert gradcheck(lambda x, w: vimcore.ops.rms_norm(x, w), (x, w))
        assert gradcheck(lambda x, w, b: vimcore.ops.layer_norm(x, w, b), (x, w, b))


def test_norms_agree_with_torch() -> None:
    x, r, w, b = (
        rand(2, 3, 5, grad=False),
        rand(2, 3, 5, grad=False),
        rand(5, grad=False),
        rand(5, grad=False),
    )
    functional = torch.nn.functional
    assert relative(vimcore.ops.rms_norm(x, w), functional.rms_norm(x, (5,), w, 1e-5)) < 1e-14
    assert relative(vimcore.ops.layer_norm(x, w, b), functional.layer_norm(x, (5,), w, b, 1e-5)) < 1e-14
    out, total = vimcore.ops.rms_norm(x, w, residual=r)
    assert relative(out, functional.rms_norm(x + r, (5,), w, 1e-5)) < 1e-14
    assert torch.equal(total, x + r)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [1, 3, 8, 16, 17])
@pytest.mark.parametrize("length", [1, 16, 17, 65, 200])
def test_selective_scan_against_reference(length: int, state: int, reverse: bool) -> None:
    inputs = scan_inputs(2, length, 6, state, "Dzb")
    out = vimcore.ops.selective_scan(**inputs, delta_softplus=True, reverse=reverse)
    truth = reference.scan(**as_reference(inputs), delta_softplus=True, reverse=reverse)
    assert relative(out, truth) < 1e-12
    probe = torch.randn_like(truth)
    found = torch.autograd.grad((out * probe).sum(), list(inputs.values()))
    wanted = torch.autograd.grad((truth * probe).sum(), list(inputs.values()))
    assert_close(dict(zip(inputs, found, strict=True)), dict(zip(inputs, wanted, strict=True)), 1e-10)

    single = {k: v.detach().float().requires_grad_() for k, v in inputs.items()}
    out = vimcore.ops.selective_scan(**single, delta_softplus=True, reverse=reverse)
    assert relative(out, truth) < 1e-5
    found = torch.autograd.grad((out * probe.float()).sum(), list(single.values()))
    assert_close(dict(zip(inputs, found, strict=True)), dict(zip(inputs, wanted, strict=True)), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("average", [False, True])
def test_bidirectional_scan(average: bool) -> None:
    inner, state, rank, length = 5, 3, 2, 6

    def arguments(length: int) -> list[Tensor]:
        z, found = rand(2, length, inner), []
        for _ in range(2):
            found += [
                rand(2, length, inner),
                rand(2, length, rank + 2 * state),
                rand(inner, state),
                rand(inner),
            ]
            found += [rand(inner, rank), rand(inner)]
        return [z, *found]

    def call(z: Tensor, *rest: Tensor) -> Tensor:
        pairs = [(rest[i], rest[i + 6]) for i in range(6)]
        return vimcore.ops.bidirectional_scan(z, *pairs, average=average)

    def truth(z: Tensor, *rest: Tensor) -> Tensor:
        total = 0
        for i in (0, 6):
            u, q, A_log, D, weight, bias = rest[i : i + 6]
            dt, b, c = q.split([rank, state, state], -1)
            total = total + reference.scan(
                u, dt @ weight.T, -A_log.exp(), b, c, D, z, bias, True, reverse=i > 0
            )
        return total / 2 if average else total

    assert gradcheck(call, tuple(arguments(length)))
    for length in (1, 17, 64, 65, 150):
        values = arguments(length)
        assert relative(call(*values), truth(*values)) < 1e-12
