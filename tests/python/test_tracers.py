# SPDX-License-Identifier: Apache-2.0
"""What torch wraps around tensors, or records of them, that cannot be followed: refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from helpers import SMALL, build, images_for
from torch import Tensor, nn
from torch.autograd import forward_ad

Model = vimcore.VisionMamba


TRACERS: dict[str, Callable[[Model, Tensor], Any]] = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "onnx, legacy": lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
    "jit.script": lambda model, x: torch.jit.script(model),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_tracers_are_refused(trace: Callable[[Model, Tensor], Any], grad: bool) -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match=r"vimcore|VisionMamba"):
        trace(model, images)
    assert torch.equal(model(images), wanted)  # and left as it was


TRANSFORMS: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    "jvp": (lambda model, x: torch.func.jvp(model, (x,), (x,)), r"torch\.func\.jvp: forward-mode"),
    "hessian": (lambda model, x: torch.func.hessian(lambda t: model(t).sum())(x), "forward-mode"),
    "jvp of an operator": (
        lambda model, x: torch.func.jvp(lambda t: vimcore.ops.rms_norm(t, torch.ones(12)), (x,), (x,)),
        "forward-mode",
    ),
    "vmap over weights": (
        lambda model, x: torch.vmap(lambda w: torch.func.functional_call(model, w, (x,)))(
            {k: torch.stack([p, p]) for k, p in model.state_dict().items()}
        ),
        r"cls_token: expected the same in all of torch\.vmap.*loop over the networks",
    ),
    "vmap over weights of an operator": (
        lambda model, x: torch.vmap(lambda w: vimcore.ops.rms_norm(x, w))(torch.ones(2, 12)),
        r"\[norm\] weight: expected the same in all of torch\.vmap",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("transform", "message"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_are_refused(transform: Callable[[Model, Tensor], Any], message: str) -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with pytest.raises(TypeError, match=message):
        transform(model, images)
    assert torch.equal(model(images), wanted)


def dual(x: Tensor) -> Tensor:
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(grad: bool) -> None:
    """Also where nothing requires a gradient: the tangents would be lost."""
    model, images = build(SMALL).eval().requires_grad_(grad), images_for(SMALL, 2, torch.float32)
    head = {"head.weight": model.head.weight.detach()}
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        model(images)
        with pytest.raises(TypeError, match=r"images: .* a dual tensor of forward-mode"):
            model(dual(images))
        with pytest.raises(TypeError, match=r"head\.weight: .* a dual tensor of forward-mode"):
            torch.func.functional_call(model, {k: dual(v) for k, v in head.items()}, (images,))
        with pytest.raises(TypeError, match=r"\[rms_norm\] x: .* a dual tensor of forward-mode"):
            vimcore.ops.rms_norm(dual(images), torch.ones(12))


@pytest.mark.parametrize("second", [torch.autograd.functional.hessian, torch.autograd.functional.hvp])
def test_second_derivatives_are_no_zeros(second: Callable[..., Any]) -> None:
    """Also of a sum, whose incoming gradient is a constant."""
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    arguments = () if second is torch.autograd.functional.hessian else (images,)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        second(lambda x: model(x).sum(), images, *arguments)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.functional.jvp(model, images, images)  # takes them of a gradient


Tensors = list[Tensor]
OPERATORS: dict[str, tuple[list[tuple[int, ...]], Callable[[Tensors], Tensor]]] = {
    "rms_norm": ([(1, 3, 4), (4,)], lambda t: vimcore.ops.rms_norm(*t)),
    "layer_norm": ([(1, 3, 4), (4,), (4,), (1, 3, 4)], lambda t: vimcore.ops.layer_norm(*t)[0]),
    "causal_conv1d": ([(1, 3, 4), (4, 2), (4,)], lambda t: vimcore.ops.causal_conv1d(*t)),
    "selective_scan": (
        [(1, 3, 4), (1, 3, 4), (4, 2), (1, 3, 2), (1, 3, 2)],
        lambda t: vimcore.ops.selective_scan(*t),
    ),
    "bidirectional_scan": (
        [(1, 3, 4), *[s for s in [(1, 3, 4), (1, 3, 5), (4, 2), (4,), (4, 1), (4,)] for _ in range(2)]],
        lambda t: vimcore.ops.bidirectional_scan(t[0], *[t[i : i + 2] for i in range(1, 13, 2)]),
    ),
    "vim_block": (
        [(1, 3, 16), (1, 3, 16)],
        lambda t: vimcore.ops.vim_block(t[0], dict(build(SMALL).layers[0].named_parameters()), t[1])[0],
    ),
}


@pytest.mark.parametrize(("shapes", "operator"), OPERATORS.values(), ids=OPERATORS)
def test_second_derivatives_of_operators_are_no_zeros(
    shapes: list[tuple[int, ...]], operator: Callable[[Tensors], Tensor]
) -> None:
    for chosen in range(len(shapes)):  # by one argument at a time
        tensors = [torch.rand(shape) for shape in shapes]
        tensors[chosen].requires_grad_()
        (gradient,) = torch.autograd.grad(operator(tensors).sum(), tensors[chosen], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            torch.autograd.grad(gradient.sum(), tensors[chosen])


def test_batches_of_gradients_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    assert torch.autograd.functional.jacobian(model, images).shape == (1, 3, *images.shape)
    with pytest.raises(TypeError, match=r"one gradient at a time.*vectorize"):
        torch.autograd.functional.jacobian(model, images, vectorize=True)


def freed(images: Tensor) -> Tensor:
    images = images.clone()
    images.untyped_storage().resize_(0)
    return images


@pytest.mark.filterwarnings("ignore")
def test_images_that_are_no_array_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    nested = torch.nested.nested_tensor(list(images))
    for other, kind in ((images.to_sparse(), "torch.sparse_coo"), (nested, "nested")):
        with pytest.raises(
            TypeError, match=rf"\[VisionMamba\] images: expected a dense tensor, got .*{kind}"
        ):
            model(other)
        with pytest.raises(TypeError, match=rf"\[rms_norm\] x: expected a dense tensor, got .*{kind}"):
            vimcore.ops.rms_norm(other, torch.ones(12))
    with pytest.raises(TypeError, match=r"images: expected a tensor with its memory"):
        model(freed(images))
    assert torch.equal(model(torch._neg_view(-images)), wanted)
    assert torch.equal(model(images.flip(0).flip(0)), wanted)


class Wrapper(Tensor):
    """A tensor whose memory is elsewhere, as quantized and sharded ones are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


class Named(Tensor):
    """A subclass that is its memory."""


def test_wrapped_tensors_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with pytest.raises(TypeError, match=r"images: expected a plain tensor, got a .*Wrapper, whose memory"):
        model(Wrapper(images))
    with pytest.raises(TypeError, match=r"x: expected a plain tensor, got a .*Wrapper"):
        vimcore.ops.rms_norm(Wrapper(images), torch.ones(12))
    assert torch.equal(model(images.as_subclass(Named)), wanted)
    model.head.weight = nn.Parameter(Wrapper(model.head.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=r"head\.weight: expected a plain tensor, got a .*Wrapper"):
        model(images)


def test_distributed_tensors_are_refused(tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"head\.weight: .* a DTensor.*fully_shard\(model\)"):
            model(images)
        model = build(SMALL).eval()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"layers\.0: .*FSDP.*fully_shard\(model\)"):
            model(images)
    finally:
        dist.destroy_process_group()
