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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

from .. import _core
from .checks import is_transformed, refuse_batched

LIBRARY = torch.library.Library("vimcore", "DEF")
Rule = Callable[..., tuple[Any, Any]]


class Operator:
    """An operator of torch, which may be called within transforms of torch.func as well.

    Those take gradients of a Function alone, not of what was registered for an operator.
    """

    def __init__(self, op: Any) -> None:
        self.op = op
        self.name = op.name().removeprefix("vimcore::")
        self.arguments = [argument.name for argument in op._schema.arguments]
        self._transformed: Any = None
        self._rule: Rule | None = None

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() and is_transformed():
            leaves, spec = tree_flatten(args)
            return self._transformed.apply(spec, *leaves)
        return self.op(*args)

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
        self._transformed = _transformed(self, backward, prepare)

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
        packet = getattr(torch.ops.vimcore, self.name)
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
    torch.library.register_fake(f"vimcore::{name}", fake, lib=LIBRARY)
    return Operator(getattr(torch.ops.vimcore, name).default)


def _transformed(call: Operator, gradient: Callable[..., Any], prepare: Callable[..., None]) -> Any:
    """The operator as a Function whose arguments are flat: a tree, then its leaves."""

    def forward(spec: TreeSpec, *leaves: Any) -> Any:
        out = call.op(*tree_unflatten(leaves, spec))
        return tuple(out) if isinstance(out, list) else out

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec = inputs[0]
        prepare(ctx, tree_unflatten(inputs[1:], ctx.spec), output)

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_batched(gradients)
        found = gradient(ctx, tree_unflatten(ctx.needs_input_grad[1:], ctx.spec), *gradients)
        flat: list[Any] = [None]
        for value, part in zip(found, ctx.spec.children()):
            flat += value if isinstance(value, (list, tuple)) else [value] * part.num_leaves
        return tuple(flat)

    def vmap(info: Any, in_dims: tuple[Any, ...], spec: TreeSpec, *leaves: Any) -> Any:
        assert call._rule is not None
        out, dims = call._rule(info, tree_unflatten(in_dims[1:], spec), *tree_unflatten(leaves, spec))
        return tuple(out) if isinstance(out, list) else out, dims

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    return type(
        f"Vimcore_{call.name}", (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()}
    )


# ---- vmap --------------------------------------------------------------------------------------------------


def folded(op: Operator, per_image: Sequence[str], lists: Sequence[int] = (), axis: int = 0) -> Rule:
    """The rule that makes one batch of several.

    Args:
        per_image: names of the arguments that begin with the batch; others must be the same for all.
        lists: of a list of tensors, the elements that begin with the batch.
        axis: of the results, that of the batch.
    """

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        n, given = info.batch_size, []
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
    return tensor.resolve_conj().resolve_neg().contiguous()


def empty(like: Tensor, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor beside `like`, of its shape and type where none is given."""
    return torch.empty(
        like.shape if shape is None else tuple(shape), dtype=dtype or like.dtype, device=like.device
    )


def none(like: Tensor) -> Tensor:
    """What stands for an absent result."""
    return torch.empty(0, dtype=like.dtype, device=like.device)
