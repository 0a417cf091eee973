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
from .checks import refuse_batched

LIBRARY = torch.library.Library("vimcore", "DEF")
Rule = Callable[..., tuple[Any, Any]]


def operator(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator and gives what calls it.

    Args:
        kernel: computes, on the CPU and on CUDA.
        fake: the results with their shapes and types, and nothing in them.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"vimcore::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.vimcore, name).default


def gradient(op: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """`backward(ctx, *gradients)` of what `setup(ctx, inputs, output)` saved; absent gradients are None."""

    def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_batched(gradients)
        return backward(ctx, *gradients)

    torch.library.register_autograd(op.name(), run, setup_context=prepare, lib=LIBRARY)


def last_derivative(op: Any) -> None:
    """Of an operator that computes gradients: differentiating it is an error."""

    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise RuntimeError("vimcore: second derivatives are not available (backward through a gradient)")

    torch.library.register_autograd(op.name(), backward, lib=LIBRARY)


def multiply_adds(op: Any, formula: Callable[..., Any]) -> None:
    """What FLOP counters say of an operator: two for each of `formula(*arguments)`, shapes for tensors."""
    packet = getattr(torch.ops.vimcore, op.name().removeprefix("vimcore::"))
    register_flop_formula(packet)(lambda *args, out_shape=None, **options: 2 * formula(*args, **options))
    FORMULAS[op.name()] = formula


FORMULAS: dict[str, Callable[..., Any]] = {}


# ---- vmap --------------------------------------------------------------------------------------------------


def vmapped(op: Any, rule: Rule) -> None:
    """How `torch.vmap` runs an operator; of a torch before 2.5 it says that it cannot."""
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(op.name(), rule, lib=LIBRARY)


def folded(op: Any, per_image: Sequence[str], lists: Sequence[int] = (), axis: int = 0) -> Rule:
    """The rule that makes one batch of several.

    Args:
        per_image: names of the arguments that begin with the batch; others must be the same for all.
        lists: of a list of tensors, the elements that begin with the batch.
        axis: of the results, that of the batch.
    """
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        n, given = info.batch_size, []
        for name, value, dim in zip(names, args, in_dims):
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
                given.append(
                    [
                        _fold(v, d, n) if i in lists else _same(op, name, v, d)
                        for i, (v, d) in enumerate(zip(value, dims))
                    ]
                )
            elif isinstance(value, Tensor):
                given.append(_fold(value, dim, n) if name in per_image else _same(op, name, value, dim))
            else:
                given.append(value)
        out = op(*given)
        if isinstance(out, Tensor):
            return out.unflatten(axis, (n, -1)), axis
        return tuple(t.unflatten(axis, (n, -1)) for t in out), (axis,) * len(out)

    return rule


def looped(op: Any) -> Rule:
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


def _same(op: Any, name: str, value: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return value
    raise TypeError(
        f"[{op.name().removeprefix('vimcore::')}] {name}: torch.vmap over weights is not available; images may "
        "differ, weights not: loop over the networks"
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
