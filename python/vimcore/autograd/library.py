# SPDX-License-Identifier: Apache-2.0
"""How an operator of the core becomes one of torch's: schema, kernel, shapes, gradient, vmap, multiply-adds.

Operators take tensors of any strides and give contiguous ones, none of which shares memory with an argument.
What compilers, exporters and counters must know without computing is in the fake kernels and formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _core
from .checks import is_followed, is_transformed, refuse_batched

NAMESPACE = __name__.partition(".")[0]  # vimcore; the tests' copy on the simulated GPU has another
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
Rule = Callable[..., tuple[Any, Any]]


class Operator:
    """An operator of torch, and the same as a Function.

    Compilers and counters see the operator. Plain calls take the Function, which is faster than torch's
    dispatcher, and so do transforms of torch.func, which follow no gradient of an operator.
    """

    def __init__(self, op: Any, kernel: Callable[..., Any]) -> None:
        self.op = op
        self.kernel = kernel
        self.name = op.name().removeprefix(f"{NAMESPACE}::")
        self.arguments = [argument.name for argument in op._schema.arguments]
        self._function: Any = None  # for plain calls
        self._transformed: Any = None  # for torch.func, which wants it in two steps and slower
        self._rule: Rule | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.op(*args)
        if not is_followed():
            if not torch.is_grad_enabled():
                return self.kernel(*args)
            leaves, shape = _flat(args)
            return self._function.apply(shape, *leaves)
        if not is_transformed():
            return self.op(*args)
        leaves, shape = _flat(args)
        return self._transformed.apply(shape, *leaves)

    def gradient(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        """`backward(ctx, needed, *gradients)` of what `setup(ctx, inputs, output)` saved.

        `needed` says of every argument whether its gradient is wanted; gradients that are none are None.
        """

        def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup(ctx, inputs, output)

        def run(ctx: Any, *gradients: Tensor | None) -> Any:
            refuse_batched(gradients)
            return backward(ctx, ctx.needs_input_grad, *gradients)

        torch.library.register_autograd(self.op.name(), run, setup_context=prepare, lib=LIBRARY)
        self._function, self._transformed = _functions(self, backward, prepare)

    def last_derivative(self) -> None:
        """Of an operator that computes gradients: differentiating it is an error."""

        def backward(ctx: Any, needed: Any, *gradients: Tensor | None) -> None:
            raise RuntimeError("vimcore: second derivatives are not available (backward through a gradient)")

        self.gradient(backward, lambda ctx, inputs, output: None)

    def vmapped(self, rule: Rule) -> None:
        """How `torch.vmap` runs the operator."""
        self._rule = rule
        if hasattr(torch.library, "register_vmap"):  # torch 2.5
            torch.library.register_vmap(self.op.name(), rule, lib=LIBRARY)

    def multiply_adds(self, formula: Callable[..., Any]) -> None:
        """What FLOP counters say: two for each of `formula(*arguments)`, which sees shapes for tensors."""
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        register_flop_formula(packet)(lambda *args, out_shape=None, **options: 2 * formula(*args, **options))
        FORMULAS[self.op.name()] = formula


FORMULAS: dict[str, Callable[..., Any]] = {}


def operator(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Registers an operator.

    Args:
        kernel: computes, on the CPU and on CUDA.
        fake: the results with their shapes and types, and nothing in them.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, kernel)


Members = dict[str, Callable[..., Any]]
Shape = tuple[int, ...]  # of every argument the number of its elements, -1 where it is no list


def _flat(args: Sequence[Any]) -> tuple[list[Any], Shape]:
    """The arguments, lists replaced by their elements."""
    leaves: list[Any] = []
    for value in args:
        if type(value) is list:
            leaves += value
        else:
            leaves.append(value)
    return leaves, tuple([len(value) if type(value) is list else -1 for value in args])


def _nested(leaves: Sequence[Any], shape: Shape) -> list[Any]:
    """The arguments that `_flat` took apart."""
    args: list[Any] = []
    at = 0
    for count in shape:
        args.append(leaves[at] if count < 0 else list(leaves[at : at + count]))
        at += 1 if count < 0 else count
    return args


def _functions(call: Operator, gradient: Callable[..., Any], prepare: Callable[..., None]) -> tuple[Any, Any]:
    """The operator as Functions of flat arguments: for plain calls, and for torch.func."""

    def at_once(ctx: Any, shape: Shape, *leaves: Any) -> Any:
        args = _nested(leaves, shape)
        out = call.kernel(*args)
        out = tuple(out) if isinstance(out, list) else out
        ctx.shape = shape
        prepare(ctx, tuple(args), out)
        return out

    def forward(shape: Shape, *leaves: Any) -> Any:
        out = call.op(*_nested(leaves, shape))
        return tuple(out) if isinstance(out, list) else out

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.shape = inputs[0]
        prepare(ctx, tuple(_nested(inputs[1:], ctx.shape)), output)

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_batched(gradients)
        found = gradient(ctx, _nested(ctx.needs_input_grad[1:], ctx.shape), *gradients)
        flat: list[Any] = [None]
        for value, count in zip(found, ctx.shape):
            if count < 0:
                flat.append(value)
            else:
                flat += [None] * count if value is None else value
        return tuple(flat)

    def vmap(info: Any, in_dims: tuple[Any, ...], shape: Shape, *leaves: Any) -> Any:
        assert call._rule is not None
        out, dims = call._rule(info, _nested(in_dims[1:], shape), *_nested(leaves, shape))
        return tuple(out) if isinstance(out, list) else out, dims

    two_steps: Members = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": vmap,
    }
    one_step: Members = {"forward": at_once, "backward": backward}
    name = "Vimcore" + "".join(word.capitalize() for word in call.name.split("_"))

    def function(members: Members) -> Any:
        return type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in members.items()})

    return function(one_step), function(two_steps)


# ---- vmap --------------------------------------------------------------------------------------------------


def folded(op: Operator, per_image: Sequence[str], lists: Sequence[int] = (), axis: int = 0) -> Rule:
    """The rule that makes one batch of several.

    Args:
        per_image: names of the arguments that begin with the batch; others must be the same for all.
        lists: of a list of tensors, the elements that begin with the batch.
        axis: of the results, that of the batch.
    """

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        n = info.batch_size
        given: list[Any] = []
        for name, value, dim in zip(op.arguments, args, in_dims):
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
                given.append(
                    [
                        _fold(v, d, n) if i in lists else same_for_all(op.name, name, v, d)
                        for i, (v, d) in enumerate(zip(value, dims))
                    ]
                )
            elif isinstance(value, Tensor):
                mine = name in per_image
                given.append(_fold(value, dim, n) if mine else same_for_all(op.name, name, value, dim))
            else:
                given.append(value)
        out = op(*given)
        if isinstance(out, Tensor):
            return out.unflatten(axis, (n, -1)), axis
        return tuple(t.unflatten(axis, (n, -1)) for t in out), (axis,) * len(out)

    return rule


def looped(op: Operator) -> Rule:
    """The rule that runs an operator once for each, whatever differs between them."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        results = [op(*_selected(args, in_dims, k)) for k in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

    return rule


def _fold(value: Tensor, dim: int | None, n: int) -> Tensor:
    value = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


def same_for_all(
    op: str, name: str, value: Tensor, dim: int | None, remedy: str = "loop over the networks"
) -> Tensor:
    """The argument; TypeError where torch.vmap gives another one to every image."""
    if dim is None:
        return value
    raise TypeError(
        f"[{op}] {name}: expected the same in all of torch.vmap, got several: images may differ, "
        f"{name} may not; {remedy}"
    )


def _selected(value: Any, dim: Any, k: int) -> Any:
    if isinstance(value, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return [_selected(v, d, k) for v, d in zip(value, dims)]
    return value.select(dim, k) if isinstance(value, Tensor) and dim is not None else value


# ---- what kernels share ------------------------------------------------------------------------------------


@functools.lru_cache(64)
def config_of(text: str) -> _core.Config:
    """The configuration that an operator got as a text."""
    return _core.Config.from_json(text)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous, and its memory what its shape says."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def empty(like: Tensor, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor beside `like`, of its shape and type where none is given."""
    if shape is None:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def none(like: Tensor) -> Tensor:
    """What stands for an absent result."""
    return torch.empty(0, dtype=like.dtype, device=like.device)
