# SPDX-License-Identifier: Apache-2.0
"""What may not reach the kernels: they take addresses, so a tensor has to be its memory, here and now."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_PLAIN = {Tensor, torch.nn.Parameter}
_FORWARD_MODE = (
    "forward-mode differentiation, which vimcore does not follow: "
    "differentiate with torch.autograd.grad or backward()"
)


def is_followed() -> bool:
    """Whether torch records or transforms what runs (torch.compile, torch.export, torch.func, FLOP counters).

    It then has to meet the operators that it knows, not calls of the core.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )


def refuse_tracing(op: str) -> None:
    """RuntimeError within torch.jit.trace and the legacy exporter, whose files would need the operators.

    Tools that trace in order to count (fvcore) see operators.
    """
    if torch.jit.is_tracing() and (
        torch.onnx.is_in_onnx_export() or getattr(torch.jit._trace, "_trace_module_map", None) is not None
    ):
        raise RuntimeError(tracing_refusal(op, "torch.jit.trace and torch.onnx.export(dynamo=False)"))


def tracing_refusal(op: str, what: str) -> str:
    """The message for what records operators."""
    return (
        f"[{op}] {what} cannot follow the C++ core of vimcore; torch.export and torch.compile do; "
        "to run a network elsewhere save it (model.save) for vimcore.Runtime, vim-infer or the C++ library; "
        "`vimcore export` writes such a file for ONNX Runtime, OpenVINO or torch.export"
    )


def refuse_wrapped(op: str, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """TypeError for the first tensor whose shape says something else than its memory.

    Those of torch.func and of tracers may pass where operators are called.
    """
    forward = forward_ad._current_level >= 0
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and not forward and set(map(type, tensors)) <= _PLAIN:
        return
    if transformed:
        refuse_forward_mode(op)
    for name, tensor in zip(names, tensors):
        if not isinstance(tensor, Tensor):
            given = "none" if tensor is None else type(tensor).__name__
            found = f"{given}: put the parameter back, or build a network without it"
        elif forward and forward_ad.unpack_dual(tensor).tangent is not None:
            found = f"a dual tensor of {_FORWARD_MODE}"
        elif type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or (
            isinstance(tensor, (FakeTensor, FunctionalTensor)) and is_followed()
        ):
            continue  # plain, or a subclass that adds methods to its memory, or seen by a tracer
        elif type(tensor).__name__ == "DTensor":
            found = (
                "a DTensor, of which each process holds a part: shard the network as a whole "
                "(fully_shard(model), not its layers), or take DistributedDataParallel"
            )
        else:
            kind = type(tensor)
            found = (
                f"a {kind.__module__}.{kind.__qualname__}, whose memory is not what its shape says: "
                "give plain tensors (dequantized where it is quantized)"
            )
        raise TypeError(f"[{op}] {name}: expected a plain tensor, got {found}")


def refuse_forward_mode(op: str) -> None:
    """TypeError within torch.func.jvp."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack):
        raise TypeError(f"[{op}] torch.func.jvp: {_FORWARD_MODE}")


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work that takes gradients of Functions alone."""
    level = torch._C._functorch.peek_interpreter_stack()
    return level is not None and level.key() != torch._C._functorch.TransformType.Functionalize


def differentiates_each() -> bool:
    """Whether gradients are wanted of every element of a torch.vmap on its own."""
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    Kind = torch._C._functorch.TransformType
    return Kind.Vmap in kinds and Kind.Grad in kinds[kinds.index(Kind.Vmap) :]


def refuse_layout(op: str, name: str, tensor: Tensor) -> None:
    """TypeError for a tensor that is no dense array, or whose memory was freed."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "a nested one" if tensor.is_nested else f"one of {tensor.layout}"
        raise TypeError(
            f"[{op}] {name}: expected a dense tensor, got {kind}: to_dense() or padding makes one"
        )
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise TypeError(f"[{op}] {name}: expected a tensor with its memory, which was freed (resize_(0))")


def refuse_batched(gradients: Sequence[Any]) -> None:
    """TypeError for gradients, or lists of them, that stand for many: backward computes one at a time."""
    flat = [g for gs in gradients for g in (gs if isinstance(gs, (list, tuple)) else [gs]) if g is not None]
    if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in flat):
        raise TypeError(
            "vimcore: backward takes one gradient at a time, got a batch of them (is_grads_batched=True, "
            "jacobian(vectorize=True)): leave these options at False"
        )


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on; differentiating them, by whatever they were computed from, is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("vimcore: second derivatives are not available (backward through a gradient)")


Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """For the backward of a Function: its results may not be differentiated again.

    Unlike torch's decorator it also says so where the incoming gradient is a constant. The error stands
    between the results and what they depend on, as far as it was saved: every argument, or an output. Without
    a path torch takes second derivatives for zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched(gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        present = [t for t in results if t is not None]
        if not torch.is_grad_enabled() or not present:
            return results
        sources = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
        anchor = torch.empty(0, requires_grad=True)
        guarded = iter(_NoSecondDerivative.apply(len(present), *present, anchor, *sources))
        return tuple(None if t is None else next(guarded) for t in results)

    return wrapper
